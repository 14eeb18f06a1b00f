"""The least HTTP/1.1 server that a mock engine needs: one request at a time a connection, answers written by hand."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, cast

import httptools
import orjson

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"x-mock: stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
LAST_CHUNK = b"0\r\n\r\n"
_LINGER_ZERO = struct.pack("ii", 1, 0)


@dataclass(slots=True)
class Request:
    method: str
    target: str
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def request_id(self) -> str:
        return self.headers.get(b"x-request-id", b"").decode()


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def json_response(status: int, body: bytes, content_type: str = "application/json") -> bytes:
    return b"HTTP/1.1 %d %b\r\nserver: mock\r\ncontent-type: %b\r\nx-mock: json\r\ncontent-length: %d\r\n\r\n%b" % (
        status,
        HTTPStatus(status).phrase.encode(),
        content_type.encode(),
        len(body),
        body,
    )


def error_object(status: int, message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def error_response(status: int, message: str, kind: str = "mock_error") -> bytes:
    return json_response(status, orjson.dumps(error_object(status, message, kind)))


Handler = Callable[["Connection", Request], None]


@dataclass(eq=False)
class Connection(asyncio.Protocol):
    """`handler` is called with each whole request; it answers by `send`, now or later, then calls `done`."""

    handler: Handler
    connections: set[Connection]
    on_violation: Callable[[str], None]
    transport: asyncio.Transport | None = None
    busy: bool = False
    paused: bool = False
    on_lost: Callable[[], None] | None = None
    on_resumed: Callable[[], None] | None = None
    _target: bytes = b""
    _headers: dict[bytes, bytes] = field(default_factory=dict)
    _body: list[bytes] = field(default_factory=list)
    _waiting: list[Request] = field(default_factory=list)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        self.connections.add(self)
        self._parser = httptools.HttpRequestParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.connections.discard(self)
        if self.on_lost is not None:
            callback, self.on_lost = self.on_lost, None
            callback()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.on_violation(f"http: {error}")
            self.reset()

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._headers.get(b"expect", b"").lower() == b"100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        method = self._parser.get_method().decode()
        request = Request(method, self._target.decode("latin-1"), self._headers, b"".join(self._body))
        self._target, self._headers, self._body = b"", {}, []
        if self.busy:
            self._waiting.append(request)
            return
        self.busy = True
        self.handler(self, request)

    def done(self) -> None:
        """The answer is written: the next request of this connection may come."""
        self.on_lost = self.on_resumed = None
        self.busy = False
        if self._waiting and self.transport is not None:
            self.busy = True
            self.handler(self, self._waiting.pop(0))

    @property
    def gone(self) -> bool:
        """Whether the peer has closed: what is written now reaches nobody, and a careful engine takes its KV back."""
        return self.transport is None or self.transport.is_closing()

    def send(self, payload: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(payload)

    def answer(self, payload: bytes) -> None:
        self.send(payload)
        self.done()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.on_resumed is not None:
            callback, self.on_resumed = self.on_resumed, None
            callback()

    def reset(self) -> None:
        """End as a killed process does: the peer gets RST."""
        if self.transport is not None:
            raw = self.transport.get_extra_info("socket")
            if raw is not None:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            self.transport.abort()

    def close(self) -> None:
        """End by FIN, after what was written."""
        if self.transport is not None:
            self.transport.close()
