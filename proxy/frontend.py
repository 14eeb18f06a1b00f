"""The client's side of a connection: requests in, answers out, in order.

The hot routes are served here; any other request is handed, connection and all, to the aiohttp application, which
answers it and closes (`handed_over.py`). Its head has passed the same checks then. A body is held whole before an
instance is troubled (both legs and every retry need it), so an upload needs no back-pressure of its own: it is bounded
by `max_body_bytes`, and what a client pipelines behind it by one read.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from time import monotonic
from typing import cast

from proxy import http1
from proxy.access import Access
from proxy.chunked_body import ChunkDecoder
from proxy.client_pace import Stall, UploadRate
from proxy.config import ProxyConfig
from proxy.control_http import ControlProtocol
from proxy.downstream import Relayed
from proxy.errors import BadHead, Failure, ProxyError, TooLarge
from proxy.handed_over import HandedOver, rebuilt_head
from proxy.http1 import HEAD_END, RequestHead
from proxy.openai_api import ROUTES
from proxy.strict_head import check_head

LINGER_S = 2.0  # to let a refused client read our answer before the connection is reset
MAX_SURPLUS = 64  # connections beyond max_connections that are read a head from; the oldest makes room for a newer one
ALWAYS_ANSWERED = frozenset((b"/health", b"/ping", b"/healthcheck", b"/metrics"))

# state
HEAD, BODY, BUSY, LINGER, CLOSED = "head", "body", "busy", "linger", "closed"


class Services:
    """What a client's connection needs of the rest of the proxy; `app.py` fills it."""

    __slots__ = (
        "_max_connections",
        "access",
        "config",
        "connections",
        "control_protocol",
        "draining",
        "handed_over",
        "loop",
        "refused",
        "serve",
        "surplus",
    )

    def __init__(
        self,
        config: ProxyConfig,
        loop: asyncio.AbstractEventLoop,
        serve: Callable[[ClientConnection, RequestHead, bytes], asyncio.Task[None]],
        control_protocol: Callable[[], ControlProtocol],
        refused: Callable[[int, str | None], None],
        access: Access,
    ) -> None:
        self.access = access
        self.config = config
        self._max_connections = config.max_connections_each
        self.loop = loop
        self.serve = serve
        self.control_protocol = control_protocol
        self.refused = refused
        self.connections: set[ClientConnection] = set()
        self.handed_over: set[HandedOver] = set()
        self.surplus: dict[ClientConnection, None] = {}
        """Those of `connections` beyond `max_connections`, oldest first: only health and metrics are theirs to ask."""
        self.draining = False

    @property
    def is_full(self) -> bool:
        return len(self.connections) + len(self.handed_over) - len(self.surplus) >= self._max_connections


class ClientConnection(asyncio.Protocol):
    __slots__ = (
        "_ahead",
        "_body",
        "_body_size",
        "_decoder",
        "_head",
        "_head_bytes",
        "_rate",
        "_relayed",
        "_services",
        "_stall",
        "_task",
        "since",
        "state",
        "transport",
    )

    def __init__(self, services: Services) -> None:
        self._services = services
        self.state = CLOSED
        self._head = RequestHead()
        self._head_bytes = b""
        self._body: list[bytes] = []
        self._body_size = 0
        self._decoder: ChunkDecoder | None = None
        self._ahead = b""
        self._task: asyncio.Task[None] | None = None
        self._relayed: Relayed | None = None
        self._rate: UploadRate | None = None
        self._stall: Stall | None = None
        self.since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have this interface and are not of this class
        self.transport = transport = cast(asyncio.Transport, transport)
        self.state = HEAD
        self.since = monotonic()
        services = self._services
        is_full = services.is_full
        services.connections.add(self)
        if services.draining:
            transport.close()
        elif is_full:
            services.surplus[self] = None
            if len(services.surplus) > MAX_SURPLUS:
                next(iter(services.surplus)).refuse_surplus()

    # --- reading a request

    def data_received(self, data: bytes) -> None:
        if self.state is BUSY:  # pipelined: the next request waits for its turn
            self._ahead += data
            if len(self._ahead) > self._services.config.max_head_bytes:
                self.transport.pause_reading()
            return
        if self.state in (LINGER, CLOSED):
            return
        try:
            while data and self.state in (HEAD, BODY):
                data = self._read_head(data) if self.state is HEAD else self._read_body(data)
            if self.state is BUSY:
                self._ahead = data
        except ProxyError as error:
            self._refuse(error)

    def _read_head(self, data: bytes) -> bytes:
        """Returns what follows the head, or what there is of a body to be read."""
        known = len(self._head_bytes)
        if not known:
            if data[:2] == b"\r\n" and not (data := data[2:]):  # RFC 9112 section 2.2
                return b""
            self.since = monotonic()
        seen = self._head_bytes + data if known else data
        end = seen.find(HEAD_END, max(0, known - 3))
        head_size = len(seen) if end < 0 else end + 4
        if head_size > self._services.config.max_head_bytes:
            raise BadHead("The request head is larger than the limit (--max-head-bytes).", 431)
        self._head.feed(seen[known:head_size])
        self._head_bytes = seen[:head_size]
        head = self._head
        if head.complete is not (end >= 0):
            raise BadHead("Malformed HTTP request.")
        if end < 0:
            return b""
        check_head(self._head_bytes, self._services.config.max_header_fields)
        if self._services.surplus:
            self._leave_surplus()
        self._services.access.judge(head)
        rest = seen[head_size:]
        if head.path not in ROUTES or head.method != b"POST":
            self._hand_over(rest)
            return b""
        self._begin_body(head)
        return self._read_body(rest)

    def _begin_body(self, head: RequestHead) -> None:
        self._check_length(head)
        if head.content_encoding not in (b"", b"identity"):
            raise ProxyError(415, "A compressed request body is not understood.", param="Content-Encoding")
        if head.expects_continue:
            self.write(http1.CONTINUE)
        self.state = BODY
        self._decoder = ChunkDecoder() if head.chunked else None
        self._rate = None

    def _check_length(self, head: RequestHead) -> None:
        if head.content_length > self._services.config.max_body_bytes:
            raise TooLarge(self._services.config.max_body_bytes)

    def _read_body(self, data: bytes) -> bytes:
        head = self._head
        if self._decoder is None:
            missing = head.content_length - self._body_size
            if len(data) < missing:
                self._body.append(data)
                self._body_size += len(data)
                return b""
            body = b"".join([*self._body, data[:missing]]) if self._body or len(data) > missing else data
            rest = data[missing:]
        else:
            pieces, used = self._decoder.feed(data)
            self._body.append(b"".join(pieces))  # not each by itself: one of two bytes takes 43 as an object
            self._body_size += len(self._body[-1])
            if self._body_size > self._services.config.max_body_bytes:
                raise TooLarge(self._services.config.max_body_bytes)
            if not self._decoder.complete:
                return b""
            body, rest = b"".join(self._body), data[used:]
        self._reset()
        self.state = BUSY
        self._task = self._services.serve(self, head, body)
        return rest

    def _reset(self) -> None:
        self._head = RequestHead()
        self._head_bytes = b""
        self._body = []
        self._body_size = 0
        self._decoder = None

    def _hand_over(self, rest: bytes) -> None:
        """Give the connection to the aiohttp application, which answers this one request and closes."""
        services, head = self._services, self._head
        self._check_length(head)
        request_id = head.request_id or uuid.uuid4().hex
        handed = HandedOver(services, head, services.control_protocol(), self.transport)
        services.connections.discard(self)
        services.surplus.pop(self, None)
        self.state = CLOSED
        handed.begin(rebuilt_head(head, self._head_bytes, request_id), rest)

    # --- more connections than are served

    def _leave_surplus(self) -> None:
        """A surplus connection is one like the others where there is room by now. Raises ProxyError where not."""
        surplus = self._services.surplus
        if self not in surplus:
            return
        if not self._services.is_full:
            del surplus[self]
        elif self._head.method != b"GET" or self._head.path not in ALWAYS_ANSWERED:
            raise _too_many()

    def refuse_surplus(self) -> None:
        self._services.surplus.pop(self, None)
        if self.state is HEAD:
            self._refuse(_too_many())
        self.transport.close()

    def _refuse(self, error: ProxyError) -> None:
        """Answer what is not a request we can read, and end the connection once the client has had time to see it."""
        head = self._head
        self._services.refused(error.status, head.request_id)
        body = error.body(ROUTES.get(head.path, ""))
        ids = head.id_lines(head.request_id) if head.complete and head.request_id else b""
        self.write(
            http1.simple_response(error.status, body, id_lines=ids, close=True, retry_after_s=error.retry_after_s)
        )
        self._linger()

    def _linger(self) -> None:
        self.state = LINGER
        self.since = monotonic()
        if not self.transport.is_closing() and self.transport.can_write_eof():
            self.transport.write_eof()

    # --- answering

    def write(self, data: bytes) -> None:
        """Does nothing once the client is gone: it may be at any write, and its transport knows before we do."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def lendable(self) -> int | None:
        transport = self.transport
        if transport.is_closing() or transport.get_write_buffer_size() or transport.get_extra_info("sslcontext"):
            return None
        descriptor: int = transport.get_extra_info("socket").fileno()
        return descriptor

    def relay_from(self, upstream: Relayed | None) -> None:
        """From now on the client's pace slows `upstream` down, and its leaving ends it."""
        self._relayed = upstream

    def end_relay(self, failure: Failure) -> bool:
        """End the stream that is relayed, as if its instance had failed so. False if none is."""
        if self._relayed is None:
            return False
        self._relayed.end_relay(failure)
        return True

    def answered(self, *, close: bool) -> None:
        """The answer was written in full: read the next request, or close."""
        self._relayed = None
        self._task = None
        if self.state is not BUSY:
            return
        if close or self._services.draining:
            self.transport.close()
            return
        self.state = HEAD
        self.since = monotonic()
        ahead, self._ahead = self._ahead, b""
        if ahead and not self.transport.is_closing():
            self.transport.resume_reading()
            self.data_received(ahead)

    def break_off(self) -> None:
        """The answer cannot be finished: end the connection so that the client notices. What is relayed to it ends
        when it is lost: a stream that is lent would keep it open."""
        self.transport.abort()

    def pause_writing(self) -> None:
        self._stall = Stall(monotonic(), self.transport.get_write_buffer_size())
        if self._relayed is not None:
            self._relayed.pause()

    def resume_writing(self) -> None:
        self._stall = None
        if self._relayed is not None:
            self._relayed.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self.state = CLOSED
        self._services.connections.discard(self)
        self._services.surplus.pop(self, None)
        relayed, self._relayed = self._relayed, None
        if relayed is not None:
            relayed.stop_relay()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    # --- time

    def check_idle(self, now: float) -> None:
        """Called now and then: ends connections that read, idle, stall or linger for too long."""
        config = self._services.config
        age = now - self.since
        if self._has_stalled(now) or (self.state is LINGER and age > LINGER_S):
            self.transport.abort()
        elif self.state is BODY:
            self._rate = self._rate or UploadRate(self.since)
            too_slow = self._rate.is_below(config.min_upload_bytes_per_s, now, self._body_size)
            if age > config.request_read_timeout_s or too_slow:
                self._refuse(ProxyError(408, "The request did not arrive in time."))
        elif self.state is HEAD and self._head_bytes:
            if age > config.header_read_timeout_s:
                self._refuse(ProxyError(408, "The request's head did not arrive in time."))
        elif self.state is HEAD and age > config.client_keepalive_s:
            self.transport.close()

    def _has_stalled(self, now: float) -> bool:
        waiting = self.transport.get_write_buffer_size() if self._stall is not None else 0
        limit_s = self._services.config.client_write_timeout_s
        return self._stall is not None and self._stall.is_longer(limit_s, now, waiting)

    def close_if_idle(self) -> None:
        if self.state is HEAD and not self._head_bytes:
            self.transport.close()


def _too_many() -> ProxyError:
    return ProxyError(
        503, "Too many connections are open (--max-connections).", error_type="ServiceUnavailableError", retry_after_s=1
    )
