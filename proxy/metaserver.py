"""Where layerwise decoders call: `POST /v1/metaserver` (ascend-proxy.md 2.2).

Only ids that are expected are answered, each belongs to one request in flight, and only callers at a decoder's address
(or one that `--metaserver-allow` names): who answers in a decoder's place has a prompt's KV sent to him. All children
of a list of prompts are joined, then one prefill is started for them. A call is answered with its outcome if that comes
soon, and with "ok" if not: a decoder has few threads for these calls and no time-out on them, and joined children would
wait for one another.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
from aiohttp import web

from proxy.callers import Callers
from proxy.errors import BadRequest, ProxyError

PATH = "/v1/metaserver"
Forward = Callable[[int, dict[str, Any]], Awaitable[None]]
StartPrefill = Callable[[dict[str, dict[str, Any]]], Awaitable[None]]


class Handoff:
    """One attempt of one request. `failed` has the exception of a prefill that failed for good."""

    def __init__(self, ids: tuple[str, ...], start: StartPrefill, loop: asyncio.AbstractEventLoop) -> None:
        self._ids = ids
        self._start = start
        self._loop = loop
        self._posted: dict[str, dict[str, Any]] = {}
        self.prefill: asyncio.Task[None] | None = None
        self.outcome: asyncio.Future[BaseException | None] = loop.create_future()
        self.failed: asyncio.Future[BaseException] = loop.create_future()

    def post(self, child_id: str, params: dict[str, Any]) -> None:
        """A child's call. The last child's starts the prefill; one that comes after a failure starts it again."""
        self._posted[child_id] = params
        if self.outcome.done() and self.outcome.result() is not None:
            self.prefill, self.outcome = None, self._loop.create_future()
        if self.prefill is None and len(self._posted) == len(self._ids):
            in_order = {one: self._posted[one] for one in self._ids}
            self.prefill = self._loop.create_task(self._run(in_order))

    async def _run(self, posted: dict[str, dict[str, Any]]) -> None:
        outcome = self.outcome
        try:
            await self._start(posted)
        except Exception as failure:  # the story of the request says what follows from it
            outcome.set_result(failure)
            if not self.failed.done():
                self.failed.set_result(failure)
        except asyncio.CancelledError:
            outcome.set_result(ConnectionAbortedError("the request has ended"))
            raise
        else:
            outcome.set_result(None)

    def end(self) -> None:
        """No call waits longer than the attempt, but for a prefill that goes on by itself."""
        if not self.outcome.done() and (self.prefill is None or self.prefill.done()):
            self.outcome.set_result(ConnectionAbortedError("the request has ended"))


class Metaserver:
    """`url` is what decoders are told; `calls` counts answers by their outcome."""

    def __init__(self, wait_s: float, callers: Callers, loop: asyncio.AbstractEventLoop, calls: Counter[str]) -> None:
        self._wait_s = wait_s
        self._callers = callers
        self._loop = loop
        self._expected: dict[str, Handoff] = {}
        self.url = ""
        self.calls = calls
        self.worker: int | None = None
        """Of several worker processes. The URL ends in its number then, so that any of them knows whose a call is."""
        self.forward: Forward | None = None
        """Hands a call to another worker. Raises ProxyError as `post` does."""

    @property
    def num_expected(self) -> int:
        return len(self._expected)

    @contextmanager
    def expect(self, ids: tuple[str, ...], start: StartPrefill) -> Iterator[Handoff]:
        """Answer calls for `ids` while the block runs. `start` is given what each of them posted."""
        handoff = Handoff(ids, start, self._loop)
        self._expected.update(dict.fromkeys(ids, handoff))
        try:
            yield handoff
        finally:
            for one in ids:
                self._expected.pop(one, None)
            handoff.end()

    def routes(self) -> list[web.RouteDef]:
        with_worker = PATH + r"/{worker:\d{1,4}}"
        return [web.post(PATH, self.serve), *([web.post(with_worker, self.serve)] if self.worker is not None else [])]

    async def serve(self, request: web.Request) -> web.Response:
        """Raises ProxyError: 403 for a stranger, 404 for an id that is not expected, 502 if the prefill failed."""
        if not self._callers.include(request):
            self.calls["stranger"] += 1
            raise ProxyError(403, "Only decoders call this (--metaserver-allow).", error_type="PermissionDeniedError")
        child_id, params = self._read(await request.read())
        worker = int(request.match_info.get("worker", -1))
        if self.forward is not None and worker not in (-1, self.worker):
            await self.forward(worker, params)
        else:
            await self.post(child_id, params)
        return web.Response(body=b'{"status":"ok"}', content_type="application/json")

    async def post(self, child_id: str, params: dict[str, Any]) -> None:
        """A decoder's call. Raises ProxyError as `serve` does."""
        handoff = self._expected.get(child_id)
        if handoff is None:
            self.calls["unknown"] += 1
            raise ProxyError(404, f"No request waits for '{child_id}'.", error_type="not_found_error")
        handoff.post(child_id, params)
        await asyncio.wait({handoff.outcome}, timeout=self._wait_s)
        failure = handoff.outcome.result() if handoff.outcome.done() else None
        if failure is not None:
            self.calls["failed"] += 1
            raise ProxyError(502, f"The prefill failed: {failure}.", error_type="upstream_error")
        self.calls["ok"] += 1

    @staticmethod
    def _read(body: bytes) -> tuple[str, dict[str, Any]]:
        try:
            params = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"The request body is not valid JSON: {error}.") from None
        if type(params) is not dict or type(params.get("request_id")) is not str:
            raise BadRequest("The request body must be a JSON object with a string 'request_id'.", "request_id")
        return params["request_id"], params
