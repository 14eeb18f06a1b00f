"""Where prefixes were sent last, in memory that all worker processes map: policy `prefix_affinity` with several.

A table of cells of 8 bytes, each written in one piece: part of the prefix's hash, and the instance's slot on the load
board. Whoever writes last wins a cell, and a prefix that is lost so costs a prefill. Hashes are Python's, whose salt
is one in all workers because one process forked them.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from proxy.load_board import CELL_BYTES, NUM_SLOTS, BoardRow

CELL_BITS = 17  # as many chunks as one process remembers
SLOT_BITS = (NUM_SLOTS - 1).bit_length()
_MASK = (1 << CELL_BITS) - 1
_TAG_MASK = (1 << (63 - SLOT_BITS)) - 1


class PrefixBoard:
    """The memory; made by the parent."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, CELL_BYTES << CELL_BITS)
        self.cells = memoryview(self._memory).cast("q")

    def close(self) -> None:
        self.cells.release()
        self._memory.close()


class SharedPrefixes:
    """The memory as a worker uses it, in the place of `prefix_affinity.Remembered`."""

    def __init__(self, board: PrefixBoard, row: BoardRow) -> None:
        self._cells = board.cells
        self._names = row.names
        self._slots = row.slots

    def get(self, key: int) -> str | None:
        cell = self._cells[key & _MASK]
        if cell >> SLOT_BITS != (key >> CELL_BITS) & _TAG_MASK:
            return None
        return self._names.get(cell & (NUM_SLOTS - 1))

    def remember(self, role: str, keys: Sequence[int], name: str) -> None:
        slot = self._slots.get((role, name))
        if slot is not None:
            for key in keys:
                self._cells[key & _MASK] = ((key >> CELL_BITS) & _TAG_MASK) << SLOT_BITS | slot
