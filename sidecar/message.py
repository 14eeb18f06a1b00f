"""What every message of the protocol is made of. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Id = Annotated[str, msgspec.Meta(max_length=16384)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400 * 366)]


class Message(msgspec.Struct, tag_field="type", frozen=True):
    """What travels in a frame."""


class PullSource(msgspec.Struct, frozen=True):
    """Where a lease lies: the producer's sidecar and what it said in its offer."""

    host: str
    port: int
    engine_id: str
    transfer_id: str
    token: str
    epoch: str
    num_blocks: int
    block_ids: tuple[Natural, ...] = ()
    """What the offer is said to hold: a consumer on the same host may begin with these, see lease_board."""
