"""A closed-loop HTTP load generator for a proxy in front of mock engines: cheap, and exact about what comes back.

Every answer is compared byte for byte with what the mock engine must have said (`bench.mock_answers`), so a benchmark
that passes has measured right answers. `run_load` is the whole interface.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import random
import time
from dataclasses import dataclass, field
from typing import Any, cast

import httptools
import orjson

from bench.mock_answers import EventTemplate, script_of, whole_answer

MAX_ERRORS = 10
CONNECT_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class LoadCase:
    """`num_clients` connections, each sending `requests_per_client` requests one after the other."""

    name: str
    num_clients: int
    requests_per_client: int
    num_tokens: int
    stream: bool
    chat: bool = True
    prompt_chars: int = 200
    image_bytes: int = 0
    """Of an image beside the prompt, as a data URL; its base64 is a third longer."""
    interval_s: float = 0.0
    """Pace of the mock engine's tokens."""
    spread_s: float = 0.0
    """Clients begin evenly over so long; a first request is not timed then: later ones find all clients there."""
    deadline_s: float = 60.0

    @property
    def num_requests(self) -> int:
        return self.num_clients * self.requests_per_client


@dataclass(slots=True)
class LoadResult:
    num_right: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    """From the request's last byte sent to the answer's first body byte; a first request's includes the connect."""
    errors: list[str] = field(default_factory=list)


class Client(asyncio.Protocol):
    """One keep-alive connection that sends its requests one by one and checks each answer."""

    def __init__(self, case: LoadCase, index: int, result: LoadResult, done: asyncio.Future[None]) -> None:
        self._case, self._index, self._result, self._done = case, index, result, done
        self._loop = asyncio.get_running_loop()
        self._sent = 0
        self._body: list[bytes] = []
        self._started_at = time.monotonic()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        self._send(first=True)

    def _send(self, first: bool = False) -> None:
        case, transport = self._case, self._transport
        if transport is None:
            return
        self._fields = fields = request_fields(case, f"{self._index}-{self._sent}")
        body = orjson.dumps(fields)
        path = b"/v1/chat/completions" if case.chat else b"/v1/completions"
        self._sent += 1
        self._body = []
        self._first_byte = False
        self._parser = httptools.HttpResponseParser(self)
        if not first:
            self._started_at = time.monotonic()
        transport.write(
            b"POST %b HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (path, len(body), body)
        )

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if not self._first_byte:
            self._first_byte = True
            if self._sent > 1 or not self._case.spread_s:
                self._result.ttft_s.append(time.monotonic() - self._started_at)
        self._body.append(body)

    def on_message_complete(self) -> None:
        case, result = self._case, self._result
        status = self._parser.get_status_code()
        body = b"".join(self._body)
        if status == 200 and _says(body, expected_body(case, self._fields, body)):
            result.num_right += 1
            result.num_tokens += case.num_tokens
        else:
            self._error(f"status {status}: {body[-300:]!r}")
        if self._sent < case.requests_per_client:
            # not from within the parser's own callback
            self._loop.call_soon(self._send)
        else:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self._done.done():
            self._error(f"connection lost: {exc!r}")
            self._finish()

    def _error(self, text: str) -> None:
        if len(self._result.errors) < MAX_ERRORS:
            self._result.errors.append(text)

    def _finish(self) -> None:
        if not self._done.done():
            self._done.set_result(None)
        if self._transport is not None:
            self._transport.close()


def request_fields(case: LoadCase, seed: str) -> dict[str, Any]:
    """The body of one request. `seed` makes its prompt, and so its answer, unlike the others'."""
    text = f"{seed} " + "x" * max(0, case.prompt_chars - len(seed) - 1)
    content = [{"type": "text", "text": text}, _image(case.image_bytes)] if case.image_bytes else text
    prompt = {"messages": [{"role": "user", "content": content}]} if case.chat else {"prompt": text}
    fields = {"model": "mock", **prompt, "max_tokens": case.num_tokens, "temperature": 0.0, "ignore_eos": True}
    return {**fields, "stream": True} if case.stream else fields


def _says(body: bytes, expected: bytes) -> bool:
    """Byte for byte, or the same JSON written anew, as vllm-router does with answers that are not streamed."""
    if body == expected:
        return True
    try:
        return bool(orjson.loads(body) == orjson.loads(expected))
    except orjson.JSONDecodeError:
        return False


@functools.cache
def _image(num_bytes: int) -> dict[str, Any]:
    data = base64.b64encode(random.Random(num_bytes).randbytes(num_bytes)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def expected_body(case: LoadCase, fields: dict[str, Any], body: bytes) -> bytes:
    """What the mock engine says to `fields`; its id is taken from `body`, since a proxy may choose it."""
    start = body.find(b'"id":"') + 6
    name = body[start : body.find(b'"', start)].decode()
    script = script_of(fields)
    if case.stream:
        return EventTemplate(script, case.chat, name, "mock", 1, 0, usage=False).whole()
    return whole_answer(script, case.chat, name, "mock")


async def run_load(host: str, port: int, case: LoadCase) -> LoadResult:
    """Run the case to its end or its deadline. What isn't right or isn't there is in `errors`."""
    result = LoadResult()
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    ends: list[asyncio.Future[None]] = []

    async def connect(index: int) -> None:
        done = loop.create_future()
        ends.append(done)
        await asyncio.sleep(case.spread_s * index / case.num_clients)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await loop.create_connection(lambda: Client(case, index, result, done), host, port)

    outcomes = await asyncio.gather(*map(connect, range(case.num_clients)), return_exceptions=True)
    result.errors += [f"connect: {error!r}" for error in outcomes if isinstance(error, BaseException)][:MAX_ERRORS]
    if not result.errors:
        _, late = await asyncio.wait(ends, timeout=case.deadline_s)
        if late:
            result.errors.append(f"{len(late)} clients were not done after {case.deadline_s} s")
    for end in ends:
        end.cancel()
    result.seconds = loop.time() - started_at
    return result
