"""A worker's end of the channel: it asks the others and does what they ask. The parent passes the messages on."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from proxy.errors import ProxyError
from proxy.workers.frames import PARENT, Decoder, Message, encode

log = logging.getLogger(__name__)

Handler = Callable[[Any, bytes], Awaitable[tuple[Any, bytes]]]
ANSWER_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Reply:
    """What another worker answered. `error` is empty if it did what it was asked."""

    worker: int
    error: str
    fields: Any = None
    body: bytes = field(default=b"", repr=False)


@dataclass(slots=True)
class Replies:
    """`parent` is what the parent had to say itself."""

    parent: bytes
    of: list[Reply]

    @property
    def answered(self) -> set[int]:
        return {one.worker for one in self.of if not one.error}

    @property
    def failed(self) -> dict[int, str]:
        return {one.worker: one.error for one in self.of if one.error}


class _Question:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.answered = loop.create_future()
        self.parent = b""
        self.asked: list[int] | None = None
        self.replies: dict[int, Reply] = {}

    def settle(self) -> None:
        if self.asked is not None and self.replies.keys() >= set(self.asked) and not self.answered.done():
            self.answered.set_result(None)

    def result(self) -> Replies:
        if self.asked is None:
            return Replies(b"", [Reply(PARENT, "the parent process does not answer")])
        silent = [one for one in self.asked if one not in self.replies]
        late = [Reply(one, "no answer in time") for one in silent]
        return Replies(self.parent, sorted([*self.replies.values(), *late], key=lambda one: one.worker))


class Peers(asyncio.Protocol):
    """`connect()`, add to `handlers`, then `serve()`: what is asked before that waits, but for what `early` has."""

    def __init__(self, worker: int, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self.worker = worker
        self._sock = sock
        self._loop = loop
        self._decoder = Decoder()
        self._ids = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: list[Message] | None = []
        self._transport: asyncio.Transport | None = None
        self.handlers: dict[str, Handler] = {}
        self.early: dict[str, Handler] = {}
        self.parent_is_gone = asyncio.Event()

    async def connect(self) -> None:
        await self._loop.create_unix_connection(lambda: self, sock=self._sock)

    def serve(self) -> None:
        held, self._held = self._held or [], None
        for message in held:
            self._received(message)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._transport is not None:
            self._transport.close()

    # --- asking

    async def ask(
        self,
        call: str,
        fields: Any = None,
        body: bytes = b"",
        *,
        to: Sequence[int] | None = None,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> Replies:
        """What every other worker that lives (or those of them in `to`) answers; who is silent for too long has failed.
        Never raises for them."""
        number = next(self._ids)
        question = self._questions[number] = _Question(self._loop)
        self._send(Message("ask", call, number, self.worker, None if to is None else list(to), "", fields, body))
        try:
            await asyncio.wait({question.answered}, timeout=timeout_s)
            return question.result()
        finally:
            del self._questions[number]

    def tell_parent(self, call: str, fields: Any = None, body: bytes = b"") -> None:
        self._send(Message("tell", call, 0, self.worker, None, "", fields, body))

    def _send(self, message: Message) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(message))

    # --- being asked

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            self._received(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self.parent_is_gone.set()

    def _received(self, message: Message) -> None:
        question = self._questions.get(message.id)
        if message.kind == "asked" and question is not None:
            question.asked, question.parent = message.to, message.body
            question.settle()
        elif message.kind == "answer" and question is not None:
            question.replies[message.sender] = Reply(message.sender, message.error, message.fields, message.body)
            question.settle()
        elif message.kind in ("ask", "tell"):
            if self._held is not None and message.call not in self.early:
                self._held.append(message)
                return
            task = self._loop.create_task(self._do(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _do(self, message: Message) -> None:
        fields, body, error = None, b"", ""
        handler = (self.early if self._held is not None else self.handlers).get(message.call)
        try:
            if handler is None:
                raise ProxyError(501, f"Worker {self.worker} doesn't know '{message.call}'.")
            fields, body = await handler(message.fields, message.body)
        except ProxyError as failure:
            error = failure.message
            fields = failure.status
        except Exception as failure:  # the last resort: the asker must not wait for an answer that never comes
            log.exception("event=worker_call_failed call=%s", message.call)
            error = f"internal error: {failure}"
        if message.kind == "ask":
            self._send(Message("answer", message.call, message.id, self.worker, [message.sender], error, fields, body))
