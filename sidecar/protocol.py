"""The messages between an engine and its sidecar, and between sidecars. Pure.

Each frame (see framing) holds one msgpack map with the message's type under "type". Every connection begins with the
caller's hello, which names its version; the other end answers with its own hello or with `Refused` and closes.
Messages with a `call_id` are answered by exactly one message with the same `call_id`.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from sidecar.errors import FrameError
from sidecar.layout import MAX_RANKS, KvLayout, Plane
from sidecar.message import Id, Message, Natural, PullSource, Seconds, pack_block_ids
from sidecar.peer_messages import (
    CallRefused,
    Claim,
    Claimed,
    Computed,
    Deliver,
    Done,
    Heartbeat,
    OpenRegion,
    PeerHello,
    PeerWelcome,
    RegionOpened,
    Release,
    Withdrawn,
)  # fmt: skip
from sidecar.ready import Ready
from sidecar.store.messages import (
    StoreAbandon,
    StoreEvent,
    StoreFound,
    StoreLoad,
    StoreLoadEnded,
    StoreLookup,
    StoreRequest,
    StoreSave,
    StoreSaveEnded,
    store_refusal,
)  # fmt: skip

__all__ = [
    "CHANGES",
    "PROTOCOL_VERSION",
    "CallRefused",
    "Claim",
    "Claimed",
    "Computed",
    "Deliver",
    "Done",
    "Heartbeat",
    "KvLayout",
    "Message",
    "OpenRegion",
    "PeerHello",
    "PeerWelcome",
    "Plane",
    "PullSource",
    "Ready",
    "RegionOpened",
    "Release",
    "StoreAbandon",
    "StoreEvent",
    "StoreFound",
    "StoreLoad",
    "StoreLoadEnded",
    "StoreLookup",
    "StoreRequest",
    "StoreSave",
    "StoreSaveEnded",
    "Withdrawn",
    "pack_block_ids",
    "store_refusal",
]  # fmt: skip

CHANGES = {
    1: "the first: engine socket, peer control, transports shm and mooncake, pull direction",
    2: "join_pool: an engine's second process offers blocks of the pool that the first one registered",
    3: "layouts say which rank they are of; pull from several ranks' leases; a lease has several readers (claim)",
    4: "layerwise push: land, push and its marks from engines; deliver, computed and withdrawn between sidecars",
    5: "prefix store: store_lookup, store_load, store_abandon, store_save; the sidecar's hello names the tiers",
    6: "register_pool: memory of the sidecar's own process by address, device memory by an IPC key",
    7: "a push may begin with the first of its blocks: mark_ready and computed bring the others",
    8: "sources name blocks; on one host region_opened brings a lease board, by which leases are read without a claim",
    9: "register_pool: direct; pool_opened, pool_closed and read_directly: an engine copies small transfers itself",
    10: "tcp: a read names the mark of its lease, which the producer checks, and needs no claim then",
}
"""What each version changed; an end speaks exactly one."""
PROTOCOL_VERSION = max(CHANGES)

ENGINE_FRAME_BYTES = 16 << 20
"""A lease or pull of a million blocks fits: five bytes a block id."""
PEER_FRAME_BYTES = 16 << 20


class Refused(Message, tag="refused", frozen=True):
    """The hello was not accepted; the connection is closed after this."""

    reason: str
    message: str


class EngineHello(Message, tag="engine_hello", frozen=True):
    version: int
    client: str


class SidecarHello(Message, tag="sidecar_hello", frozen=True):
    """Who the sidecar is; `host` and `port` are where peers reach it."""

    engine_id: str
    rank: int
    host: str
    port: int
    transports: tuple[str, ...]
    sidecar_epoch: str
    protocol_version: int
    store: tuple[str, ...] = ()
    """Tiers of the prefix store, fastest first; empty where there is none."""


class PoolMemory(msgspec.Struct, frozen=True):
    """A pool without a descriptor. `kind` is address (only from the sidecar's own process), cuda_ipc or npu_ipc.

    For the last two `key` is the driver's name for an allocation in which the pool begins at `offset`.
    """

    kind: str
    address: Natural = 0
    key: bytes = b""
    offset: Natural = 0
    num_bytes: Natural = 0
    device: Natural = 0


class RegisterPool(Message, tag="register_pool", frozen=True):
    """The pool's memfd comes with this frame (SCM_RIGHTS), unless it names memory in another way (see PoolMemory)."""

    call_id: Natural
    layout: KvLayout
    memory: PoolMemory | None = None
    staged: bool = False
    """The pool is a buffer that stands for the engine's KV: its blocks are slots."""
    direct: bool = False
    """The engine reads producers on this host itself, where it is given their pools (see PoolOpened)."""


class PoolRegistered(Message, tag="pool_registered", frozen=True):
    """`staged_slots`: of a staging buffer; 0 where the pool is the engine's KV."""

    call_id: Natural
    epoch: str
    staged_slots: Natural = 0


class JoinPool(Message, tag="join_pool", frozen=True):
    """Offer, revoke and drop for the pool that another process of this engine registered, which hears how offers end.

    Answered by PoolRegistered; the connection ends when the pool is retired.
    """

    call_id: Natural


class OfferBlocks(Message, tag="offer_blocks", frozen=True):
    call_id: Natural
    request_id: Id
    block_ids: list[Natural]
    num_tokens: Natural
    ttl_s: Seconds


class Offer(Message, tag="offer", frozen=True):
    """A lease on blocks, to be claimed with `token`; `expires_at` is unix time."""

    transfer_id: str
    token: str
    epoch: str
    expires_at: float
    call_id: Natural = 0


class CallFailed(Message, tag="call_failed", frozen=True):
    """`kind` names the error class the client raises."""

    call_id: Natural
    kind: str
    message: str


class PushTarget(msgspec.Struct, frozen=True):
    """Where blocks wait to be filled: the consumer's sidecar and what it said in its landing."""

    host: str
    port: int
    engine_id: str
    landing_id: str
    token: str
    epoch: str


class PushBlocks(Message, tag="push_blocks", frozen=True):
    """An offer of blocks that are still computed, delivered to `target`; answered by Offer, ended like one."""

    call_id: Natural
    request_id: Id
    block_ids: list[Natural]
    num_tokens: Natural
    ttl_s: Seconds
    ready: Ready
    target: PushTarget
    num_blocks: Natural = 0
    """Of the whole lease; those that `block_ids` lacks come with marks. 0: it lacks none."""


class MarkReady(Message, tag="mark_ready", frozen=True):
    """More of a push is computed; `ready` holds all that was marked before. `block_ids` are the lease's next."""

    transfer_id: Id
    ready: Ready
    block_ids: tuple[Natural, ...] = ()


class Revoke(Message, tag="revoke", frozen=True):
    transfer_id: Id


class Pull(Message, tag="pull", frozen=True):
    """local_block_ids[i] receives block number first_block + i of what the leases hold, in blocks of our size.

    `sources` has one lease a rank of the producer, stage by stage; `stage_layers` as in its layout. The same pull_id
    at every rank of the consumer makes them readers of one group. Which ranks are read is the sidecar's choice.
    """

    pull_id: Id
    sources: Annotated[tuple[PullSource, ...], msgspec.Meta(min_length=1, max_length=MAX_RANKS)]
    local_block_ids: list[Natural]
    first_block: Natural
    deadline_s: Seconds
    stage_layers: tuple[int, ...] = ()


class Land(Message, tag="land", frozen=True):
    """Keep blocks for a producer that comes by itself: local_block_ids[i] for its block number first_block + i."""

    call_id: Natural
    pull_id: Id
    local_block_ids: list[Natural]
    first_block: Natural
    deadline_s: Seconds


class Landing(Message, tag="landing", frozen=True):
    """Who knows the token may have its blocks copied into ours; `expires_at` is unix time."""

    call_id: Natural
    landing_id: str
    token: str
    epoch: str
    expires_at: float


class Abandon(Message, tag="abandon", frozen=True):
    pull_id: Id


class Drop(Message, tag="drop", frozen=True):
    """Tell the producer that nobody will read this lease."""

    source: PullSource


class OfferEnded(Message, tag="offer_ended", frozen=True):
    """`outcome` is consumed, dropped, expired or revoked; the blocks are the engine's again."""

    transfer_id: str
    outcome: str


class PullEnded(Message, tag="pull_ended", frozen=True):
    """The pull has stopped writing. `reason` is "" or one of errors.REASONS; `peer` is engine_id@host:port.

    Of several sources `peer` is the one that failed, or else the first.
    """

    pull_id: str
    ok: bool
    reason: str
    message: str
    num_blocks: int
    num_bytes: int
    seconds: float
    transport: str
    peer: str


class PoolOpened(Message, tag="pool_opened", frozen=True):
    """A producer on this host: the descriptors of its pool and its lease board come with this frame, in this order."""

    host: str
    port: int
    engine_id: str
    epoch: str
    layout: KvLayout


class PoolClosed(Message, tag="pool_closed", frozen=True):
    """It can be reached no more, or has not been read for long."""

    host: str
    port: int
    engine_id: str
    epoch: str


class ReadDirectly(Message, tag="read_directly", frozen=True):
    """The engine has copied a lease's blocks itself, and it was valid until then: release it, and count."""

    source: PullSource
    num_blocks: Natural
    num_bytes: Natural
    seconds: Seconds
    wants_answer: bool = False
    """ReadHeard is to follow: an engine that needs no other answer would not notice a sidecar that hangs."""


class ReadHeard(Message, tag="read_heard", frozen=True):
    """A ReadDirectly that wanted an answer has come."""


class SidecarLost(msgspec.Struct, frozen=True):
    """Made by the client when the connection has ended: every offer is void, every pull has been reported."""

    message: str


Event = OfferEnded | PullEnded | SidecarLost | StoreEvent


class _AnyHello(msgspec.Struct):
    """The part of a hello that every version has."""

    type: str
    version: int


FromEngine = (
    EngineHello | RegisterPool | JoinPool | OfferBlocks | PushBlocks | MarkReady | Revoke | Pull | Land | Abandon | Drop
    | StoreRequest | ReadDirectly
)  # fmt: skip
ToEngine = (
    SidecarHello | Refused | PoolRegistered | Offer | Landing | CallFailed | OfferEnded | PullEnded | StoreEvent
    | PoolOpened | PoolClosed | ReadHeard
)  # fmt: skip
FromConsumer = PeerHello | OpenRegion | Claim | Heartbeat | Release | Deliver
ToConsumer = PeerWelcome | Refused | RegionOpened | Claimed | Computed | Withdrawn | Done | CallRefused

_T = TypeVar("_T")
_encoder = msgspec.msgpack.Encoder()
_any_hello = msgspec.msgpack.Decoder(_AnyHello)
from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_consumer: msgspec.msgpack.Decoder[FromConsumer] = msgspec.msgpack.Decoder(FromConsumer)
to_consumer: msgspec.msgpack.Decoder[ToConsumer] = msgspec.msgpack.Decoder(ToConsumer)


def encode(message: Message) -> bytes:
    """The payload of a frame."""
    return _encoder.encode(message)


def decode(decoder: msgspec.msgpack.Decoder[_T], payload: bytes) -> _T:
    """The message in `payload`. Raises FrameError on garbage, an unknown type or a field of a wrong type."""
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise FrameError(f"not a message: {error}") from error


def version_fault(payload: bytes, expected_type: str) -> str:
    """Why the first frame of a connection is not a hello of our version; "" if it is. Raises FrameError on garbage."""
    hello = decode(_any_hello, payload)
    if hello.type != expected_type:
        raise FrameError(f"the connection began with {hello.type!r} instead of {expected_type!r}")
    if hello.version != PROTOCOL_VERSION:
        return f"the protocol version differs: here {PROTOCOL_VERSION}, there {hello.version}"
    return ""
