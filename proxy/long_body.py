"""Bodies of megabytes (images, documents): what is long in them is neither parsed nor serialised nor copied.

Parsing and writing an 8 MB image anew costs more than receiving and sending it. So each long string of a body is
replaced by a short stand-in before the body is parsed. Whatever is made of what was parsed then is written with the
stand-ins, and sent with the client's own bytes in their places.
"""

from __future__ import annotations

import os
import re
from typing import Any

import orjson

LONG_BYTES = 1 << 18
"""Of a body; below it all of this costs more than it saves."""
LONG_STRING_BYTES = 1 << 16
MAX_STEPS = 20_000
"""Strings looked at, and quotes within one. A body with more is mostly structure, and is better parsed whole."""
_QUOTE, _BACKSLASH = b'"', ord("\\")
_TOKEN = os.urandom(12).hex().encode()  # no client knows it
_STAND_IN = re.compile(b"%b([0-9]+)\\." % _TOKEN)


class LongBody:
    """Bytes in pieces, sent in their order."""

    __slots__ = ("num_bytes", "pieces")

    def __init__(self, *pieces: bytes | memoryview) -> None:
        self.pieces = pieces
        self.num_bytes = sum(map(len, pieces))

    def __len__(self) -> int:
        return self.num_bytes


Body = bytes | LongBody


class LongStrings:
    """What stands between the quotes of a body's long strings, as it stands there, escapes and all."""

    __slots__ = ("outline", "raw")

    def __init__(self, outline: bytes, raw: list[memoryview]) -> None:
        self.outline = outline
        """The body with a stand-in for each of them: short, and otherwise the same JSON, or no JSON either."""
        self.raw = raw

    def written(self, value: Any) -> Body:
        """`value` as JSON. It may hold stand-ins, wherever they came to be; the strings themselves are sent."""
        parts = _STAND_IN.split(orjson.dumps(value))
        if len(parts) == 1:
            return parts[0]
        return LongBody(*(self.raw[int(part)] if index % 2 else part for index, part in enumerate(parts)))

    def num_image_bytes(self) -> int:
        """Of those that are images as data URLs."""
        return sum(len(one) for one in self.raw if bytes(one[:5]) == b"data:")


def long_strings(body: bytes) -> LongStrings | None:
    """The long strings of a JSON text. None where it has none, or is mostly structure.

    In anything but JSON the quotes may be no strings': the outline is refused by a parser then, as the body is."""
    if len(body) < LONG_BYTES:
        return None
    view, kept_from, end = memoryview(body), 0, -1
    raw: list[memoryview] = []
    parts: list[bytes | memoryview] = []
    for _ in range(MAX_STEPS):
        begin = body.find(_QUOTE, end + 1) + 1
        if not begin:
            break
        end = _string_end(body, begin)
        if end < 0:
            return None
        if end - begin >= LONG_STRING_BYTES:
            parts += [view[kept_from:begin], b"%b%d." % (_TOKEN, len(raw))]
            raw.append(view[begin:end])
            kept_from = end
    else:
        return None
    return LongStrings(b"".join([*parts, view[kept_from:]]), raw) if raw else None


def _string_end(body: bytes, begin: int) -> int:
    """Where the string that begins at `begin` has its closing quote; -1 if it has very many escaped ones, or none."""
    end = begin - 1
    for _ in range(MAX_STEPS):
        end = body.find(_QUOTE, end + 1)
        if end < 0 or body[end - 1] != _BACKSLASH or not _num_backslashes(body, begin, end) % 2:
            return end
    return -1


def _num_backslashes(body: bytes, begin: int, end: int) -> int:
    """How many stand right before `end`, back to `begin`."""
    size = 16
    while True:
        before = body[max(begin, end - size) : end]
        others = len(before.rstrip(b"\\"))
        if others or end - size <= begin:
            return len(before) - others
        size *= 16
