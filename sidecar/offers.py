"""The lease table with a clock: hands out offers, ends what expires, tells the engine what has ended."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence

from sidecar.config import SidecarConfig
from sidecar.errors import OfferRefused, Refusal
from sidecar.lease_board import LeaseBoard, mark_of
from sidecar.leases import ALONE, Claimant, Lease, LeaseTable, Reader, State
from sidecar.message import pack_block_ids
from sidecar.metrics import SidecarMetrics
from sidecar.protocol import Computed, MarkReady, Message, Offer, OfferBlocks, OfferEnded, PushBlocks, Withdrawn
from sidecar.ready import mark_fault, normal


class Offers:
    """Every lease on one registered pool. `on_ended` is called once for each lease that ends."""

    def __init__(
        self,
        config: SidecarConfig,
        epoch: str,
        num_blocks: int,
        metrics: SidecarMetrics,
        on_ended: Callable[[OfferEnded], None],
        num_layers: int = 1,
        board: LeaseBoard | None = None,
    ) -> None:
        """`board`: where consumers on this host see which leases are valid."""
        self._table = LeaseTable(
            claim_ttl_s=config.claim_ttl_s, max_claim_s=config.max_claim_s, max_leases=config.max_leases
        )
        self._epoch = epoch
        self._num_blocks = num_blocks
        self._num_layers = num_layers
        self._followers: dict[str, Callable[[Message], None]] = {}
        self.board = board
        self._marks: dict[str, int] = {}
        """What stands on the board, by transfer id."""
        self._metrics = metrics
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._settling = False

    def count(self, state: State) -> int:
        """Live leases in `state`."""
        return self._table.count(state)

    def offer(self, request: OfferBlocks | PushBlocks) -> Offer:
        """Lease the engine's blocks. Raises OfferRefused."""
        block_ids = request.block_ids
        ready, num_blocks = None, 0
        if isinstance(request, PushBlocks):
            num_blocks = request.num_blocks
            if fault := mark_fault(request.ready, len(block_ids), self._num_layers):
                raise OfferRefused(fault)
            ready = normal(request.ready, self._num_layers)
        if fault := self._fault(block_ids):
            self._metrics.offer_refused("invalid")
            raise OfferRefused(fault)
        transfer_id, token = secrets.token_hex(8), secrets.token_hex(16)
        now = self._loop.time()
        try:
            self._table.offer(
                transfer_id, token, request.request_id, block_ids, request.num_tokens, request.ttl_s, now, ready,
                num_blocks,
            )  # fmt: skip
        except Refusal as refusal:
            self._metrics.offer_refused(refusal.reason)
            raise OfferRefused(refusal.message) from refusal
        if self.board is not None and ready is None:
            mark = mark_of(transfer_id, token, pack_block_ids(block_ids))
            if self.board.post(mark, request.ttl_s):
                self._marks[transfer_id] = mark
        self._settle()
        return Offer(transfer_id, token, self._epoch, time.time() + request.ttl_s, request.call_id)

    def claim(self, transfer_id: str, token: str, claimant: Claimant, reader: Reader = ALONE) -> tuple[Lease, float]:
        """The lease, now that reader's, and the seconds it lasts without a heartbeat. Raises Refusal."""
        now = self._loop.time()
        try:
            lease = self._table.claim(transfer_id, token, claimant, now, reader)
            self._take_off(transfer_id)  # whoever else wants it has to ask
        finally:
            self._settle_soon()
        return lease, lease.expires_at - now

    def advance(self, mark: MarkReady) -> None:
        """More of a push is computed: whoever has claimed it is told. Raises Refusal on a mark that is none."""
        if fault := mark_fault(mark.ready, mark.ready.end_block, self._num_layers) or self._fault(mark.block_ids):
            raise Refusal("invalid", fault)
        ready = normal(mark.ready, self._num_layers)
        if self._table.advance(mark.transfer_id, ready, mark.block_ids) is None:
            return
        if (follower := self._followers.get(mark.transfer_id)) is not None:
            follower(Computed(mark.transfer_id, ready, mark.block_ids))

    def follow(self, lease: Lease, tell: Callable[[Message], None]) -> None:
        """Tell the one who claimed `lease` of all that happens to it, for as long as it is computed."""
        if lease.ready is not None:
            self._followers[lease.transfer_id] = tell

    def heartbeat(self, transfer_id: str, token: str, claimant: Claimant) -> None:
        """Extend a claim. Raises Refusal."""
        try:
            self._table.heartbeat(transfer_id, token, claimant, self._loop.time())
        finally:
            self._settle_soon()

    def release(self, transfer_id: str, token: str, claimant: Claimant, outcome: str) -> None:
        """End a claim as consumed, returned or dropped. Raises Refusal."""
        now = self._loop.time()
        try:
            if outcome == "consumed":
                self._table.consume(transfer_id, token, claimant, now)
            elif outcome == "returned":
                self._table.give_back(transfer_id, token, claimant, now)
            elif outcome == "dropped":
                self._table.drop(transfer_id, token, claimant.engine_id, now)
            elif outcome == "read":
                self._table.claim(transfer_id, token, claimant, now)
                self._table.consume(transfer_id, token, claimant, now)
            else:
                raise Refusal("invalid", f"a release is consumed, read, returned or dropped, not {outcome!r}")
        finally:
            self._settle_soon()

    def revoke(self, transfer_id: str) -> None:
        """The engine takes an offer back; one that has ended is left alone."""
        self._table.revoke(transfer_id)
        self._settle()

    def unwanted(self, transfer_id: str) -> None:
        """Its consumer has given up before it claimed; an offer that has ended is left alone."""
        self._table.unwanted(transfer_id)
        self._settle()

    def connection_lost(self, connection_id: int) -> None:
        """What a consumer had claimed through this connection may be claimed again."""
        self._table.connection_lost(connection_id, self._loop.time())
        self._settle()

    def close(self) -> None:
        """The pool goes away: every lease ends as revoked."""
        self._table.void()
        self._settle()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fault(self, block_ids: Sequence[int]) -> str:
        """Why these are no blocks of the pool; "" if they are."""
        if not block_ids or max(block_ids) < self._num_blocks:
            return ""
        return f"block {max(block_ids)} is not in the pool of {self._num_blocks} blocks"

    def _take_off(self, transfer_id: str) -> None:
        mark = self._marks.pop(transfer_id, 0)
        if self.board is not None and mark:
            self.board.take_off(mark)

    def _settle_soon(self) -> None:
        """Settle once the answer to the consumer, who waits for it, has been sent."""
        if not self._settling:
            self._settling = True
            self._loop.call_soon(self._settle)

    def _settle(self) -> None:
        """Report what ended and set the timer to the next expiry."""
        self._settling = False
        for transfer_id, state in self._table.take_ended():
            self._take_off(transfer_id)  # before the engine hears, who then writes into these blocks
            self._metrics.offer_ended(str(state))
            follower = self._followers.pop(transfer_id, None)
            if follower is not None and state in (State.REVOKED, State.EXPIRED):
                reason = "expired" if state is State.EXPIRED else "released"
                follower(Withdrawn(transfer_id, reason, f"the producer's lease was {state} before all was computed"))
            self._on_ended(OfferEnded(transfer_id, str(state)))
        next_expiry = self._table.next_expiry()
        if self._timer is not None:
            if next_expiry is not None and self._timer_at <= next_expiry:
                return
            self._timer.cancel()
            self._timer = None
        if next_expiry is not None:
            self._timer = self._loop.call_at(next_expiry, self._expire)
            self._timer_at = next_expiry

    def _expire(self) -> None:
        self._timer = None
        self._table.expire(self._loop.time())
        self._settle()
