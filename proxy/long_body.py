"""Bodies of megabytes (images, documents): a leg's body without a second copy of what it shares with the client's.

Serialising an 8 MB image anew costs more than receiving and sending it. So a long member of the body is found where it
stands in the client's bytes and sent from there; the rest, which is short, is written anew.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from typing import Any

import orjson

LONG_BYTES = 1 << 18
"""Of a body; below it all of this costs more than it saves."""
LONG_MEMBER_BYTES = 1 << 16
MAX_STEPS = 20_000
"""Strings and brackets looked at. A body with more is mostly structure, and is better written anew."""
_TOP, _DEEP = re.compile(rb'["{}\[\],]'), re.compile(rb'["{}\[\]]')
_QUOTE, _COMMA, _BACKSLASH = b'",\\'
_OPENING = frozenset(b"{[")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 64 << 20


class LongBody:
    """Bytes in pieces, sent in their order."""

    __slots__ = ("num_bytes", "pieces")

    def __init__(self, *pieces: bytes | memoryview) -> None:
        self.pieces = pieces
        self.num_bytes = sum(map(len, pieces))

    def __len__(self) -> int:
        return self.num_bytes


Body = bytes | LongBody


def rewritten(body: bytes, old: Mapping[str, Any], new: dict[str, Any]) -> Body:
    """`new` as JSON. `old` is `body` parsed; a member of both that is the same object is taken from `body`."""
    if len(body) < LONG_BYTES:
        return orjson.dumps(new)
    taken = {name: raw for name, raw in long_members(body).items() if name in new and new[name] is old.get(name)}
    if not taken:
        return orjson.dumps(new)
    pieces: list[bytes | memoryview] = [orjson.dumps({key: new[key] for key in new if key not in taken})[:-1]]
    for name, raw in taken.items():
        comma = b"" if pieces == [b"{"] else b","
        pieces += [b'%b"%b":' % (comma, name.encode()), raw]
    return LongBody(*pieces, b"}")


def long_members(body: bytes) -> dict[str, memoryview]:
    """The values of at least LONG_MEMBER_BYTES in a JSON object that a parser has accepted, as they stand there.

    Of a name that comes twice the last counts, as for the parser. Empty if the body is mostly structure."""
    found: dict[bytes, memoryview] = {}
    view = memoryview(body)
    at, depth, name, begin = body.find(b"{") + 1, 1, None, 0
    for _ in range(MAX_STEPS):
        match = (_TOP if depth == 1 else _DEEP).search(body, at)
        if match is None:
            return {}
        at = match.end()
        mark = body[at - 1]
        if mark == _QUOTE:
            end = _string_end(body, at)
            if end < 0:
                return {}
            if name is None:
                name, begin = body[at:end], body.find(b":", end) + 1
                end = begin - 1
            at = end + 1
        elif mark in _OPENING:
            depth += 1
        elif depth > 1:
            depth -= 1
        else:  # a comma, or the end
            if name is not None:
                found.pop(name, None)
                if at - 1 - begin >= LONG_MEMBER_BYTES and _BACKSLASH not in name:
                    found[name] = view[begin : at - 1]
            name = None
            if mark != _COMMA:
                return {key.decode(): raw for key, raw in found.items()}
    return {}


def _string_end(body: bytes, begin: int) -> int:
    """Where the string that begins at `begin` has its closing quote; -1 if it has very many escaped ones."""
    end = begin - 1
    for _ in range(MAX_STEPS):
        end = body.find(b'"', end + 1)
        before = end - 1
        while before >= begin and body[before] == _BACKSLASH:
            before -= 1
        if (end - before) % 2:
            return end
    return -1


def keep_freed_memory() -> None:
    """Let the C library keep what large bodies leave free: pages taken from the kernel anew for each of their copies
    cost as much as the copies. Does nothing where there is no mallopt."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES // 2)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
