"""What an engine says of the prefix store, and what it is told. Pure.

A block's hash is the engine's and covers everything that the block's bytes depend on but the pool's layout, which the
sidecar adds: tokens, the parent's hash, salts, images. It must be the same in every process that computes the same.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from sidecar.message import Id, Message, Natural, Seconds

MAX_HASHES = 65_536
"""Blocks of one message: a million tokens at the usual 16 a block."""

BlockHash = Annotated[bytes, msgspec.Meta(min_length=16, max_length=64)]
BlockHashes = Annotated[list[BlockHash], msgspec.Meta(max_length=MAX_HASHES)]
BlockIds = Annotated[list[Natural], msgspec.Meta(max_length=MAX_HASHES)]


class StoreLookup(Message, tag="store_lookup", frozen=True):
    """How many of these blocks, from the first on, does the store have? One StoreFound follows."""

    lookup_id: Id
    hashes: BlockHashes


class StoreFound(Message, tag="store_found", frozen=True):
    """`num_blocks` leading ones are there; `tiers` counts them by the fastest tier that has each."""

    lookup_id: str
    num_blocks: int
    tiers: dict[str, int]


class StoreLoad(Message, tag="store_load", frozen=True):
    """Fill local_block_ids[i] with the block of hashes[i]; one StoreLoadEnded follows, by the deadline."""

    load_id: Id
    hashes: BlockHashes
    local_block_ids: BlockIds
    deadline_s: Seconds


class StoreAbandon(Message, tag="store_abandon", frozen=True):
    """Nobody wants this load any more; its StoreLoadEnded still follows."""

    load_id: Id


class StoreLoadEnded(Message, tag="store_load_ended", frozen=True):
    """The load has stopped writing: the first `num_blocks` blocks are whole, whatever is in `bad_block_ids` is not.

    `reason` is "" where all were there, else missing, timeout, abandoned, invalid or sidecar_lost.
    """

    load_id: str
    num_blocks: int
    bad_block_ids: list[int]
    reason: str
    message: str
    num_bytes: int
    seconds: float
    tiers: dict[str, int]


class StoreSave(Message, tag="store_save", frozen=True):
    """Keep these blocks. They must not change before the StoreSaveEnded that follows: the sidecar reads them."""

    save_id: Id
    hashes: BlockHashes
    block_ids: BlockIds


class StoreSaveEnded(Message, tag="store_save_ended", frozen=True):
    """The blocks are not read any more: `num_blocks` were copied, `num_known` needed no copy, the rest were refused."""

    save_id: str
    num_blocks: int
    num_known: int
    message: str


StoreRequest = StoreLookup | StoreLoad | StoreAbandon | StoreSave
StoreEvent = StoreFound | StoreLoadEnded | StoreSaveEnded


def store_refusal(request: StoreRequest, why: str, reason: str = "invalid") -> StoreEvent | None:
    """The answer to a request that can't be served; an abandonment needs none."""
    if isinstance(request, StoreLookup):
        return StoreFound(request.lookup_id, 0, {})
    if isinstance(request, StoreLoad):
        return StoreLoadEnded(request.load_id, 0, request.local_block_ids, reason, why, 0, 0.0, {})
    if isinstance(request, StoreSave):
        return StoreSaveEnded(request.save_id, 0, 0, why)
    return None


class OpenRequests:
    """What was asked and not answered yet, in the asking process; its owner's lock guards it."""

    def __init__(self) -> None:
        self._open: dict[tuple[type[Message], str], StoreRequest] = {}

    def add(self, request: StoreRequest) -> None:
        """Raises ValueError where the id is in use."""
        if (key := _key(request)) in self._open:
            raise ValueError(f"{key[1]!r} is open already")
        if not isinstance(request, StoreAbandon):
            self._open[key] = request

    def end(self, message: StoreRequest | StoreEvent) -> bool:
        """It was answered, or could not be sent; False where it was not open."""
        return self._open.pop(_key(message), None) is not None

    def lose(self, why: str) -> list[StoreEvent]:
        """The sidecar is gone: how everything ended."""
        lost, self._open = self._open, {}
        return [event for request in lost.values() if (event := store_refusal(request, why, "sidecar_lost"))]


def _key(message: StoreRequest | StoreEvent) -> tuple[type[Message], str]:
    if isinstance(message, StoreLookup | StoreFound):
        return StoreLookup, message.lookup_id
    if isinstance(message, StoreSave | StoreSaveEnded):
        return StoreSave, message.save_id
    return StoreLoad if isinstance(message, StoreLoad | StoreLoadEnded) else StoreAbandon, message.load_id
