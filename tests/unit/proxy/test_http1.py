"""Heads and framing, fed split at every byte and glued together."""

from __future__ import annotations

import re

import pytest

from proxy import http1
from proxy.chunked_body import ChunkDecoder
from proxy.errors import BadHead
from proxy.http1 import RequestHead, ResponseHead

TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
HEAD = (
    b"POST /v1/completions?a=b HTTP/1.1\r\nHost: x:1\r\nAccept-Encoding: gzip\r\nX-Request-Id: abc-1\r\n"
    b"Authorization: Bearer k\r\nConnection: keep-alive, X-Secret\r\nX-Secret: 1\r\nTraceparent: " + TRACE + b"\r\n"
    b"Content-Length: 12\r\nExpect: 100-continue\r\nTE: trailers\r\n\r\n"
)


def read_head(*pieces: bytes) -> RequestHead:
    head = RequestHead()
    for piece in pieces:
        head.feed(piece)
    return head


@pytest.mark.parametrize("cut", range(len(HEAD)))
def test_a_request_head_is_the_same_however_it_is_split(cut: int) -> None:
    head = read_head(HEAD[:cut], HEAD[cut:])
    assert head.complete
    assert (head.method, head.path, head.query) == (b"POST", b"/v1/completions", b"a=b")
    assert head.request_id == "abc-1"
    assert head.content_length == 12
    assert head.expects_continue and head.keep_alive and head.authorization
    assert head.forwarded == b"traceparent: " + TRACE + b"\r\nAuthorization: Bearer k\r\n"


def head_with(*lines: bytes) -> RequestHead:
    return read_head(b"\r\n".join([b"GET /x HTTP/1.1", b"Host: x", *lines, b"", b""]))


@pytest.mark.parametrize("lines", [
    [], [b"traceparent: 00-1"], [b"traceparent: " + TRACE.upper()],
    [b"traceparent: " + TRACE, b"Traceparent: " + TRACE],
], ids=["none", "malformed", "upper case", "two"])  # fmt: skip
def test_a_trace_is_made_where_there_is_no_valid_one(lines: list[bytes]) -> None:
    """What a vendor says in `tracestate` belongs to the trace that is given up (W3C Trace Context, section 3.2)."""
    head = head_with(*lines, b"tracestate: a=b")
    found = re.fullmatch(rb"traceparent: (00-[0-9a-f]{32}-[0-9a-f]{16}-01)\r\n", head.forwarded)
    assert found is not None and found[1] != TRACE
    assert head.id_lines("r") == b"X-Request-Id: r\r\n" + found[0]
    assert head_with().traceparent != head_with().traceparent


def test_a_valid_trace_is_kept() -> None:
    head = head_with(b"TraceParent: " + TRACE, b"tracestate: a=b", b"Tracestate: c=d")
    assert head.forwarded == b"traceparent: " + TRACE + b"\r\ntracestate: a=b\r\ntracestate: c=d\r\n"


def test_a_head_byte_by_byte() -> None:
    head = read_head(*[HEAD[i : i + 1] for i in range(len(HEAD))])
    assert head.complete and head.path == b"/v1/completions"


def test_the_absolute_form_is_understood() -> None:
    head = read_head(b"POST http://x:1/v1/completions?q=1 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (head.path, head.query, head.target) == (b"/v1/completions", b"q=1", b"/v1/completions?q=1")


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x16\x03\x01\x02\x00", 400),
        (b"POST / HTTP/1.1\nHost: x\n\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nA: b\r\n folded\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nA: b\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ],
)
def test_a_bad_head_is_refused(raw: bytes, status: int) -> None:
    with pytest.raises(BadHead) as caught:
        read_head(raw)
    assert caught.value.status == status


@pytest.mark.parametrize("value", [b"", b"a b", b"\xff", b"x" * 257, b"a\x01"])
def test_a_request_id_that_cannot_be_passed_on_is_replaced(value: bytes) -> None:
    assert http1.clean_request_id(value) is None


def test_http_1_0_does_not_keep_alive() -> None:
    assert not read_head(b"GET / HTTP/1.0\r\n\r\n").keep_alive


BODY = b"5;ext=1\r\nhello\r\nA\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\nPOST "


@pytest.mark.parametrize("cut", range(len(BODY)))
def test_a_chunked_body_is_the_same_however_it_is_split(cut: int) -> None:
    decoder = ChunkDecoder()
    pieces, used = decoder.feed(BODY[:cut])
    assert used == min(cut, len(BODY) - 5)
    if not decoder.complete:
        more, also = decoder.feed(BODY[cut:])
        pieces += more
        used += also
    assert decoder.complete
    assert b"".join(pieces) == b"hello0123456789"
    assert BODY[used:] == b"POST "


@pytest.mark.parametrize(
    "raw", [b"5\nhello\r\n", b"x\r\n", b"\r\n", b"-1\r\n", b"5\r\nhello!\r\n", b"f" * 16 + b"\r\n", b"1" * 5000]
)
def test_a_bad_chunk_is_refused(raw: bytes) -> None:
    with pytest.raises(BadHead):
        ChunkDecoder().feed(raw)


def test_dechunk_takes_a_beginning() -> None:
    assert http1.dechunk(b"3\r\nabc\r\n5\r\nhe") == b"abche"


def test_a_response_head_is_rebuilt_without_what_is_not_for_the_client() -> None:
    head = ResponseHead()
    head.status = 200
    for name, value in [
        (b"Content-Type", b"text/event-stream; charset=utf-8"),
        (b"Connection", b"keep-alive"),
        (b"X-Request-Id", b"theirs"),
        (b"traceparent", b"theirs"),
        (b"Transfer-Encoding", b"chunked"),
        (b"X-Mine", b"1"),
    ]:
        head.add(name, value)
    assert head.event_stream and head.chunked
    assert head.rebuilt(b"X-Request-Id: ours\r\n", http1.CHUNKED_LINE, True) == (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nX-Mine: 1\r\n"
        b"Transfer-Encoding: chunked\r\nX-Request-Id: ours\r\nConnection: close\r\n\r\n"
    )


def test_a_simple_response_says_when_to_come_back() -> None:
    raw = http1.simple_response(503, b"{}", id_lines=b"X-Request-Id: r\r\n", close=True, retry_after_s=2)
    assert raw.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"\r\nRetry-After: 2\r\n" in raw and raw.endswith(b"\r\n\r\n{}")
