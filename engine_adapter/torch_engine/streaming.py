"""Server-sent events with a late head: the 200 leaves with the first event, so earlier errors keep their status."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web

from engine_adapter.torch_engine.api_errors import ApiError

DONE = b"data: [DONE]\n\n"


def encode_event(event: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(event) + b"\n\n"


class EventStream:
    """One streamed answer. A client that reads slowly suspends `send`, never the engine.

    Every method raises ConnectionError (or is cancelled) when the client has gone.
    """

    def __init__(self, request: web.BaseRequest, headers: dict[str, str]) -> None:
        self._request = request
        self._response = web.StreamResponse(
            headers=headers | {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        )

    @property
    def started(self) -> bool:
        return self._response.prepared

    async def send(self, events: list[dict[str, Any]]) -> None:
        """Write these events with one call."""
        await self._write(b"".join([encode_event(event) for event in events]))

    async def fail(self, error: ApiError) -> None:
        """An error after the head: an event, as in vLLM, and the usual end."""
        await self._write(encode_event(error.body()))

    async def end(self) -> web.StreamResponse:
        await self._write(DONE)
        await self._response.write_eof()
        return self._response

    async def _write(self, payload: bytes) -> None:
        if not self._response.prepared:
            await self._response.prepare(self._request)
        await self._response.write(payload)
