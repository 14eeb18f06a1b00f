"""What the scheduler's side tells the workers each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine_adapter.kv_transfer_params import KvSource
from engine_adapter.vllm_connector.compat import KVConnectorMetadata


@dataclass(frozen=True, slots=True)
class PullOrder:
    """Load a request's KV: lease block first_block + i into local_block_ids[i]. `sources` has one lease a rank."""

    request_id: str
    sources: tuple[KvSource, ...]
    num_blocks: int
    local_block_ids: tuple[int, ...]
    first_block: int
    packed_block_ids: bytes = b""
    """The lease's, see sidecar.protocol.pack_block_ids."""


@dataclass(frozen=True, slots=True)
class LandOrder:
    """Keep a request's blocks for a prefiller, and ask the metaserver for one: local_block_ids[i] receives block
    first_block + i. Without blocks nothing is wanted, and the metaserver is only told so."""

    request_id: str
    name: str
    """The request's id as the proxy expects it."""
    metaserver: str
    local_block_ids: tuple[int, ...]
    first_block: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class MarkOrder:
    """This step's forward computes some of a prompt whose KV is pushed: of the lease's blocks, those before
    `first_block` are computed already, those before `end_block` when it has ended. Without such it is only told."""

    transfer_id: str
    first_block: int
    end_block: int
    more_block_ids: tuple[int, ...]
    """Blocks that the lease gets with this step: it has `end_block` of them then."""


@dataclass(frozen=True, slots=True)
class OfferNote:
    """The request's blocks are leased out, rank r's as `leases[r]` = (transfer_id, epoch)."""

    request_id: str
    leases: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class StageOrder:
    """After this step's forward, copy block block_ids[i] into slot slots[i] of the staging buffer."""

    block_ids: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoreLoadOrder:
    """Load a request's leading KV from the prefix store: the block called hashes[i] into local_block_ids[i]."""

    request_id: str
    hashes: tuple[bytes, ...]
    local_block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoreSaveOrder:
    """Give a finished request's blocks to the prefix store; the request holds them until it is reported as sent."""

    request_id: str
    hashes: tuple[bytes, ...]
    block_ids: tuple[int, ...]


@dataclass(slots=True)
class BatonMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """One step's orders. `abandoned` names loads that nobody wants any more; they are reported all the same, as sent
    where `abandoned_as_sent` names them too (see compat.ABORTED_LOAD_KEEPS_ITS_BLOCKS)."""

    pulls: list[PullOrder] = field(default_factory=list)
    lands: list[LandOrder] = field(default_factory=list)
    marks: list[MarkOrder] = field(default_factory=list)
    offers: list[OfferNote] = field(default_factory=list)
    stages: list[StageOrder] = field(default_factory=list)
    store_loads: list[StoreLoadOrder] = field(default_factory=list)
    store_saves: list[StoreSaveOrder] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)
    abandoned_as_sent: list[str] = field(default_factory=list)
