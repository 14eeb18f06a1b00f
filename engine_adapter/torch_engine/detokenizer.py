"""From token ids to text, one token at a time, in constant time a token. Pure: no clock, no I/O.

A token of a byte-level vocabulary is a run of bytes, not of characters: a character of several bytes may begin in one
token and end in the next. `Detokenizer` says only whole characters, withholds what may become a stop string, and its
pieces joined are the tokenizer's own decoding of all tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

MAX_UTF8_BYTES = 4
WINDOW_SEED_TOKENS = 6
"""Prompt tokens decoded before the first generated one, so that its leading space survives (vLLM seeds with 6)."""
MAX_PENDING_TOKENS = 8
"""A character has at most four byte-fallback tokens; a text that still ends badly after twice that is really bad."""
REPLACEMENT = "�"


class TextDecoder(Protocol):
    """Turns one request's tokens into text."""

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty in the middle of a character."""

    def finish(self) -> str:
        """What is left when no token follows."""


class ByteTextDecoder:
    """For byte-level vocabularies (GPT-2, Qwen, Llama 3): every token is its bytes, the text is their UTF-8 reading."""

    __slots__ = ("_bytes_of", "_utf8")

    def __init__(self, bytes_of: Callable[[int], bytes], prompt_token_ids: Sequence[int] = ()) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b"".join(bytes_of(token_id) for token_id in prompt_token_ids[-MAX_UTF8_BYTES:])
        self._utf8.decode(incomplete_suffix(tail))

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", True)


class WindowTextDecoder:
    """For any other vocabulary: decodes a short window of tokens twice and takes the difference."""

    __slots__ = ("_decode", "_prefix_start", "_read_start", "_token_ids")

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._token_ids = list(prompt_token_ids[-WINDOW_SEED_TOKENS:])
        self._prefix_start = 0
        self._read_start = len(self._token_ids)

    def push(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        return self._take(force=len(self._token_ids) - self._read_start >= MAX_PENDING_TOKENS)

    def finish(self) -> str:
        return self._take(force=True)

    def _take(self, *, force: bool) -> str:
        known = self._decode(self._token_ids[self._prefix_start : self._read_start])
        text = self._decode(self._token_ids[self._prefix_start :])
        if len(text) <= len(known) or (text.endswith(REPLACEMENT) and not force):
            return ""
        del self._token_ids[: self._read_start]
        self._prefix_start, self._read_start = 0, len(self._token_ids)
        return text[len(known) :]


def incomplete_suffix(text: bytes) -> bytes:
    """The bytes at the end that begin a UTF-8 character without ending it; empty where there are none."""
    for length in range(1, min(MAX_UTF8_BYTES, len(text) + 1)):
        lead = text[-length]
        if lead >= 0xC0:
            needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return text[-length:] if needed > length else b""
        if lead < 0x80:
            return b""
    return b""


class StopStrings:
    """Finds the first stop string to be complete in a text that comes in pieces.

    Where two end at the same character the longer one counts. What was found doesn't depend on how the text was cut.
    """

    __slots__ = ("_held", "_include", "_max_held", "_stops", "hit")

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include_in_output
        self._max_held = max((len(stop) for stop in self._stops), default=1) - 1
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str, *, armed: bool = True) -> str:
        """The text that can't be part of a stop string any more. Not `armed`: a complete one is let through."""
        if not text:
            return ""
        text = self._held + text
        self._held = ""
        if armed and (found := self._first(text)):
            end, start, self.hit = found
            return text[: end if self._include else start]
        num_held = self._num_held(text)
        if num_held:
            self._held = text[-num_held:]
            return text[:-num_held]
        return text

    def finish(self) -> str:
        """What was withheld and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> tuple[int, int, str] | None:
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(found) if found else None

    def _num_held(self, text: str) -> int:
        for length in range(min(self._max_held, len(text)), 0, -1):
            suffix = text[-length:]
            if any(len(stop) > length and stop.startswith(suffix) for stop in self._stops):
                return length
        return 0


class Detokenizer:
    """One choice's text: decoder and stop strings. After `stop_hit` is set nothing more is to be pushed."""

    __slots__ = ("_decoder", "_min_tokens", "_num_tokens", "_stops")

    def __init__(self, decoder: TextDecoder, stops: StopStrings | None = None, min_tokens: int = 0) -> None:
        self._decoder = decoder
        self._stops = stops
        self._min_tokens = min_tokens
        self._num_tokens = 0

    @property
    def stop_hit(self) -> str | None:
        return self._stops.hit if self._stops else None

    def push(self, token_ids: Sequence[int]) -> str:
        """The text to deliver after these tokens. Stop strings count once more than `min_tokens` tokens are there."""
        pieces = []
        for token_id in token_ids:
            self._num_tokens += 1
            text = self._decoder.push(token_id)
            if self._stops is not None:
                text = self._stops.push(text, armed=self._num_tokens > self._min_tokens)
            pieces.append(text)
            if self.stop_hit is not None:
                break
        return pieces[0] if len(pieces) == 1 else "".join(pieces)

    def finish(self) -> str:
        """The rest, when the request ended by anything but a stop string."""
        text = self._decoder.finish()
        if self._stops is None:
            return text
        text = self._stops.push(text, armed=self._num_tokens > self._min_tokens)
        return text if self._stops.hit is not None else text + self._stops.finish()
