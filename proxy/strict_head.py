"""What llhttp lets pass, or lets pass in some of its versions, and two HTTP readers might understand differently.

One look at the bytes of a complete head, in a few passes over them that are all C.
"""

from __future__ import annotations

from proxy.errors import BadHead

_CONTROLS = bytes([*(one for one in range(32) if one not in b"\t\r\n"), 127])
_VERSIONS = (b" HTTP/1.1", b" HTTP/1.0")


def check_head(raw: bytes, max_fields: int) -> None:
    """`raw` is a request head with the empty line that ends it. Raises BadHead."""
    num_lines = raw.count(b"\r\n")
    if raw.count(b"\n") != num_lines or raw.count(b"\r") != num_lines:
        raise BadHead("Malformed HTTP request: a line does not end in CRLF.")
    if num_lines - 2 > max_fields:
        raise BadHead(f"The request has more than {max_fields} header fields (--max-header-fields).", 431)
    if len(raw.translate(None, _CONTROLS)) != len(raw):
        raise BadHead("Malformed HTTP request: a control character in the head.")
    if b"\r\n " in raw or b"\r\n\t" in raw:
        raise BadHead("Malformed HTTP request: a folded header line.")
    first = raw[: raw.find(b"\r\n")]
    if first.count(b" ") != 2 or first[-9:] not in _VERSIONS or b"\t" in first or b"#" in first:
        raise BadHead("Malformed HTTP request: not METHOD TARGET HTTP/1.1.")
