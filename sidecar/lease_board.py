"""Which leases are valid now, in shared memory: a consumer on this host sees it without asking, as do our own threads.

A producer's sidecar posts a mark for each offer and takes it off before its engine hears that the lease has ended. A
mark names a lease by its secret token and its blocks. So who sees a mark, copies those blocks, and sees the mark again,
has copied what was leased from before it began until after it had ended: no mark ever comes back.

A sidecar that dies takes nothing off. The board's lock is a robust mutex, which its event loop's thread holds for
life: the kernel marks it as ownerless when that thread dies, before it closes the process's sockets, by which the
engine hears of it. For a sidecar that is stopped each mark carries the time at which its offer expires.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from hashlib import blake2b

from sidecar.regions import Region, forbid_shrinking, size_of

NUM_SLOTS = 16_384
"""A mark whose slot is taken is not posted; its lease has to be claimed."""
BOARD_BYTES = 64 + 16 * NUM_SLOTS
"""The lock, then for each slot a mark and its expiry."""
_WORDS = BOARD_BYTES // 8
_FIRST = 8
"""Words of the lock."""
_TID_MASK = 0x3FFF_FFFF
"""Of a mutex's first word: its owner, 0 once that has died or let it go (linux/futex.h)."""
_MUTEX_ROBUST = 1
_PROCESS_SHARED = 1

_libc = ctypes.CDLL(None)


def mark_of(transfer_id: str, token: str, packed_block_ids: bytes) -> int:
    """What stands for a lease on a board; never 0, which is an empty slot."""
    names = blake2b(f"{transfer_id}\0{token}\0".encode(errors="replace"), digest_size=8)
    names.update(packed_block_ids)
    return int.from_bytes(names.digest(), "little") or 1


class LeaseBoard:
    """The producer's end. Made, used and closed on one thread; any may ask what it `holds`."""

    def __init__(self) -> None:
        """Raises OSError where there is no such board to be had."""
        self.fd = os.memfd_create("lease-board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, BOARD_BYTES)
            forbid_shrinking(self.fd)
            self._region = Region(self.fd, BOARD_BYTES, writable=True)
        except OSError:
            os.close(self.fd)
            raise
        self._words = (ctypes.c_uint64 * _WORDS).from_address(self._region.address)
        self._lock = ctypes.c_void_p(self._region.address)
        self._mapped = threading.Lock()
        try:
            self._hold()
        except OSError:
            self._region.close()
            os.close(self.fd)
            raise

    def post(self, mark: int, ttl_s: float) -> bool:
        """Whether there was room for it."""
        slot = _slot(mark)
        if self._words[slot]:
            return False
        self._words[slot + 1] = time.monotonic_ns() + int(ttl_s * 1e9)
        self._words[slot] = mark
        return True

    def take_off(self, mark: int) -> None:
        """A mark that is not there is left alone."""
        slot = _slot(mark)
        if self._words[slot] == mark:
            self._words[slot] = 0

    def holds(self, mark: int) -> bool:
        """Whether the lease is valid now."""
        with self._mapped:
            return bool(self._region.num_bytes) and _holds(self._words, mark)

    def close(self) -> None:
        """Every mark is void. Idempotent."""
        with self._mapped:
            self._close()

    def _close(self) -> None:
        if self._region.num_bytes:
            ctypes.memset(self._region.address + 8 * _FIRST, 0, 8 * (_WORDS - _FIRST))
            _libc.pthread_mutex_unlock(self._lock)
            self._region.close()
            os.close(self.fd)

    def _hold(self) -> None:
        """Make the lock and take it for this thread's life."""
        kind = ctypes.create_string_buffer(64)
        failed = (
            _libc.pthread_mutexattr_init(kind)
            or _libc.pthread_mutexattr_setpshared(kind, _PROCESS_SHARED)
            or _libc.pthread_mutexattr_setrobust(kind, _MUTEX_ROBUST)
            or _libc.pthread_mutex_init(self._lock, kind)
            or _libc.pthread_mutex_lock(self._lock)
        )
        if failed:
            raise OSError(failed, f"no robust mutex: {os.strerror(failed)}")
        if self._words[0] & _TID_MASK != threading.get_native_id():
            _libc.pthread_mutex_unlock(self._lock)
            raise OSError(0, "this C library's mutex does not begin with its owner")


class BoardView:
    """The consumer's end: it can only look."""

    def __init__(self, fd: int) -> None:
        """`fd` is taken over. Raises OSError."""
        try:
            if size_of(fd) < BOARD_BYTES:
                raise OSError(errno.EINVAL, f"a lease board has {BOARD_BYTES} bytes, this has {size_of(fd)}")
            self._region = Region(fd, BOARD_BYTES, writable=False)
        finally:
            os.close(fd)
        self._words = (ctypes.c_uint64 * _WORDS).from_address(self._region.address)

    def holds(self, mark: int) -> bool:
        """Whether the lease is valid now; False also where nobody knows."""
        return bool(self._region.num_bytes) and _holds(self._words, mark)

    def close(self) -> None:
        """Idempotent."""
        self._region.close()


def _holds(words: ctypes.Array[ctypes.c_uint64], mark: int) -> bool:
    slot = _slot(mark)
    return words[slot] == mark and words[slot + 1] > time.monotonic_ns() and words[0] & _TID_MASK != 0


def _slot(mark: int) -> int:
    """The index of a mark's word; that of its expiry follows."""
    return _FIRST + 2 * (mark % NUM_SLOTS)
