"""A connection whose one request the aiohttp application answers: what stands between the socket and aiohttp.

The head was read, and judged, by the frontend; aiohttp gets one that is built anew from it. The body is read by our
framing, under our limits, and framed anew too. What a client sends behind its request is dropped: aiohttp answers one
request, and the connection ends.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

from proxy import http1
from proxy.chunked_body import ChunkDecoder
from proxy.client_pace import Stall, UploadRate
from proxy.errors import ProxyError, TooLarge
from proxy.http1 import RequestHead
from proxy.request_fields import HOP_BY_HOP, is_for_connectors

if TYPE_CHECKING:
    from proxy.control_http import ControlProtocol
    from proxy.frontend import Services

_REBUILT = HOP_BY_HOP | frozenset(b"content-length x-request-id authorization x-api-key traceparent tracestate".split())


def rebuilt_head(head: RequestHead, raw: bytes, request_id: str) -> bytes:
    """The head aiohttp reads. `raw` is the client's, which `strict_head.check_head` has let pass."""
    named = head.named_by_connection
    lines = [b"%b %b HTTP/%b" % (head.method, head.target, head.version.encode())]
    for line in raw[:-4].split(b"\r\n")[1:]:
        name = line.partition(b":")[0].lower()
        dashed = name.replace(b"_", b"-")
        if name not in named and dashed not in _REBUILT and not is_for_connectors(dashed):
            lines.append(line)
    lines.append(b"X-Request-Id: " + request_id.encode())
    lines += [line[:-2] for line in head.written_anew if line.partition(b":")[0].lower() not in named]
    if head.chunked:
        lines.append(b"Transfer-Encoding: chunked")
    elif head.has_length:
        lines.append(b"Content-Length: %d" % head.content_length)
    return b"\r\n".join([*lines, b"", b""])


class HandedOver(asyncio.Protocol):
    __slots__ = (
        "_begun",
        "_decoder",
        "_heard",
        "_inner",
        "_missing",
        "_rate",
        "_request_id",
        "_services",
        "_size",
        "_stall",
        "transport",
    )

    def __init__(
        self, services: Services, head: RequestHead, inner: ControlProtocol, transport: asyncio.Transport
    ) -> None:
        self.transport = transport
        self._services = services
        self._inner: ControlProtocol | None = inner
        self._decoder = ChunkDecoder() if head.chunked else None
        self._missing = head.content_length
        self._request_id = head.request_id
        self._size = 0
        self._heard = monotonic()
        self._rate = UploadRate(self._heard)
        self._stall: Stall | None = None

    def begin(self, head: bytes, rest: bytes) -> None:
        assert self._inner is not None
        self._services.handed_over.add(self)
        self.transport.set_protocol(self)
        self._inner.connection_made(self.transport)
        self._inner.data_received(head)
        if rest:
            self.data_received(rest)

    @property
    def _is_whole(self) -> bool:
        return self._decoder.complete if self._decoder is not None else not self._missing

    def data_received(self, data: bytes) -> None:
        if self._inner is None or self._is_whole:
            return
        self._heard = monotonic()
        try:
            self._feed(self._inner, data)
        except ProxyError as error:
            self._refuse(error)

    def _feed(self, inner: ControlProtocol, data: bytes) -> None:
        if self._decoder is None:
            data = data[: self._missing]
            self._missing -= len(data)
            self._size += len(data)
            inner.data_received(data)
            return
        payload = b"".join(self._decoder.feed(data)[0])
        self._size += len(payload)
        if self._size > self._services.config.max_body_bytes:
            raise TooLarge(self._services.config.max_body_bytes)
        end = http1.LAST_CHUNK if self._decoder.complete else b""
        if payload or end:
            inner.data_received((http1.chunk(payload) if payload else b"") + end)

    def _refuse(self, error: ProxyError) -> None:
        """The body is not one: say so if nothing was said yet, and end the handler and the connection."""
        inner, self._inner = self._inner, None
        assert inner is not None
        has_begun = inner.answer_has_begun
        self._services.refused(error.status, self._request_id)
        inner.transport = None  # it would close it, and the client has yet to read our answer
        inner.connection_lost(ConnectionAbortedError(error.message))
        if has_begun or self.transport.is_closing():
            self.transport.abort()
            return
        self.transport.write(http1.simple_response(error.status, error.body(), close=True))
        self._heard = monotonic()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.transport.resume_reading()

    def pause_writing(self) -> None:
        self._stall = Stall(monotonic(), self.transport.get_write_buffer_size())
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._stall = None
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._services.handed_over.discard(self)
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.connection_lost(exc)

    def check_idle(self, now: float, linger_s: float) -> None:
        """Called now and then: ends a refused connection, and a body that comes too slowly or not at all."""
        config = self._services.config
        stall, waiting = self._stall, self.transport.get_write_buffer_size()
        if stall is not None and stall.is_longer(config.client_write_timeout_s, now, waiting):
            self.transport.abort()
        elif self._inner is None:
            if now - self._heard > linger_s:
                self.transport.abort()
        elif not self._is_whole:
            if not self.transport.is_reading():  # the instance is slow, not the client
                self._heard = now
                self._rate.restart(now, self._size)
            elif now - self._heard > config.request_read_timeout_s or self._rate.is_below(
                config.min_upload_bytes_per_s, now, self._size
            ):
                self._refuse(ProxyError(408, "The request did not arrive in time."))
