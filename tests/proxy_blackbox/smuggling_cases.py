"""Requests that two HTTP readers could understand differently, by name, and how each must be refused.

`{line}` is the request line without its version, `{body}` a valid JSON body, `{size}` its length; `GET` routes get the
same heads. A case has the statuses that are right for it.
"""

from __future__ import annotations

_CHUNKED = b"{line} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
_BEGIN = b"{line} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
_SECOND = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"


def _field(line: bytes, rest: bytes = b"Content-Length: {size}\r\n\r\n{body}") -> bytes:
    return _BEGIN + line + b"\r\n" + rest


HEADS: dict[str, tuple[bytes, set[int]]] = {
    # where the body ends
    "length, then chunked": (
        _field(b"Content-Length: 4", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + _SECOND),
        {400},
    ),
    "chunked, then length": (
        _field(b"Transfer-Encoding: chunked", b"Content-Length: 4\r\n\r\n0\r\n\r\n" + _SECOND),
        {400},
    ),
    "two lengths that differ": (_field(b"Content-Length: 0"), {400}),
    "two lengths that agree": (_field(b"Content-Length: {size}"), {400}),
    "a list of lengths": (_field(b"Content-Length: {size}, {size}", b"\r\n{body}"), {400}),
    "a list of lengths that begins late": (_field(b"Content-Length:  5 ,5", b"\r\n{body}"), {400}),
    "a length with a sign": (_field(b"Content-Length: +{size}", b"\r\n{body}"), {400}),
    "a negative length": (_field(b"Content-Length: -1", b"\r\n{body}"), {400}),
    "a hexadecimal length": (_field(b"Content-Length: 0x5", b"\r\n{body}"), {400}),
    "a length in words": (_field(b"Content-Length: five", b"\r\n{body}"), {400}),
    "a length with an underscore": (_field(b"Content-Length: 1_0", b"\r\n{body}"), {400}),
    "a length in other digits": (_field("Content-Length: ٥".encode(), b"\r\n{body}"), {400}),
    "an empty length": (_field(b"Content-Length: ", b"\r\n{body}"), {400}),
    "a length with a decimal point": (_field(b"Content-Length: 5.0", b"\r\n{body}"), {400}),
    "a length beyond 64 bits": (_field(b"Content-Length: 18446744073709551616", b"\r\n{body}"), {400}),
    "a length far beyond 64 bits": (_field(b"Content-Length: " + b"9" * 60, b"\r\n{body}"), {400}),
    "a length over the limit": (_field(b"Content-Length: 999999999999", b"\r\n{body}"), {413}),
    "a coding before chunked": (_field(b"Transfer-Encoding: gzip, chunked", b"\r\n0\r\n\r\n"), {400, 501}),
    "chunked not last": (_field(b"Transfer-Encoding: chunked, gzip", b"\r\n0\r\n\r\n"), {400}),
    "chunked twice": (_field(b"Transfer-Encoding: chunked, chunked", b"\r\n0\r\n\r\n"), {400, 501}),
    "two codings, two lines": (
        _field(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", b"\r\n0\r\n\r\n"),
        {400},
    ),
    "two codings, chunked last": (
        _field(b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked", b"\r\n0\r\n\r\n"),
        {400},
    ),
    "identity": (_field(b"Transfer-Encoding: identity", b"Content-Length: {size}\r\n\r\n{body}"), {400}),
    "an unknown coding": (_field(b"Transfer-Encoding: xchunked", b"\r\n0\r\n\r\n"), {400}),
    "chunked in quotes": (_field(b'Transfer-Encoding: "chunked"', b"\r\n0\r\n\r\n"), {400}),
    "chunked with a parameter": (_field(b"Transfer-Encoding: chunked;q=1", b"\r\n0\r\n\r\n"), {400}),
    "chunked after a vertical tab": (_field(b"Transfer-Encoding: \x0bchunked", b"\r\n0\r\n\r\n"), {400}),
    "chunked on a folded line": (_field(b"Transfer-Encoding:\r\n chunked", b"\r\n0\r\n\r\n"), {400}),
    "chunked after a NUL": (_field(b"Transfer-Encoding: \x00chunked", b"\r\n0\r\n\r\n"), {400}),
    "an empty coding": (_field(b"Transfer-Encoding: ", b"\r\n0\r\n\r\n"), {400}),
    "a blank before the colon of the coding": (_field(b"Transfer-Encoding : chunked", b"\r\n0\r\n\r\n"), {400}),
    "a tab before the colon of the length": (_field(b"Content-Length\t: 2", b"\r\n{body}"), {400}),
    "a coding in HTTP/1.0": (b"{line} HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", {400}),
    # lines
    "bare line feeds": (b"{line} HTTP/1.1\nHost: a\nContent-Length: {size}\n\n{body}", {400}),
    "a bare line feed after the request line": (
        b"{line} HTTP/1.1\nHost: a\r\nContent-Length: {size}\r\n\r\n{body}",
        {400},
    ),
    "a bare line feed after a field": (_BEGIN + b"A: b\nContent-Length: {size}\r\n\r\n{body}", {400}),
    "a bare line feed as the end": (_field(b"Content-Length: {size}", b"\n{body}"), {400}),
    "bare carriage returns": (b"{line} HTTP/1.1\rHost: a\rContent-Length: {size}\r\r{body}\r\n\r\n", {400}),
    "a bare carriage return in a value": (_field(b"A: b\rContent-Length: 0"), {400}),
    "a carriage return too many": (_field(b"A: b\r"), {400}),
    "a folded field": (_field(b"A: b\r\n c"), {400}),
    "a field folded by a tab": (_field(b"A: b\r\n\tTransfer-Encoding: chunked"), {400}),
    "a first field that is folded": (b"{line} HTTP/1.1\r\n Host: a\r\n\r\n", {400}),
    "a line without a colon": (_field(b"nothing"), {400}),
    "a field without a name": (_field(b": v"), {400}),
    "a field whose name has a blank": (_field(b"A B: v"), {400}),
    "a field whose name has a parenthesis": (_field(b"A(: v"), {400}),
    "a field whose name is not ASCII": (_field(b"\xc3\xa4: v"), {400}),
    "a NUL in a value": (_field(b"A: b\x00c"), {400}),
    "a NUL in a name": (_field(b"A\x00: b"), {400}),
    "an escape in a value": (_field(b"A: \x1b[0m"), {400}),
    "a DEL in a value": (_field(b"A: \x7f"), {400}),
    "a bare line feed before the request": (
        b"\n{line} HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n{body}",
        {400},
    ),
    # Host
    "no Host": (b"{line} HTTP/1.1\r\nContent-Length: {size}\r\n\r\n{body}", {400}),
    "two Hosts": (_field(b"Host: b"), {400}),
    "two Hosts that agree": (_field(b"host: a"), {400}),
    "a Host with a blank": (b"{line} HTTP/1.1\r\nHost: a b\r\nContent-Length: {size}\r\n\r\n{body}", {400}),
    "a Host with a path": (b"{line} HTTP/1.1\r\nHost: a/b\r\nContent-Length: {size}\r\n\r\n{body}", {400}),
    "a Host with a user": (b"{line} HTTP/1.1\r\nHost: a@b\r\nContent-Length: {size}\r\n\r\n{body}", {400}),
    # the request line
    "two blanks after the target": (b"{line}  HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n{body}", {400}),
    "a blank in the target": (b"{line} x HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n{body}", {400}),
    "a tab before the version": (b"{line}\tHTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n{body}", {400}),
    "a blank after the version": (b"{line} HTTP/1.1 \r\nHost: a\r\nContent-Length: {size}\r\n\r\n{body}", {400}),
    "a fragment": (b"{line}#f HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n{body}", {400}),
    "a NUL in the target": (b"{line}\x00 HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n{body}", {400}),
    "a target that is not ASCII": (b"{line}\xff HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n{body}", {400}),
    "HTTP/0.9": (b"{line}\r\n\r\n", {400, 505}),
    "HTTP/0.9 by its name": (b"{line} HTTP/0.9\r\nHost: a\r\n\r\n", {400, 505}),
    "HTTP/1.2": (b"{line} HTTP/1.2\r\nHost: a\r\n\r\n", {505}),
    "HTTP/2.0": (b"{line} HTTP/2.0\r\nHost: a\r\n\r\n", {505}),
    "HTTP/1.10": (b"{line} HTTP/1.10\r\nHost: a\r\n\r\n", {400, 505}),
    "http/1.1": (b"{line} http/1.1\r\nHost: a\r\n\r\n", {400, 505}),
    "another protocol": (b"{line} RTSP/1.0\r\nHost: a\r\n\r\n", {400, 505}),
    "no version": (b"{line} HTTP/\r\nHost: a\r\n\r\n", {400, 505}),
    "another expectation": (_field(b"Expect: 200-maybe"), {417}),
    # limits
    "too many fields": (_field(b"\r\n".join(b"A%d: b" % i for i in range(101))), {431}),
    "a head without end": (_BEGIN + b"A: " + b"a" * 70_000, {431}),
}
BODIES: dict[str, tuple[bytes, set[int]]] = {
    "a size that is no number": (_CHUNKED + b"zz\r\n{body}\r\n0\r\n\r\n", {400}),
    "an empty size": (_CHUNKED + b"\r\n{body}\r\n0\r\n\r\n", {400}),
    "a negative size": (_CHUNKED + b"-5\r\n{body}\r\n0\r\n\r\n", {400}),
    "a size with a sign": (_CHUNKED + b"+5\r\n{body}\r\n0\r\n\r\n", {400}),
    "a size with 0x": (_CHUNKED + b"0x5\r\n{body}\r\n0\r\n\r\n", {400}),
    "a size after a blank": (_CHUNKED + b" {hex}\r\n{body}\r\n0\r\n\r\n", {400}),
    "a size before a blank": (_CHUNKED + b"{hex} \r\n{body}\r\n0\r\n\r\n", {400}),
    "a size with an underscore": (_CHUNKED + b"0_5\r\n{body}\r\n0\r\n\r\n", {400}),
    "a size beyond 64 bits": (_CHUNKED + b"10000000000000005\r\n{body}\r\n0\r\n\r\n", {400}),
    "a size of 100 digits": (_CHUNKED + b"0" * 99 + b"5\r\n{body}\r\n0\r\n\r\n", {400}),
    "a size line without end": (_CHUNKED + b"5;" + b"a" * 70_000, {400}),
    "a size that ends in a bare line feed": (_CHUNKED + b"{hex}\n{body}\r\n0\r\n\r\n", {400}),
    "a size that ends in a bare carriage return": (_CHUNKED + b"{hex}\r{body}\r\n0\r\n\r\n", {400}),
    "a carriage return in an extension": (_CHUNKED + b"{hex};a\rb\r\n{body}\r\n0\r\n\r\n", {400}),
    "a bare line feed in an extension": (_CHUNKED + b"{hex};a\nb\r\n{body}\r\n0\r\n\r\n", {400}),
    "a NUL in an extension": (_CHUNKED + b"{hex};\x00\r\n{body}\r\n0\r\n\r\n", {400}),
    "a chunk longer than its size": (_CHUNKED + b"2\r\n{body}\r\n0\r\n\r\n", {400}),
    "a chunk without its end": (_CHUNKED + b"{hex}\r\n{body}0\r\n\r\n\r\n\r\n\r\n", {400}),
    "a chunk that ends in a bare line feed": (_CHUNKED + b"{hex}\r\n{body}\n0\r\n\r\n", {400}),
    "a last chunk that ends in a bare line feed": (_CHUNKED + b"{hex}\r\n{body}\r\n0\n\n", {400}),
    "a trailer without a colon": (_CHUNKED + b"{hex}\r\n{body}\r\n0\r\nnothing\r\n\r\n", {400}),
    "a trailer that is folded": (_CHUNKED + b"{hex}\r\n{body}\r\n0\r\nA: b\r\n c\r\n\r\n", {400}),
    "a trailer with a NUL": (_CHUNKED + b"{hex}\r\n{body}\r\n0\r\nA: \x00\r\n\r\n", {400}),
    "trailers without end": (
        _CHUNKED + b"{hex}\r\n{body}\r\n0\r\n" + b"A: bbbbbbbbbbbbbbbbbbbbbbbbbb\r\n" * 2000,
        {400},
    ),
    "extensions without end": (_CHUNKED + b"1;aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n \r\n" * 2000, {400}),
}


def filled(case: bytes, line: bytes, body: bytes) -> bytes:
    for name, value in ((b"line", line), (b"size", b"%d" % len(body)), (b"hex", b"%x" % len(body)), (b"body", body)):
        case = case.replace(b"{%b}" % name, value)
    return case
