"""HTTP/1.1 heads and framing, without I/O.

House rules: a head is parsed by llhttp (httptools) in its strict mode and never by a second, more lenient reader;
what is passed on is rebuilt from what was parsed, so that there is nothing two parsers could read differently. The
end of a message comes from its framing (RFC 9112 section 6), never from how its bytes end.
"""

from __future__ import annotations

import http
from typing import Protocol

import httptools

from proxy import trace
from proxy.chunked_body import ChunkDecoder
from proxy.errors import BadHead
from proxy.request_fields import (
    API_KEY,
    AUTHORIZATION,
    CODING,
    CONNECTION,
    CONTENT_CODING,
    HOST,
    KIND_OF,
    LENGTH,
    NOT_PASSED,
    PASSED,
    REQUEST_ID,
    SERVER_TIMING,
    TRACEPARENT,
    TRACESTATE,
    kind_of,
)

HEAD_END = b"\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
MAX_REQUEST_ID_CHARS = 256

NOT_RETURNED = frozenset(b"keep-alive proxy-connection upgrade trailer x-request-id traceparent".split())
_HOST_CHARS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~!$&'()*+,;=%:[]"
_MAX_KNOWN_NAMES = 1000


def status_line(status: int) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unknown"
    return f"HTTP/1.1 {status} {phrase}\r\n".encode("latin-1")


class RequestHead:
    """One request's head, filled by llhttp's callbacks.

    `forwarded` is the header block an instance gets, `identity` what tells the sender from others."""

    __slots__ = (
        "_parser",
        "api_key",
        "authorization",
        "chunked",
        "complete",
        "connection_tokens",
        "content_encoding",
        "content_length",
        "expects_continue",
        "has_length",
        "host_seen",
        "identity",
        "keep_alive",
        "lines",
        "method",
        "path",
        "query",
        "request_id",
        "server_timing",
        "target",
        "traceparent",
        "tracestate",
        "version",
    )

    def __init__(self) -> None:
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self.target = b""
        self.path = b""
        self.query = b""
        self.method = b""
        self.version = "1.1"
        self.lines: list[bytes] = []
        self.connection_tokens = b""
        self.content_length = 0
        self.has_length = False
        self.content_encoding = b""
        self.chunked = False
        self.expects_continue = False
        self.authorization: bytes | None = None
        self.api_key: bytes | None = None
        self.identity = b""
        self.host_seen = False
        self.request_id: str | None = None
        self.traceparent: bytes | None = None
        """The client's; if that is not valid, one of ours, as soon as the head is complete."""
        self.tracestate = b""
        self.server_timing = 0
        """How much of it is told: what the client asked for, and then what it gets (`server_timing.py`)."""
        self.keep_alive = False
        self.complete = False

    def feed(self, data: bytes) -> None:
        """Feed bytes of the head, never a byte of the body. Raises BadHead."""
        parser = self._parser
        assert parser is not None
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # the request asks for another protocol: it is ignored, as RFC 9110 section 7.8 allows
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, BadHead):
                raise cause from None
            raise BadHead(f"Malformed HTTP request: {error}", 505 if "HTTP version" in str(error) else 400) from None
        if self.complete:
            self._parser = None  # it holds our methods: a cycle a request would be work for the garbage collector

    # llhttp's callbacks
    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        kind = KIND_OF.get(name)
        if kind is None:
            kind = kind_of(name)
        if kind is PASSED:
            self.lines.append(b"%b: %b\r\n" % (name, value))
        elif kind is not NOT_PASSED:
            self._special(kind, name, value.strip(b" \t"))

    def _special(self, kind: int, name: bytes, value: bytes) -> None:
        if kind is HOST:
            if self.host_seen or value.translate(None, _HOST_CHARS):
                raise BadHead("There must be one valid Host header.")
            self.host_seen = True
        elif kind is LENGTH:
            if self.has_length or self.chunked or not value.isdigit() or len(value) > 18:
                raise BadHead("There must be one Content-Length, a number, and none beside Transfer-Encoding.")
            self.content_length = int(value)
            self.has_length = True
        elif kind is CODING:
            self._coded(value.lower())
        elif kind is REQUEST_ID:
            self.request_id = clean_request_id(value)
        elif kind is AUTHORIZATION:
            if self.authorization is not None:
                raise BadHead("There must be one Authorization header.")
            self.authorization = self.identity = value
        elif kind is API_KEY:
            if self.api_key is not None:
                raise BadHead("There must be one x-api-key header.")
            self.api_key = value
            self.identity = self.identity or value
        elif kind is CONTENT_CODING:
            self.content_encoding = value.lower()
            self.lines.append(b"%b: %b\r\n" % (name, value))
        elif kind is CONNECTION:
            self.connection_tokens += b"," + value.lower()
        elif kind is TRACEPARENT:
            self.traceparent = trace.kept(value) if self.traceparent is None else b""
        elif kind is TRACESTATE:
            self.tracestate += b"tracestate: %b\r\n" % value
        elif kind is SERVER_TIMING:
            self.server_timing = int(value not in (b"", b"0"))
        elif value.lower() == b"100-continue":
            self.expects_continue = True
        else:
            raise BadHead("Only Expect: 100-continue is understood.", 417)

    def _coded(self, value: bytes) -> None:
        if self.chunked or self.has_length:
            raise BadHead("There must be one Transfer-Encoding, and none beside Content-Length.")
        if value != b"chunked":
            ends_chunked = value.rpartition(b",")[2].strip(b" \t") == b"chunked"
            raise BadHead("Only Transfer-Encoding: chunked is understood.", 501 if ends_chunked else 400)
        self.chunked = True

    def on_headers_complete(self) -> None:
        self.complete = True
        parser = self._parser
        assert parser is not None
        self.method = parser.get_method()
        self.version = parser.get_http_version()
        self.keep_alive = parser.should_keep_alive()  # only here: with the message's end the parser forgets
        target = self.target
        if self.method == b"CONNECT":
            raise BadHead("CONNECT is not served here.", 501)
        if not target.startswith(b"/"):  # absolute form (RFC 9112 section 3.2.2)
            self.target = target = _origin_form(target)
        self.path, _, self.query = target.partition(b"?")
        if self.version not in ("1.1", "1.0"):
            raise BadHead("Only HTTP/1.1 and HTTP/1.0 are spoken here.", 505)
        if self.version == "1.1" and not self.host_seen:
            raise BadHead("The Host header is missing.")
        if self.version == "1.0" and self.chunked:
            raise BadHead("Transfer-Encoding does not exist in HTTP/1.0.")
        if not self.traceparent:
            self.traceparent, self.tracestate = trace.made(), b""

    @property
    def forwarded(self) -> bytes:
        """The header lines to pass on, each ended by CRLF, without what `Connection` names."""
        lines = [*self.lines, *self.written_anew]
        if self.connection_tokens and self.connection_tokens not in (b",close", b",keep-alive"):
            named = self.named_by_connection
            lines = [line for line in lines if line.partition(b":")[0].lower() not in named]
        return b"".join(lines)

    @property
    def written_anew(self) -> list[bytes]:
        """Header lines: the trace, and the client's own credentials, unless they were for the proxy."""
        lines = [b"traceparent: %b\r\n" % (self.traceparent or b"")]
        if self.tracestate:
            lines.append(self.tracestate)
        if self.authorization:
            lines.append(b"Authorization: %b\r\n" % self.authorization)
        if self.api_key:
            lines.append(b"X-Api-Key: %b\r\n" % self.api_key)
        return lines

    def id_lines(self, request_id: str) -> bytes:
        """What an answer returns of a request's ids."""
        return b"X-Request-Id: %b\r\ntraceparent: %b\r\n" % (request_id.encode("ascii"), self.traceparent or b"")

    @property
    def named_by_connection(self) -> set[bytes]:
        return {token.strip() for token in self.connection_tokens.split(b",")}


def _origin_form(target: bytes) -> bytes:
    try:
        parsed = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        parsed = None
    if parsed is None or (parsed.schema or b"").lower() not in (b"http", b"https") or not parsed.host:
        raise BadHead("Malformed request target.")
    return (parsed.path or b"/") + (b"?" + parsed.query if parsed.query else b"")


def clean_request_id(value: bytes) -> str | None:
    """The client's request id if it may be used as one (printable ASCII without blanks, bounded), else None.

    vLLM's P2pNcclConnector reads the addresses of both sides out of the id, so a client's must not look like that."""
    if not 0 < len(value) <= MAX_REQUEST_ID_CHARS or not value.isascii() or b"_addr_" in value:
        return None
    text = value.decode("ascii")
    return text if text.isprintable() and " " not in text else None


# What a response field is to us, by its name as the engine spells it: engines send the same few again and again.
_ORDINARY, _CONTENT_LENGTH, _TRANSFER_ENCODING, _DROPPED, _CONTENT_TYPE, _HOP = range(6)
_SPECIAL: dict[bytes, int] = {}


def _classify(name: bytes) -> int:
    lower = name.lower()
    special = {b"content-length": _CONTENT_LENGTH, b"transfer-encoding": _TRANSFER_ENCODING}.get(lower, _ORDINARY)
    if lower in NOT_RETURNED:
        special = _DROPPED
    elif lower == b"content-type":
        special = _CONTENT_TYPE
    elif lower == b"connection":
        special = _HOP
    if len(_SPECIAL) < _MAX_KNOWN_NAMES:
        _SPECIAL[name] = special
    return special


class ResponseHead:
    """One response's head: `status`, the fields that may be returned, and how the body is framed."""

    __slots__ = (
        "chunked",
        "close_delimited",
        "content_length",
        "event_stream",
        "fields",
        "keep_alive",
        "named_by_connection",
        "status",
    )

    def __init__(self) -> None:
        self.status = 0
        self.fields: list[tuple[bytes, bytes]] = []
        self.content_length: int | None = None
        self.chunked = False
        self.close_delimited = False
        self.event_stream = False
        self.keep_alive = True
        self.named_by_connection = b""

    def add(self, name: bytes, value: bytes) -> None:
        """Raises BadHead where the framing could be read in two ways."""
        special = _SPECIAL.get(name)
        if special is None:
            special = _classify(name)
        if special:
            if special == _CONTENT_LENGTH:
                if self.content_length is not None or self.chunked or not (value := value.strip(b" \t")).isdigit():
                    raise BadHead("no valid Content-Length")
                self.content_length = int(value)
                return
            if special == _TRANSFER_ENCODING:
                if value.strip(b" \t").lower() != b"chunked" or self.chunked or self.content_length is not None:
                    raise BadHead("a Transfer-Encoding other than chunked")
                self.chunked = True
                return
            if special == _DROPPED:
                return
            if special == _HOP:
                self.named_by_connection += b"," + value.lower()
                return
            self.event_stream = value[:17].lower() == b"text/event-stream"
        self.fields.append((name, value))

    def _returned(self) -> list[tuple[bytes, bytes]]:
        """The fields, without what `Connection` names."""
        if self.named_by_connection in (b"", b",close", b",keep-alive"):
            return self.fields
        named = {token.strip() for token in self.named_by_connection.split(b",")}
        return [field for field in self.fields if field[0].lower() not in named]

    def rebuilt(self, id_lines: bytes, framing: bytes, close: bool) -> bytes:
        """The head for the client. `framing` is its Transfer-Encoding or Content-Length line, CRLF included."""
        return b"%b%b%b%b%b\r\n" % (
            _STATUS_200 if self.status == 200 else status_line(self.status),
            b"".join([b"%b: %b\r\n" % field for field in self._returned()]),
            framing,
            id_lines,
            b"Connection: close\r\n" if close else b"",
        )


_STATUS_200 = status_line(200)
CHUNKED_LINE = b"Transfer-Encoding: chunked\r\n"


def content_length_line(num_bytes: int) -> bytes:
    return b"Content-Length: %d\r\n" % num_bytes


def simple_response(
    status: int,
    body: bytes,
    *,
    id_lines: bytes = b"",
    close: bool = False,
    retry_after_s: int | None = None,
    more_lines: bytes = b"",
) -> bytes:
    """A whole JSON answer of our own."""
    lines = [status_line(status), b"Content-Type: application/json\r\n", content_length_line(len(body)), id_lines]
    if retry_after_s is not None:
        lines.append(b"Retry-After: %d\r\n" % retry_after_s)
    if status == 401:
        lines.append(b"WWW-Authenticate: Bearer\r\n")
    if close:
        lines.append(b"Connection: close\r\n")
    return b"".join([*lines, more_lines, b"\r\n", body])


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def dechunk(raw: bytes) -> bytes:
    """The payload in `raw`, the beginning of a chunked body whose framing the parser has accepted already."""
    return b"".join(ChunkDecoder().feed(raw)[0])


class _Callbacks(Protocol):
    def on_message_begin(self) -> None: ...
    def on_header(self, name: bytes, value: bytes) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_message_complete(self) -> None: ...


def response_parser(callbacks: _Callbacks) -> httptools.HttpResponseParser:
    """A parser that finds where messages begin and end. It has no body callback, so it costs nothing per body byte."""
    return httptools.HttpResponseParser(callbacks)
