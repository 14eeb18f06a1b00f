"""A staging buffer: host memory of a fixed number of slots, laid out like the pool that it stands for."""

from __future__ import annotations

import ctypes
import mmap
import os
from itertools import accumulate

import msgspec

from engine_adapter.host_memory import available_host_memory_bytes
from engine_adapter.memory.contract import Pool
from sidecar.protocol import KvLayout, Plane

HEADROOM_BYTES = 128 << 20
"""Left for the process itself when the buffer is weighed against free memory."""


class NoBuffer(Exception):
    """The buffer can't be had; the message says why."""


def slots_for(layout: KvLayout, num_bytes: int, max_blocks: int) -> int:
    """How many blocks a buffer of `num_bytes` holds; `max_blocks` is the longest request's. Raises NoBuffer."""
    num_slots = min(layout.num_blocks, num_bytes // layout.block_bytes)
    if num_slots < max_blocks:
        raise NoBuffer(
            f"a staging buffer of {num_bytes >> 20} MiB holds {num_slots} blocks, and the longest request has "
            f"{max_blocks}: at least {-(-max_blocks * layout.block_bytes >> 20)} MiB are needed"
        )
    return num_slots


def staged_layout(layout: KvLayout, num_slots: int) -> KvLayout:
    """The same blocks in a buffer of slots: plane after plane, without gaps."""
    sizes = [plane.block_bytes for plane in layout.planes]
    starts = accumulate((size * num_slots for size in sizes), initial=0)
    planes = tuple(Plane(start, size, size) for start, size in zip(starts, sizes, strict=False))
    return msgspec.structs.replace(layout, num_blocks=num_slots, planes=planes)


class StagingBuffer:
    """`layout` says what lies in `memory`; `pool` is for the provider."""

    def __init__(self, layout: KvLayout, num_slots: int, *, shared: bool) -> None:
        """Allocate. With `shared` other processes can map it. Raises NoBuffer."""
        self.layout = staged_layout(layout, num_slots)
        num_bytes = self.layout.pool_bytes
        available = available_host_memory_bytes()
        if available is not None and num_bytes + HEADROOM_BYTES > available:
            raise NoBuffer(
                f"a staging buffer of {num_bytes >> 20} MiB does not fit into the {available >> 20} MiB of memory left"
            )
        fd = None
        try:
            if shared:
                fd = os.memfd_create("baton-kv-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                os.posix_fallocate(fd, 0, num_bytes)
            self.memory = mmap.mmap(-1 if fd is None else fd, num_bytes)
        except OSError as error:
            if fd is not None:
                os.close(fd)
            raise NoBuffer(f"no {num_bytes >> 20} MiB for a staging buffer ({error.strerror})") from error
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.pool = Pool(address, num_bytes, fd, staged=True)

    def close(self) -> None:
        """Close the descriptor; the memory goes with its last view. Nothing may be staged any more. Idempotent."""
        if self.pool.fd is not None:
            os.close(self.pool.fd)
            self.pool = Pool(self.pool.address, self.pool.num_bytes)


def shared_memory_fault() -> str:
    """Why no memory can be shared from here; "" if it can."""
    try:
        os.close(os.memfd_create("baton-probe", os.MFD_CLOEXEC))
    except OSError as error:
        return f"shared memory can't be made here (memfd_create: {error.strerror})"
    return ""
