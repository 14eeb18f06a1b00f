"""The slots of a staging buffer: which are free, and how blocks and slots pair up into runs. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import sub

Run = tuple[int, int, int]
"""(first block, first slot, how many): neighbours on both sides."""


class Slots:
    """Numbers 0 to `num_slots` - 1, each free or taken. The lowest go first, so that neighbours stay together."""

    def __init__(self, num_slots: int, first: int = 0) -> None:
        self.num_slots = num_slots
        self._free = list(range(first, first + num_slots))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` slots, or None while fewer are free."""
        if count > len(self._free):
            return None
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give_back(self, slots: Iterable[int]) -> None:
        """They are free again."""
        self._free = sorted([*self._free, *slots])
        assert len(self._free) <= self.num_slots, "a slot was given back twice"


def runs(blocks: Sequence[int], slots: Sequence[int]) -> list[Run]:
    """Pairs of a block and a slot, with neighbours joined: each run is one copy."""
    if not blocks:
        return []
    steps = zip(map(sub, blocks[1:], blocks), map(sub, slots[1:], slots), strict=True)
    starts = [0, *(index for index, step in enumerate(steps, 1) if step != (1, 1))]
    ends = [*starts[1:], len(blocks)]
    return [(blocks[start], slots[start], end - start) for start, end in zip(starts, ends, strict=True)]
