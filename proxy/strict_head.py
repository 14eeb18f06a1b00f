"""What llhttp lets pass, or lets pass in some of its versions, and two HTTP readers might understand differently.

One look at the bytes of a complete head, in a few passes over them that are all C.
"""

from __future__ import annotations

from proxy.errors import BadHead

_ORDINARY = bytes(one for one in range(256) if (one >= 32 and one != 127) or one == 9)
_LINE_ENDS = b"\r\n" * 256
_VERSIONS = (b" HTTP/1.1", b" HTTP/1.0")
_MAX_KNOWN_LINES, _MAX_KNOWN_BYTES = 256, 256
_known_lines: set[bytes] = set()  # request lines that were found good: clients send the same few again and again


def check_head(raw: bytes, max_fields: int) -> None:
    """`raw` is a request head with the empty line that ends it. Raises BadHead."""
    num_lines = raw.count(b"\r\n")
    others = raw.translate(None, _ORDINARY)
    if others != (_LINE_ENDS[: 2 * num_lines] if num_lines <= 256 else b"\r\n" * num_lines):
        if others.translate(None, b"\r\n"):
            raise BadHead("Malformed HTTP request: a control character in the head.")
        raise BadHead("Malformed HTTP request: a line does not end in CRLF.")
    if num_lines - 2 > max_fields:
        raise BadHead(f"The request has more than {max_fields} header fields (--max-header-fields).", 431)
    if b"\r\n " in raw or b"\r\n\t" in raw:
        raise BadHead("Malformed HTTP request: a folded header line.")
    first = raw[: raw.find(b"\r\n")]
    if first not in _known_lines:
        _check_request_line(first)
        if len(_known_lines) < _MAX_KNOWN_LINES and len(first) <= _MAX_KNOWN_BYTES:
            _known_lines.add(first)


def _check_request_line(first: bytes) -> None:
    if first.count(b" ") != 2 or first[-9:] not in _VERSIONS or b"\t" in first or b"#" in first:
        raise BadHead("Malformed HTTP request: not METHOD TARGET HTTP/1.1.")
