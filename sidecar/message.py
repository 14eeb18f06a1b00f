"""What every message of the protocol is made of. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Annotated

import msgspec

Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Id = Annotated[str, msgspec.Meta(max_length=16384)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400 * 366)]


def pack_block_ids(block_ids: Iterable[int]) -> bytes:
    """Eight bytes each, as this machine has them: no step of Python for each elsewhere. b"" if one is too large."""
    try:
        return array("Q", block_ids).tobytes()
    except OverflowError:
        return b""


class Message(msgspec.Struct, tag_field="type", frozen=True):
    """What travels in a frame."""


ProducerKey = tuple[str, int, str, str]
"""Host, port, engine id, epoch: one registration of a producer."""


class PullSource(msgspec.Struct, frozen=True):
    """Where a lease lies: the producer's sidecar and what it said in its offer."""

    host: str
    port: int
    engine_id: str
    transfer_id: str
    token: str
    epoch: str
    num_blocks: int
    packed_block_ids: bytes = b""
    """What the offer is said to hold (see pack_block_ids): a consumer may begin to read by it, see lease_board."""

    @property
    def producer(self) -> ProducerKey:
        return (self.host, self.port, self.engine_id, self.epoch)
