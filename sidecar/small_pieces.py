"""Many small pieces of mapped memory copied at once: a call a piece would cost more than its bytes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_PIECES = 256
"""Fewer in a chunk, of more than 4 KiB each, go faster by one memmove each (measured)."""


def copy_small(to_base: int, to: Sequence[int], starts_base: int, starts: Sequence[int], lengths: Sequence[int]) -> int:
    """Copy the pieces if enough of them are of one length; how many lengths there were, 0 if nothing was copied.

    As with memmove the addresses have to be right; no two destinations may overlap. The interpreter's lock is released.
    """
    if len(lengths) < MIN_PIECES:
        return 0
    sizes = np.asarray(lengths, np.int64)
    kinds = sizes[:1] if sizes.min() == sizes.max() else np.unique(sizes)
    if len(kinds) * MIN_PIECES > len(sizes):
        return 0
    to_all, starts_all = np.asarray(to, np.int64), np.asarray(starts, np.int64)
    for size in kinds.tolist():
        chosen = slice(None) if len(kinds) == 1 else sizes == size
        target, at = _pieces(to_base, to_all[chosen], size, read_only=False)
        source, start = _pieces(starts_base, starts_all[chosen], size, read_only=True)
        target[at] = source[start]
    return len(kinds)


def longest(lengths: Sequence[int]) -> int:
    """`max`, quick where there are thousands in an array."""
    return int(np.asarray(lengths).max()) if isinstance(lengths, array) else max(lengths)


def running_sums(lengths: Sequence[int]) -> Sequence[int]:
    """`accumulate`, likewise."""
    if isinstance(lengths, array):
        return array("q", np.asarray(lengths, np.int64).cumsum().tobytes())
    return list(accumulate(lengths))


class _Memory:
    """What numpy asks of memory that it is to look at."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def _pieces(
    base: int, offsets: NDArray[np.int64], num_bytes: int, *, read_only: bool
) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """An array whose element i is the piece that begins i bytes behind the first one, and the elements meant."""
    first = int(offsets.min())
    interface = {
        "version": 3, "typestr": f"|V{num_bytes}", "strides": (1,), "shape": (int(offsets.max()) - first + 1,),
        "data": (base + first, read_only),
    }  # fmt: skip
    return np.asarray(_Memory(interface)), offsets - first
