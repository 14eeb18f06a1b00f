"""One load: blocks out of the store into an engine's pool, in whatever order they come.

Ends once, when nothing writes any more: all blocks there, one found missing (what follows it is of no use), the
deadline, or nobody wanting it. A read that hangs is no reason to wait: it fills a buffer of its own, and what it brings
after the end is not copied.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from sidecar.copy_executor import Move

Piece = tuple[int, int]
"""(address, bytes) in the engine's pool; a block has one a plane."""
Copy = Callable[[Sequence[Move], Callable[[bool], None]], object]
"""Copies on threads and says whether it did; CopyExecutor.submit."""


class Load:
    """Thread-safe. `on_end` is called once, on whichever thread comes last."""

    def __init__(self, targets: Sequence[Sequence[Piece]], copy: Copy, on_end: Callable[[], None]) -> None:
        self._targets = targets
        self._copy = copy
        self._on_end = on_end
        self._lock = threading.Lock()
        self._tier_of: list[str] = [""] * len(targets)
        self._num_open = len(targets)
        self._num_copying = 0
        self._limit = len(targets)
        """Blocks from here on are no use: one before them is missing."""
        self._closed = ""
        self._ended = False

    def wants(self, index: int) -> bool:
        """Whether this block, were it there, would be of any use."""
        return not self._closed and index < self._limit

    def take(self, index: int, block: bytearray | None, tier: str) -> None:
        """The store's answer for one block: have it copied into the pool."""
        with self._lock:
            if block is not None and not self._closed and index < self._limit:
                self._num_copying += 1
            else:
                self._num_open -= 1
                if block is None:
                    self._limit = min(self._limit, index)
                block = None
        if block is None:
            self._end_if_done()
            return
        kept = block  # until it is copied, whatever the store does with it

        def copied(completed: bool) -> None:
            nonlocal kept
            with self._lock:
                self._num_copying -= 1
                self._num_open -= 1
                if completed:
                    self._tier_of[index] = tier
                else:
                    self._limit = min(self._limit, index)
            del kept
            self._end_if_done()

        self._copy(scatter(kept, self._targets[index]), copied)

    def close(self, reason: str) -> None:
        """Copy nothing more; the end follows, at once or after the copies under way. Idempotent."""
        with self._lock:
            self._closed = self._closed or reason
        self._end_if_done()

    def outcome(self) -> tuple[int, str, Counter[str]]:
        """After the end: leading blocks that are whole, why not all ("" if all), and how many came from which tier."""
        num_blocks = self._tier_of.index("") if "" in self._tier_of else len(self._tier_of)
        whole = num_blocks == len(self._tier_of)
        return num_blocks, "" if whole else self._closed or "missing", Counter(self._tier_of[:num_blocks])

    def _end_if_done(self) -> None:
        with self._lock:
            leading_done = self._limit < len(self._targets) and all(self._tier_of[: self._limit])
            done = self._num_copying == 0 and (self._closed or self._num_open == 0 or leading_done)
            if self._ended or not done:
                return
            self._ended = True
            self._closed = self._closed or "missing"
        self._on_end()


def scatter(block: bytearray, pieces: Sequence[Piece]) -> list[Move]:
    """Moves that bring a block's bytes to where its planes lie."""
    moves = []
    source = address_of(block)
    for address, num_bytes in pieces:
        moves.append((address, source, num_bytes))
        source += num_bytes
    return moves


def gather(pieces: Sequence[Piece], block: bytearray) -> list[Move]:
    """Moves that fill `block` with what lies at `pieces`."""
    return [(to, address, num_bytes) for address, to, num_bytes in scatter(block, pieces)]


def address_of(block: bytearray) -> int:
    """Where its bytes are, as long as somebody holds it and nobody resizes it."""
    return ctypes.addressof(ctypes.c_char.from_buffer(block))
