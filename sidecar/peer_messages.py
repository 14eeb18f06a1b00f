"""The messages between sidecars (see protocol). Pure."""

from __future__ import annotations

from sidecar.layout import KvLayout
from sidecar.message import Id, Message, Natural, PullSource
from sidecar.ready import Ready


class PeerHello(Message, tag="peer_hello", frozen=True):
    """A consumer's sidecar introduces itself and names the producer and the registration that it wants to read."""

    version: int
    engine_id: Id
    rank: int
    sidecar_epoch: Id
    boot_id: Id
    transports: tuple[str, ...]
    wants_engine_id: Id
    wants_epoch: Id
    layout: KvLayout | None


class PeerWelcome(Message, tag="peer_welcome", frozen=True):
    """`mismatch` is not empty if claims will be refused as incompatible; drops are still taken."""

    version: int
    engine_id: str
    epoch: str
    boot_id: str
    transports: tuple[str, ...]
    peer_socket: str
    layout: KvLayout
    mismatch: str


class OpenRegion(Message, tag="open_region", frozen=True):
    """Ask for the producer's pool over `transport`; over shm the answer carries a read-only descriptor."""

    call_id: Natural
    transport: str


class RegionOpened(Message, tag="region_opened", frozen=True):
    """`session` and `base_address` are Mooncake's names for the serving end; over shm a descriptor comes along.

    With `with_board` another one follows it: of the board on which the valid leases stand (see lease_board).
    """

    call_id: Natural
    num_bytes: Natural
    with_descriptor: bool = False
    session: str = ""
    base_address: Natural = 0
    with_board: bool = False


class Claim(Message, tag="claim", frozen=True):
    """As reader number `reader` of the `num_readers` that read the lease for the request that `group` names."""

    call_id: Natural
    transfer_id: Id
    token: Id
    group: Id = ""
    reader: Natural = 0
    num_readers: Natural = 1


class Claimed(Message, tag="claimed", frozen=True):
    """The lease's blocks: the only list a consumer may read by."""

    call_id: Natural
    block_ids: list[Natural]
    num_tokens: Natural
    expires_in_s: float
    ready: Ready | None = None  # None: all is computed; else Computed follows on this connection until it is
    num_blocks: Natural = 0  # of the whole lease, whose other blocks come with Computed; 0: these are all


class Computed(Message, tag="computed", frozen=True):
    """More of a claimed lease is computed; `block_ids` are its next blocks."""

    transfer_id: str
    ready: Ready
    block_ids: tuple[Natural, ...] = ()


class Withdrawn(Message, tag="withdrawn", frozen=True):
    """A claimed lease that is still computed has ended without its consumer; what was read of it is void."""

    transfer_id: str
    reason: str
    message: str


class Deliver(Message, tag="deliver", frozen=True):
    """From a producer's sidecar: `source` is computed for the landing; answered by Done, then the consumer claims."""

    call_id: Natural
    landing_id: Id
    token: Id
    source: PullSource


class Heartbeat(Message, tag="heartbeat", frozen=True):
    call_id: Natural
    transfer_id: Id
    token: Id


class Release(Message, tag="release", frozen=True):
    """`outcome`: consumed (confirmed only if the lease was still valid), returned (may be claimed again), dropped.

    Or read: consumed without a claim, as the board showed that it was valid; nothing depends on the answer.
    """

    call_id: Natural
    transfer_id: Id
    token: Id
    outcome: str


class Done(Message, tag="done", frozen=True):
    """The heartbeat was taken or the release was valid."""

    call_id: Natural


class CallRefused(Message, tag="call_refused", frozen=True):
    call_id: Natural
    reason: str
    message: str
