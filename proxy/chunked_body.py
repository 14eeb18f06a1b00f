"""A chunked body, decoded without I/O. What an attacker may add to it besides the payload is bounded."""

from __future__ import annotations

import re

from proxy.errors import BadHead

MAX_LINE_BYTES = 4096
MAX_EXTRA_BYTES = 16 << 10  # of all chunk extensions and trailers of a body together
_WHOLE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n")
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")


class ChunkDecoder:
    """A chunked body (RFC 9112 section 7.1), fed in any pieces. Strict: CRLF only, hexadecimal sizes without blanks or
    signs, bounded lines, and bounded extensions and trailers, which are dropped."""

    __slots__ = ("_line", "_num_extra", "_remaining", "_state", "complete")

    def __init__(self) -> None:
        self._line = bytearray()
        self._num_extra = 0
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
            elif self.between_chunks and (begun := _whole_chunks(data, at, pieces)) > at:
                at = begun
            else:
                newline = data.find(b"\n", at)
                stop = end if newline < 0 else newline + 1
                self._line += data[at:stop]
                at = stop
                if len(self._line) > MAX_LINE_BYTES:
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
            found = _SIZE_LINE.fullmatch(text)
            if found is None:
                raise BadHead("A chunk size is not hexadecimal.")
            self._add_extra(len(found[2] or b""))
            self._remaining = int(found[1], 16)
            self._state = "payload" if self._remaining else "trailer"
        elif self._state == "payload_end":
            if text:
                raise BadHead("A chunk is longer than its size says.")
            self._state = "size"
        elif not text:  # the empty line that ends the trailer section; trailers themselves are dropped
            self.complete = True
        elif _TRAILER.fullmatch(text) is None:
            raise BadHead("A trailer of the chunked body is malformed.")
        else:
            self._add_extra(len(text))

    def _add_extra(self, num_bytes: int) -> None:
        self._num_extra += num_bytes
        if self._num_extra > MAX_EXTRA_BYTES:
            raise BadHead("The chunked body has too many extensions or trailers.")


def _whole_chunks(data: bytes, at: int, pieces: list[bytes]) -> int:
    """Take the chunks that are there to their end, but for the last chunk of a body, and return where they end.

    Only for speed: a client that sends a body in tiny chunks keeps others waiting for as long as reading them takes."""
    while (line := _WHOLE_LINE.match(data, at)) is not None:
        begin = line.end()
        end = begin + int(line[1], 16)
        if end == begin or not data.startswith(b"\r\n", end):
            break
        pieces.append(data[begin:end])
        at = end + 2
    return at
