"""Trace context (W3C Trace Context, level 2): a client's `traceparent` is kept, one that is not valid is replaced.

The proxy records no spans, so the ids go through as they are: a span of its own would be a parent nobody can find.
"""

from __future__ import annotations

import random
import re

# version, trace id, parent id, flags; what a later version than 00 has behind them is not ours to read
_FORM = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32}-[0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_NO_TRACE, _NO_PARENT = b"0" * 32, b"0" * 16


def kept(value: bytes) -> bytes:
    """The client's, as version 00, or nothing if it is not valid."""
    found = _FORM.fullmatch(value)
    if found is None:
        return b""
    version, ids, flags, more = found.groups()
    if version == b"ff" or ids.startswith(_NO_TRACE) or ids.endswith(_NO_PARENT) or (version == b"00" and more):
        return b""
    if version == b"00":
        return value
    return b"00-%b-0%d" % (ids, int(flags, 16) & 1)


def made() -> bytes:
    """A new trace, sampled. Its ids are no secrets: they have to differ, and to be spread evenly for who samples."""
    ids = random.randbytes(24).hex()
    return f"00-{ids[:32]}-{ids[32:]}-01".encode()
