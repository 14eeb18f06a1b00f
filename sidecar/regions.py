"""Registered memory: pools mapped into this process, by the C library's mmap.

The C calls run without the interpreter's lock, so that faulting in a large pool does not stop the event loop, and
give plain addresses, which the copy threads and Mooncake need.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path

from sidecar.memory.host import HostAccess

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_DONTFORK = 10
_MADV_DONTDUMP = 16
_MADV_POPULATE_READ = 22
"""linux/mman.h, the last since 5.14."""
_UNMAP_BYTES = 1 << 30
"""At a time, about 25 ms, in which no other thread of the process can map memory. The largest page is no larger."""
_MAP_FAILED = ctypes.c_void_p(-1).value

F_ADD_SEALS = 1033
F_GET_SEALS = 1034
F_SEAL_SHRINK = 0x0002
"""linux/fcntl.h; Python 3.11 names them only in part."""


class Region:
    """A shared mapping of a pool; pages are faulted in at once, so that no transfer pays for first touches."""

    on_host = True

    def __init__(self, fd: int, num_bytes: int, *, writable: bool, faulted_in: bool = True) -> None:
        """Map the first `num_bytes` of `fd`, which stays the caller's. Raises OSError.

        Without `faulted_in` the pages come when `fault_in` or a first touch wants them.
        """
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if faulted_in else 0)
        address = _libc.mmap(None, num_bytes, protection, flags, fd, 0)
        if address in (None, _MAP_FAILED):
            code = ctypes.get_errno()
            raise OSError(code, f"cannot map {num_bytes} bytes: {os.strerror(code)}")
        self.address: int = address
        self.num_bytes = num_bytes

    def fault_in(self, start: int, num_bytes: int) -> bool:
        """Have these pages, to read, before their first touch; False where the kernel can't, and leaves them to it."""
        end = min(start + num_bytes, self.num_bytes)
        failed: int = _libc.madvise(self.address + start, end - start, _MADV_POPULATE_READ)
        return not failed

    def keep_here(self) -> None:
        """Leave it out of forked children, in which it would outlive its maker, and of core dumps."""
        for advice in (_MADV_DONTFORK, _MADV_DONTDUMP):
            _libc.madvise(self.address, self.num_bytes, advice)

    def access(self) -> HostAccess:
        """The mapped bytes, for sockets."""
        return HostAccess(self.address, self.num_bytes)

    def close(self) -> None:
        """Unmap; nobody may be copying any more. Idempotent."""
        num_bytes, self.num_bytes = self.num_bytes, 0
        for start in range(0, num_bytes, _UNMAP_BYTES):
            _libc.munmap(self.address + start, min(_UNMAP_BYTES, num_bytes - start))


def reopen_read_only(fd: int) -> int:
    """A descriptor of the same memory through which it can be read, never written."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def size_of(fd: int) -> int:
    """Bytes behind a descriptor of memory or a regular file."""
    return os.fstat(fd).st_size


def allocate(fd: int, num_bytes: int) -> None:
    """Have the memory behind a pool's every page, as its first touch would otherwise be a SIGBUS. Raises OSError."""
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV, errno.EBADF):
            raise  # else it is no file of pages, or one that cannot be written: mapping will tell


def forbid_shrinking(fd: int) -> bool:
    """Seal a memfd against truncation, which would turn a copy into SIGBUS; False if it was made without sealing."""
    try:
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    except OSError:
        return False
    return True


def boot_id() -> str:
    """What two processes of one running kernel have in common."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
