"""What a memory provider is. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from sidecar.client import SidecarClient
from sidecar.protocol import KvLayout

DeviceKind = Literal["cpu", "cuda", "npu"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine runs, as far as it decides which provider can work."""

    device: DeviceKind
    own_sidecar: bool
    """The engine starts its sidecar; else it joins one that somebody else has started."""
    shared_memory_fault: str = ""
    """Why host memory can't be shared here; "" if it can."""
    environment: Mapping[str, str] = field(default_factory=dict)
    transport: str = "auto"
    shared_pool_fault: str = ""
    """Why the KV itself can't be moved into shared memory, though a buffer may."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The memory whose blocks are handed on: the engine's KV, or the buffer that stands for it."""

    address: int
    num_bytes: int
    fd: int | None = None
    """Of the memory behind `address`, where other processes can map it."""
    device: DeviceKind = "cpu"
    device_index: int = 0
    staged: bool = False
    """It is a staging buffer."""


class MemoryProvider(Protocol):
    """One way. The facts are for the engine, which allocates its KV and starts the sidecar by them."""

    name: str
    in_process: bool
    """The sidecar is a thread of the engine's process."""
    unproven: bool
    """It has not run on hardware yet: taken only when it is asked for by name."""

    def lacking(self, place: Place) -> str:
        """Why it can't work there, and what would help; "" if it can."""
        ...

    def needs_shared_pool(self, place: Place) -> bool:
        """The KV itself must lie in memory that the sidecar's process can map."""
        ...

    def stages(self, place: Place) -> bool:
        """Blocks go through a buffer in host memory, which is the sidecar's pool."""
        ...

    def enter(self, client: SidecarClient, pool: Pool, layout: KvLayout) -> str:
        """Register the pool over a connection. Returns its epoch. Raises SidecarError."""
        ...
