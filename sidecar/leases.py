"""Leases: which blocks of our pool may be read by whom, until when. Pure: a state table, a heap, time as `now`.

A lease is offered by the engine, claimed by one consumer before it reads a byte, and released after. A claim extends
the lease while its heartbeats come; a claimant whose connection dies gives it back. What ended is remembered for a
while, so that a late reader hears why.

A consumer of several ranks reads a lease with several readers (see Reader): it is consumed when all of them have read,
and stays whole until then, so that a group that failed in the middle can be followed by another that begins anew.
"""

from __future__ import annotations

import heapq
import hmac
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from sidecar.errors import Refusal
from sidecar.ready import Ready, follows


class State(StrEnum):
    OFFERED = "offered"
    CLAIMED = "claimed"
    CONSUMED = "consumed"
    DROPPED = "dropped"
    EXPIRED = "expired"
    REVOKED = "revoked"


class Happening(StrEnum):
    CLAIM = "claim"
    HEARTBEAT = "heartbeat"
    CONSUME = "consume"  # by the last of its readers
    LEAVE = "leave"  # one of several readers has read or gives up, others still read
    RETURN = "return"  # nobody reads any more, and not all have read
    DROP = "drop"
    EXPIRE = "expire"
    REVOKE = "revoke"


TRANSITIONS: dict[tuple[State, Happening], State] = {
    (State.OFFERED, Happening.CLAIM): State.CLAIMED,
    (State.OFFERED, Happening.DROP): State.DROPPED,
    (State.OFFERED, Happening.EXPIRE): State.EXPIRED,
    (State.OFFERED, Happening.REVOKE): State.REVOKED,
    (State.CLAIMED, Happening.CLAIM): State.CLAIMED,  # another of its readers, or one over a new connection
    (State.CLAIMED, Happening.HEARTBEAT): State.CLAIMED,
    (State.CLAIMED, Happening.CONSUME): State.CONSUMED,
    (State.CLAIMED, Happening.LEAVE): State.CLAIMED,
    (State.CLAIMED, Happening.RETURN): State.OFFERED,
    (State.CLAIMED, Happening.DROP): State.DROPPED,
    (State.CLAIMED, Happening.EXPIRE): State.EXPIRED,
    (State.CLAIMED, Happening.REVOKE): State.REVOKED,
}
"""What is legal; everything else is refused. CONSUMED, DROPPED, EXPIRED and REVOKED are final."""

FINAL = frozenset({State.CONSUMED, State.DROPPED, State.EXPIRED, State.REVOKED})
MAX_READERS = 4096
MAX_REMEMBERED = 4096
"""Ended leases that can still be told from unknown ones; about half a megabyte."""


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who claims: an engine, through one connection."""

    engine_id: str
    connection_id: int


@dataclass(frozen=True, slots=True)
class Reader:
    """Reader number `index` of `num_readers` that read the lease together, for the request that `group` names."""

    group: str = ""
    index: int = 0
    num_readers: int = 1


ALONE = Reader()


@dataclass(slots=True)
class Lease:
    """Blocks handed out. `expires_at` moves with claims and heartbeats, `offer_expires_at` does not.

    `readers` has the index of each reader that reads now, by the id of its connection, `have_read` those that have.
    """

    transfer_id: str
    token: str
    request_id: str
    block_ids: tuple[int, ...]
    num_tokens: int
    offer_expires_at: float
    expires_at: float
    state: State = State.OFFERED
    claimant: Claimant | None = None
    claimed_at: float = 0.0
    ready: Ready | None = None
    """How much is computed, normal; None: all."""
    num_blocks: int = 0
    """Of the whole lease; `block_ids` has the first of them while it is computed."""
    group: tuple[str, str, int] = ("", "", 1)
    readers: dict[int, int] = field(default_factory=dict)
    have_read: set[int] = field(default_factory=set)


class LeaseTable:
    """Every live lease of one registration. Each lease that ends stands once in `take_ended()`."""

    def __init__(self, *, claim_ttl_s: float, max_claim_s: float, max_leases: int) -> None:
        self._claim_ttl_s = claim_ttl_s
        self._max_claim_s = max_claim_s
        self._max_leases = max_leases
        self._leases: dict[str, Lease] = {}
        self._expiries: list[tuple[float, str]] = []
        self._remembered: OrderedDict[str, State] = OrderedDict()
        self._ended: list[tuple[str, State]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def count(self, state: State) -> int:
        """How many live leases are in `state`."""
        return sum(lease.state is state for lease in self._leases.values())

    def offer(
        self,
        transfer_id: str,
        token: str,
        request_id: str,
        block_ids: Sequence[int],
        num_tokens: int,
        ttl_s: float,
        now: float,
        ready: Ready | None = None,
        num_blocks: int = 0,
    ) -> Lease:
        """A new lease until `now + ttl_s`; `num_blocks` as in PushBlocks.

        Raises Refusal("invalid") at the limit of leases.
        """
        if len(self._leases) >= self._max_leases:
            raise Refusal("invalid", f"{self._max_leases} leases are out, which is the limit")
        expires_at = now + ttl_s
        lease = Lease(transfer_id, token, request_id, tuple(block_ids), num_tokens, expires_at, expires_at)
        lease.ready, lease.num_blocks = ready, max(num_blocks, len(lease.block_ids))
        self._leases[transfer_id] = lease
        heapq.heappush(self._expiries, (expires_at, transfer_id))
        return lease

    def claim(self, transfer_id: str, token: str, claimant: Claimant, now: float, reader: Reader = ALONE) -> Lease:
        """Give the lease to `claimant` as one reader; a new group begins anew. Raises Refusal."""
        lease = self._find(transfer_id, token, claimant.engine_id, now)
        group = (claimant.engine_id, reader.group, reader.num_readers)
        if not 0 <= reader.index < reader.num_readers <= MAX_READERS:
            raise Refusal("invalid", f"reader {reader.index} of {reader.num_readers} makes no sense")
        if group != lease.group:
            if lease.readers:
                raise Refusal("wrong_engine", f"transfer {transfer_id!r} is being read for another request")
            lease.group = group
            lease.have_read.clear()
        self._step(lease, Happening.CLAIM)
        if lease.claimant is None:
            lease.claimed_at = now
        lease.claimant = claimant
        lease.readers = {connection: index for connection, index in lease.readers.items() if index != reader.index} | {
            claimant.connection_id: reader.index
        }
        lease.have_read.discard(reader.index)
        lease.expires_at = max(lease.expires_at, now + self._claim_ttl_s)
        return lease

    def advance(self, transfer_id: str, ready: Ready, more_block_ids: Sequence[int] = ()) -> Lease | None:
        """More is computed, `ready` being normal; None if the lease has ended. Raises Refusal on a step back."""
        lease = self._leases.get(transfer_id)
        if lease is None:
            return None
        has_blocks = len(lease.block_ids) + len(more_block_ids)
        if has_blocks > lease.num_blocks:
            raise Refusal("invalid", f"transfer {transfer_id!r} has {lease.num_blocks} blocks, not {has_blocks}")
        if lease.ready is None or ready.end_block > has_blocks or not follows(lease.ready, ready):
            raise Refusal("invalid", f"transfer {transfer_id!r} was computed as far as {lease.ready}, not to {ready}")
        lease.ready = ready
        if more_block_ids:
            lease.block_ids += tuple(more_block_ids)
        return lease

    def heartbeat(self, transfer_id: str, token: str, claimant: Claimant, now: float) -> Lease:
        """Extend a claimed lease, up to the longest claim. Raises Refusal."""
        lease = self._find(transfer_id, token, claimant.engine_id, now)
        self._step(lease, Happening.HEARTBEAT)
        longest = lease.claimed_at + self._max_claim_s
        lease.expires_at = max(lease.expires_at, min(now + self._claim_ttl_s, longest))
        return lease

    def consume(self, transfer_id: str, token: str, claimant: Claimant, now: float) -> None:
        """Confirm that what `claimant` read was valid until now; after its last reader the lease ends.

        Raises Refusal if it was not valid, or not claimed over this connection.
        """
        lease = self._find(transfer_id, token, claimant.engine_id, now)
        if lease.ready is not None and lease.ready.first_block < lease.num_blocks:
            raise Refusal("invalid", f"transfer {transfer_id!r} is not computed yet: nobody can have read it")
        index = self._leave(lease, claimant)
        lease.have_read.add(index)
        if len(lease.have_read) == lease.group[2]:
            self._end(lease, Happening.CONSUME)
        elif lease.readers:
            self._step(lease, Happening.LEAVE)
        else:
            self._return(lease, now)

    def give_back(self, transfer_id: str, token: str, claimant: Claimant, now: float) -> None:
        """The claimant did not read it; it may be claimed again while the offer lasts. Raises Refusal."""
        lease = self._find(transfer_id, token, claimant.engine_id, now)
        self._leave(lease, claimant)
        if lease.readers:
            self._step(lease, Happening.LEAVE)
        else:
            self._return(lease, now)

    def drop(self, transfer_id: str, token: str, engine_id: str, now: float) -> None:
        """Nobody will read it. Raises Refusal, also if another engine has it claimed."""
        self._end(self._find(transfer_id, token, engine_id, now), Happening.DROP)

    def revoke(self, transfer_id: str) -> bool:
        """The producer takes it back; False if it had ended."""
        lease = self._leases.get(transfer_id)
        if lease is None:
            return False
        self._end(lease, Happening.REVOKE)
        return True

    def unwanted(self, transfer_id: str) -> None:
        """The one it was meant for has said that it will not be read; an ended one is left alone."""
        lease = self._leases.get(transfer_id)
        if lease is not None:
            self._end(lease, Happening.DROP)

    def connection_lost(self, connection_id: int, now: float) -> None:
        """Give back all that was claimed through this connection."""
        for lease in [lease for lease in self._leases.values() if connection_id in lease.readers]:
            del lease.readers[connection_id]
            if lease.readers:
                self._step(lease, Happening.LEAVE)
            else:
                self._return(lease, now)

    def expire(self, now: float) -> None:
        """End every lease whose time has run out."""
        while self._expiries and self._expiries[0][0] <= now:
            _, transfer_id = heapq.heappop(self._expiries)
            lease = self._leases.get(transfer_id)
            if lease is None:
                continue
            if lease.expires_at <= now:
                self._end(lease, Happening.EXPIRE)
            else:
                heapq.heappush(self._expiries, (lease.expires_at, transfer_id))

    def next_expiry(self) -> float | None:
        """When `expire` has something to look at; None with no lease out."""
        if not self._leases:
            self._expiries.clear()
        return self._expiries[0][0] if self._expiries else None

    def void(self) -> list[str]:
        """End everything because the pool is gone; the ids that were live."""
        ids = list(self._leases)
        for transfer_id in ids:
            self._end(self._leases[transfer_id], Happening.REVOKE)
        return ids

    def take_ended(self) -> list[tuple[str, State]]:
        """Leases that have ended since the last call, with the state they ended in."""
        ended, self._ended = self._ended, []
        return ended

    def _find(self, transfer_id: str, token: str, engine_id: str, now: float) -> Lease:
        lease = self._leases.get(transfer_id)
        if lease is None:
            state = self._remembered.get(transfer_id)
            if state is None:
                raise Refusal("unknown", f"no transfer {transfer_id!r} here")
            if state is State.EXPIRED:
                raise Refusal("expired", f"the lease of transfer {transfer_id!r} has expired")
            raise Refusal("released", f"transfer {transfer_id!r} was {state}")
        if not hmac.compare_digest(lease.token.encode(), token.encode(errors="replace")):
            raise Refusal("wrong_token", f"the token is not that of transfer {transfer_id!r}")
        if lease.expires_at <= now:
            self._end(lease, Happening.EXPIRE)
            raise Refusal("expired", f"the lease of transfer {transfer_id!r} has expired")
        if lease.claimant is not None and lease.claimant.engine_id != engine_id:
            raise Refusal("wrong_engine", f"transfer {transfer_id!r} is claimed by engine {lease.claimant.engine_id!r}")
        return lease

    def _step(self, lease: Lease, happening: Happening) -> None:
        state = TRANSITIONS.get((lease.state, happening))
        if state is None:
            raise Refusal("unknown", f"transfer {lease.transfer_id!r} is {lease.state}: no {happening} possible")
        lease.state = state

    def _leave(self, lease: Lease, claimant: Claimant) -> int:
        """The index of the reader that leaves. Raises Refusal if none reads over this connection."""
        index = lease.readers.pop(claimant.connection_id, None)
        if index is None:
            raise Refusal("unknown", f"transfer {lease.transfer_id!r} is not claimed over this connection")
        return index

    def _return(self, lease: Lease, now: float) -> None:
        """Back to the time of the offer; with some of it read, to the last claim's, for the readers yet to come."""
        self._step(lease, Happening.RETURN)
        lease.claimant = None
        if not lease.have_read:
            lease.expires_at = lease.offer_expires_at
        if lease.expires_at <= now:
            self._end(lease, Happening.EXPIRE)
        else:
            heapq.heappush(self._expiries, (lease.expires_at, lease.transfer_id))

    def _end(self, lease: Lease, happening: Happening) -> None:
        self._step(lease, happening)
        del self._leases[lease.transfer_id]
        self._remembered[lease.transfer_id] = lease.state
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        self._ended.append((lease.transfer_id, lease.state))
