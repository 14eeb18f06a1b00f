"""Memory that the CPU reaches by its address: bytes go straight between it and a socket."""

from __future__ import annotations

import ctypes

from sidecar.memory.contract import Piece
from sidecar.protocol import PoolMemory


class HostAccess:
    """See contract.PoolAccess. Of no use once the region is closed."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self._pool = memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")

    def to_send(self, piece: Piece) -> list[memoryview]:
        return [self._pool[offset : offset + length] for offset, length in piece]

    to_fill = to_send

    def filled(self, piece: Piece) -> None:
        """It lies there already."""


class BorrowedRegion:
    """See contract.PoolRegion: memory of an engine in this very process, which keeps it while it is connected."""

    on_host = True

    def __init__(self, memory: PoolMemory) -> None:
        self.address = memory.address
        self.num_bytes = memory.num_bytes

    def access(self) -> HostAccess:
        return HostAccess(self.address, self.num_bytes)

    def close(self) -> None:
        """It is the engine's."""
