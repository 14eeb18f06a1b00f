"""What bodies of megabytes leave free: kept while more of them come, and given back to the system when none do.

Pages that are taken from the kernel anew for each copy of a large body cost as much as the copy. Does nothing where the
C library is not glibc.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 64 << 20
MOST_IDLE_BYTES = 16 << 20
IDLE_S = 10.0
"""Without a large body, until the memory is given back."""


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


class FreedMemory:
    """`keep` once, as the process starts; `tick` every second or so."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._mallopt = getattr(libc, "mallopt", None)
        self._trim = getattr(libc, "malloc_trim", None)
        self._info: Callable[[], _Mallinfo2] | None = getattr(libc, "mallinfo2", None)
        if self._info is not None:
            self._info.restype = _Mallinfo2
        self._num_free = 0
        self._since = 0.0

    def keep(self) -> None:
        if self._mallopt is not None:
            self._mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES // 2)
            self._mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)

    def tick(self, now: float) -> None:
        """Large bodies change how much is free by megabytes; while they do, all of it is kept."""
        if self._info is None or self._trim is None:
            return
        num_free = self._info().fordblks
        if num_free < MOST_IDLE_BYTES or abs(num_free - self._num_free) > MOST_IDLE_BYTES // 4:
            self._num_free, self._since = num_free, now
        elif now - self._since > IDLE_S:
            self._trim(0)
            self._since = now
