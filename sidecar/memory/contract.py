"""What registered memory is to the transports, whichever way it was opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Piece = Sequence[tuple[int, int]]
"""(offset, bytes) of what is moved by one call."""


class PoolAccess(Protocol):
    """A region's bytes for sockets. Made for one thread, because one that reaches a device has a buffer between."""

    def to_send(self, piece: Piece) -> list[memoryview]:
        """The bytes of the piece; good until the next call. Raises MemoryFault."""
        ...

    def to_fill(self, piece: Piece) -> list[memoryview]:
        """Where the piece's bytes are to be received."""
        ...

    def filled(self, piece: Piece) -> None:
        """All of `to_fill` has been received: now it lies in the pool. Raises MemoryFault."""
        ...


class PoolRegion(Protocol):
    """A pool that this process can reach. `address` means something to the CPU only where `on_host` says so."""

    address: int
    num_bytes: int
    on_host: bool

    def access(self) -> PoolAccess:
        """For one thread."""
        ...

    def close(self) -> None:
        """Let go of it; nobody may be copying any more. Idempotent."""
        ...


class MemoryFault(Exception):
    """Device memory can't be opened or copied; the message says what the driver said."""
