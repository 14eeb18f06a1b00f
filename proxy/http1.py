"""HTTP/1.1 heads and framing, without I/O.

House rules: a head is parsed by llhttp (httptools) in its strict mode and never by a second, more lenient reader;
what is passed on is rebuilt from what was parsed, so that there is nothing two parsers could read differently. The
end of a message comes from its framing (RFC 9112 section 6), never from how its bytes end.
"""

from __future__ import annotations

import http
from typing import Protocol

import httptools

from proxy.errors import BadHead

HEAD_END = b"\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
MAX_REQUEST_ID_CHARS = 256
MAX_CHUNK_LINE_BYTES = 4096

# Never passed on to an instance: hop-by-hop fields (RFC 9110 section 7.6.1), what we set ourselves, what is said to us
# (X-Server-Timing), and Accept-Encoding, because an answer has to be looked into until its first event.
NOT_FORWARDED = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer upgrade "
    b"transfer-encoding content-length host expect accept-encoding x-server-timing".split()
)
NOT_RETURNED = frozenset(b"connection keep-alive proxy-connection upgrade trailer x-request-id".split())


def status_line(status: int) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unknown"
    return f"HTTP/1.1 {status} {phrase}\r\n".encode("latin-1")


class RequestHead:
    """One request's head, filled by llhttp's callbacks. `forwarded` is the header block an instance gets."""

    __slots__ = (
        "_parser",
        "authorization",
        "chunked",
        "complete",
        "connection_tokens",
        "content_encoding",
        "content_length",
        "expects_continue",
        "host_seen",
        "keep_alive",
        "lines",
        "method",
        "path",
        "query",
        "request_id",
        "server_timing",
        "target",
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
        self.content_encoding = b""
        self.chunked = False
        self.expects_continue = False
        self.authorization = False
        self.host_seen = False
        self.request_id: str | None = None
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
            raise (cause if isinstance(cause, BadHead) else BadHead(f"Malformed HTTP request: {error}")) from None
        if self.complete:
            self._parser = None  # it holds our methods: a cycle a request would be work for the garbage collector

    # llhttp's callbacks
    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower not in NOT_FORWARDED:
            if lower == b"x-request-id":
                self.request_id = clean_request_id(value)
                return
            if lower == b"authorization":
                self.authorization = True
            elif lower == b"content-encoding":
                self.content_encoding = value.lower()
            self.lines.append(b"%b: %b\r\n" % (name, value))
        elif lower == b"content-length":
            self.content_length = int(value)
        elif lower == b"transfer-encoding":
            if value.lower() != b"chunked":
                raise BadHead("Only Transfer-Encoding: chunked is understood.", 501)
            self.chunked = True
        elif lower == b"connection":
            self.connection_tokens += b"," + value.lower()
        elif lower == b"host":
            self.host_seen = True
        elif lower == b"expect" and value.lower() == b"100-continue":
            self.expects_continue = True
        elif lower == b"x-server-timing":
            self.server_timing = int(value not in (b"", b"0"))

    def on_headers_complete(self) -> None:
        self.complete = True
        parser = self._parser
        assert parser is not None
        self.method = parser.get_method()
        self.version = parser.get_http_version()
        self.keep_alive = parser.should_keep_alive()  # only here: with the message's end the parser forgets
        target = self.target
        if not target.startswith(b"/"):  # absolute form (RFC 9112 section 3.2.2)
            try:
                parsed = httptools.parse_url(target)
            except httptools.HttpParserInvalidURLError:
                raise BadHead("Malformed request target.") from None
            target = (parsed.path or b"/") + (b"?" + parsed.query if parsed.query else b"")
            self.target = target
        self.path, _, self.query = target.partition(b"?")
        if self.version not in ("1.1", "1.0"):
            raise BadHead("Only HTTP/1.1 and HTTP/1.0 are spoken here.", 505)
        if self.version == "1.1" and not self.host_seen:
            raise BadHead("The Host header is missing.")
        if self.version == "1.0" and self.chunked:
            raise BadHead("Transfer-Encoding does not exist in HTTP/1.0.")

    @property
    def forwarded(self) -> bytes:
        """The header lines to pass on, each ended by CRLF, without what `Connection` names."""
        lines = self.lines
        if self.connection_tokens and self.connection_tokens not in (b",close", b",keep-alive"):
            named = {token.strip() for token in self.connection_tokens.split(b",")}
            lines = [line for line in lines if line.partition(b":")[0].lower() not in named]
        return b"".join(lines)


def clean_request_id(value: bytes) -> str | None:
    """The client's request id if it may be used as one (printable ASCII without blanks, bounded), else None."""
    if not 0 < len(value) <= MAX_REQUEST_ID_CHARS or not value.isascii():
        return None
    text = value.decode("ascii")
    return text if text.isprintable() and " " not in text else None


# What a response field is to us, by its name as the engine spells it: engines send the same few again and again.
_ORDINARY, _CONTENT_LENGTH, _TRANSFER_ENCODING, _DROPPED, _CONTENT_TYPE = range(5)
_SPECIAL: dict[bytes, int] = {}
_MAX_KNOWN_NAMES = 1000


def _classify(name: bytes) -> int:
    lower = name.lower()
    special = {b"content-length": _CONTENT_LENGTH, b"transfer-encoding": _TRANSFER_ENCODING}.get(lower, _ORDINARY)
    if lower in NOT_RETURNED:
        special = _DROPPED
    elif lower == b"content-type":
        special = _CONTENT_TYPE
    if len(_SPECIAL) < _MAX_KNOWN_NAMES:
        _SPECIAL[name] = special
    return special


class ResponseHead:
    """One response's head: `status`, the fields that may be returned, and how the body is framed."""

    __slots__ = ("chunked", "close_delimited", "content_length", "event_stream", "fields", "keep_alive", "status")

    def __init__(self) -> None:
        self.status = 0
        self.fields: list[tuple[bytes, bytes]] = []
        self.content_length: int | None = None
        self.chunked = False
        self.close_delimited = False
        self.event_stream = False
        self.keep_alive = True

    def add(self, name: bytes, value: bytes) -> None:
        special = _SPECIAL.get(name)
        if special is None:
            special = _classify(name)
        if special:
            if special == _CONTENT_LENGTH:
                self.content_length = int(value)
                return
            if special == _TRANSFER_ENCODING:
                self.chunked = value.lower().endswith(b"chunked")
                return
            if special == _DROPPED:
                return
            self.event_stream = value[:17].lower() == b"text/event-stream"
        self.fields.append((name, value))

    def rebuilt(self, request_id: str, framing: bytes, close: bool) -> bytes:
        """The head for the client. `framing` is its Transfer-Encoding or Content-Length line, CRLF included."""
        return b"%b%b%bX-Request-Id: %b\r\n%b\r\n" % (
            _STATUS_200 if self.status == 200 else status_line(self.status),
            b"".join([b"%b: %b\r\n" % field for field in self.fields]),
            framing,
            request_id.encode("ascii"),
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
    request_id: str = "",
    close: bool = False,
    retry_after_s: int | None = None,
    more_lines: bytes = b"",
) -> bytes:
    """A whole JSON answer of our own."""
    lines = [status_line(status), b"Content-Type: application/json\r\n", content_length_line(len(body))]
    if request_id:
        lines.append(b"X-Request-Id: %b\r\n" % request_id.encode("ascii"))
    if retry_after_s is not None:
        lines.append(b"Retry-After: %d\r\n" % retry_after_s)
    if close:
        lines.append(b"Connection: close\r\n")
    return b"".join([*lines, more_lines, b"\r\n", body])


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


class ChunkDecoder:
    """A chunked body (RFC 9112 section 7.1), fed in any pieces. Strict: CRLF only, hexadecimal sizes, bounded lines."""

    __slots__ = ("_line", "_remaining", "_state", "complete")

    def __init__(self) -> None:
        self._line = bytearray()
        self._remaining = 0
        self._state = "size"
        self.complete = False

    @property
    def between_chunks(self) -> bool:
        return self._state == "size" and not self._line

    def feed(self, data: bytes) -> tuple[list[bytes], int]:
        """Return the payload pieces in `data` and how many of its bytes belong to this body. Raises BadHead."""
        pieces: list[bytes] = []
        at, end = 0, len(data)
        while at < end and not self.complete:
            if self._state == "payload":
                take = min(self._remaining, end - at)
                pieces.append(data[at : at + take])
                at += take
                self._remaining -= take
                if not self._remaining:
                    self._state = "payload_end"
            else:
                newline = data.find(b"\n", at)
                stop = end if newline < 0 else newline + 1
                self._line += data[at:stop]
                at = stop
                if len(self._line) > MAX_CHUNK_LINE_BYTES:
                    raise BadHead("A line of the chunked body is too long.")
                if newline >= 0:
                    line, self._line = bytes(self._line), bytearray()
                    self._end_line(line)
        return pieces, at

    def _end_line(self, line: bytes) -> None:
        if not line.endswith(b"\r\n"):
            raise BadHead("A line of the chunked body does not end in CRLF.")
        text = line[:-2]
        if self._state == "size":
            digits = text.partition(b";")[0].rstrip(b" \t")
            if not digits or len(digits) > 15 or digits.strip(b"0123456789abcdefABCDEF"):
                raise BadHead("A chunk size is not hexadecimal.")
            self._remaining = int(digits, 16)
            self._state = "payload" if self._remaining else "trailer"
        elif self._state == "payload_end":
            if text:
                raise BadHead("A chunk is longer than its size says.")
            self._state = "size"
        elif not text:  # the empty line that ends the trailer section; trailers themselves are dropped
            self.complete = True


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
