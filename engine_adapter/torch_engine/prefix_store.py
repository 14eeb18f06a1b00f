"""The engine's side of the prefix store: what the core calls, on its own thread, and what it is told in return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class LoadResult:
    """How the one load of a request ended: `num_blocks` leading blocks are whole, and nothing writes any more."""

    request_id: str
    num_blocks: int
    reason: str = ""
    """Why not all: missing, or what went wrong (timeout, sidecar_lost, ...)."""
    num_bytes: int = 0
    seconds: float = 0.0
    tiers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoreEvents:
    """What happened since the last poll."""

    loads: list[LoadResult] = field(default_factory=list)
    ended_saves: list[str] = field(default_factory=list)
    """Saves whose blocks nobody reads any more."""


class PrefixStore(Protocol):
    """Finished blocks by hash, beyond this engine's pool. Called on the engine thread only; no call waits."""

    @property
    def available(self) -> bool:
        """False where there is none, or its sidecar is away."""

    def load(self, request_id: str, block_hashes: list[bytes], block_ids: list[int]) -> None:
        """Fill the blocks with what the store has of them. One LoadResult follows, always."""

    def abandon(self, request_id: str) -> None:
        """Nobody wants this load any more. Its LoadResult still follows."""

    def save(self, save_id: str, block_hashes: list[bytes], block_ids: list[int]) -> None:
        """Keep these blocks, which stay as they are until `save_id` comes in `ended_saves`, as it always does."""

    def poll(self) -> StoreEvents:
        """Everything that ended since the last call, without waiting."""
