"""SSE comments to a client whose stream has not begun yet, so that nothing between it and the proxy takes the silence
of a queue or a long prefill for a dead connection (`--keepalive-interval`).

The first comment commits the 200. What fails afterwards can't have a status of its own any more: it is told as the
error event of the API that was called, and the stream ends there.
"""

from __future__ import annotations

import asyncio

from proxy import http1, sse
from proxy.flow import Flow

COMMENT = b": keep-alive\n\n"


class KeepAlive:
    """From now on until `stop()`. The flow's `headers_sent` says whether a comment has gone out."""

    __slots__ = ("_flow", "_interval_s", "_loop", "_timer")

    def __init__(self, flow: Flow, interval_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self._flow = flow
        self._interval_s = interval_s
        self._loop = loop
        self._timer = loop.call_later(interval_s, self._say)

    def stop(self) -> None:
        self._timer.cancel()

    def _say(self) -> None:
        flow = self._flow
        opening = b"" if flow.headers_sent else _commit(flow)
        flow.client.write(opening + _framed(flow, COMMENT))
        self._timer = self._loop.call_later(self._interval_s, self._say)


def _commit(flow: Flow) -> bytes:
    """The head of a stream that no instance has begun."""
    flow.headers_sent = True
    flow.status = 200
    chunked = flow.head.version == "1.1"
    flow.close = flow.close or not chunked
    head = http1.ResponseHead()
    head.status = 200
    head.add(b"Content-Type", b"text/event-stream; charset=utf-8")
    return head.rebuilt(flow.id_lines, http1.CHUNKED_LINE if chunked else b"", flow.close)


def _framed(flow: Flow, payload: bytes) -> bytes:
    return http1.chunk(payload) if flow.head.version == "1.1" else payload


def end_with_error(flow: Flow, status: int, error: bytes) -> None:
    """`error` is the body that the answer would have had; the stream says it and ends."""
    flow.stop_keep_alive()
    last = http1.LAST_CHUNK if flow.head.version == "1.1" else b""
    flow.client.write(_framed(flow, sse.as_event(status, error, flow.route)) + last)
    flow.client.answered(close=flow.close)
