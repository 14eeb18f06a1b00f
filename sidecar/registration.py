"""Who this sidecar is, and the pool its engine has registered."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from sidecar.errors import LayoutRefused
from sidecar.layout import KvLayout, layout_fault
from sidecar.memory.contract import MemoryFault, PoolRegion
from sidecar.memory.registry import OPENERS
from sidecar.protocol import PoolMemory
from sidecar.regions import Region, allocate, forbid_shrinking, size_of


@dataclass(frozen=True, slots=True)
class Identity:
    """What the sidecar says of itself; `sidecar_epoch` is new with each process."""

    engine_id: str
    rank: int
    sidecar_epoch: str
    boot_id: str
    host: str
    port: int
    peer_socket: str
    transports: tuple[str, ...]


class Registration:
    """One pool from its registration until its engine is gone or registers again; owns descriptor and mapping.

    `fd` is None where the pool has no descriptor: then no other process can map it.

    `engine_socket` is the engine's connection: a helper process that writes into the pool keeps a duplicate open, so
    that the engine sees the end of the connection only when nothing can write any more.
    """

    def __init__(self, epoch: str, layout: KvLayout, fd: int | None, region: PoolRegion, engine_socket: int) -> None:
        self.epoch = epoch
        self.layout = layout
        self.fd = fd
        self.region = region
        self.engine_socket = engine_socket
        self.staged = False
        self.direct = False
        self.retired = False

    def close(self) -> None:
        """Unmap and close; every pull must have ended."""
        self.region.close()
        if self.fd is not None:
            os.close(self.fd)


async def register(epoch: str, layout: KvLayout, fd: int, engine_socket: int) -> Registration:
    """Check `layout` against the memory behind `fd` (taken over, also on failure) and map it. Raises LayoutRefused."""
    try:
        if fault := layout_fault(layout):
            raise LayoutRefused(fault)
        if size_of(fd) < layout.pool_bytes:
            raise LayoutRefused(f"the layout needs {layout.pool_bytes} bytes, the pool has {size_of(fd)}")
        forbid_shrinking(fd)
        try:
            await asyncio.to_thread(allocate, fd, layout.pool_bytes)
            region = await asyncio.to_thread(Region, fd, layout.pool_bytes, writable=True)
        except OSError as error:
            raise LayoutRefused(
                f"the pool cannot be mapped: {error.strerror or error}: there has to be memory for all of its "
                f"{layout.pool_bytes} bytes"
            ) from error
    except BaseException:
        os.close(fd)
        raise
    return Registration(epoch, layout, fd, region, engine_socket)


async def register_memory(epoch: str, layout: KvLayout, memory: PoolMemory, engine_socket: int) -> Registration:
    """Check `layout` against memory that has no descriptor and open it. Raises LayoutRefused."""
    if fault := layout_fault(layout):
        raise LayoutRefused(fault)
    if memory.num_bytes < layout.pool_bytes:
        raise LayoutRefused(f"the layout needs {layout.pool_bytes} bytes, the pool has {memory.num_bytes}")
    opener = OPENERS.get(memory.kind)
    if opener is None:
        raise LayoutRefused(f"memory kind {memory.kind!r} is none of {', '.join(OPENERS)}")
    try:
        region = await asyncio.to_thread(opener, memory)
    except MemoryFault as error:
        raise LayoutRefused(f"the pool cannot be opened: {error}") from error
    return Registration(epoch, layout, None, region, engine_socket)
