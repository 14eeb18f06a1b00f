"""What a tier of the store is: one file each, one conformance suite over all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sidecar.store.keys import BlockKey


class TierObserver(Protocol):
    """Who is told what happens inside a tier; called on any thread."""

    def evicted(self, tier: str, num_blocks: int) -> None: ...

    def error(self, tier: str, kind: str) -> None:
        """`kind`: torn, foreign, mismatch, corrupt (a block that was no good), read, write, full, timeout, away."""
        ...


class Tier(Protocol):
    """Blocks by key. Every call may block (but those of a tier that `is_memory`) and none raises: what fails is a miss.

    Called on several threads at once.
    """

    name: str
    is_memory: bool

    def has(self, keys: Sequence[BlockKey], *, until_missing: bool) -> list[bool]:
        """Whether each is there; with `until_missing` those after the first that is not need not be looked for."""
        ...

    def get(self, key: BlockKey, num_bytes: int) -> bytearray | None:
        """The block, whole and verified, and the caller's for as long as it wants; None where it is not to be had."""
        ...

    def put(self, key: BlockKey, block: bytearray) -> bool:
        """Keep a block that nobody will change any more; True if it is there now."""
        ...

    def usage(self) -> tuple[int, int]:
        """(blocks, bytes) as far as known, without blocking."""
        ...

    def fault(self) -> str:
        """Why it takes or gives nothing at the moment; "" if it does."""
        ...

    def close(self) -> None:
        """Let go. Idempotent."""
        ...
