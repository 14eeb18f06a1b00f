"""One lease that a pull reads: reach the producer's rank, claim, copy, release.

Where its blocks are known and the producer's board says whether they are leased, it is copied at once, see `begin`.

A reading waits for one thing at a time; `interrupt` ends that wait, whoever has a reason: its pull was abandoned or out
of time, its peer or its lease was lost, another of its pull's readings failed. `copy` and `confirm` return or raise
only when nothing of it writes any more.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sidecar.config import SidecarConfig
from sidecar.errors import PeerLost, Refusal
from sidecar.lease_board import BoardView, mark_of
from sidecar.leases import Reader
from sidecar.peers import Link, PeerTable
from sidecar.protocol import Claimed, Computed, Pull, PullSource, Withdrawn
from sidecar.ready import PartPlans, Ready
from sidecar.registration import Registration
from sidecar.reshard import Source
from sidecar.spans import Destination, Spans, check_spans
from sidecar.transfer import Happening, Progress, State
from sidecar.transport.contract import COPIED, VOID, PendingCopy

MAX_UNCLAIMED_S = 0.05
"""Of copying. What takes longer is claimed first: a claim keeps others away and lives past the offer's expiry."""
COPY_BYTES_PER_S = 5 << 30
"""Where the config sets no limit; about what an older server's core copies."""
WIRE_BYTES_PER_S = 2 << 30
"""Likewise between hosts."""
MAX_PLANNED_AT_ONCE = 20_000
"""Pieces planned on the event loop: some 10 ms. More are planned in a thread, so that other pulls' leases live on."""

_T = TypeVar("_T")


class Interrupted(Refusal):
    """The reading has to end before its time."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """Our side of every reading; `drop` tells a producer that nobody will read a lease."""

    config: SidecarConfig
    registration: Registration
    peers: PeerTable
    drop: Callable[[PullSource], None]


@dataclass(frozen=True, slots=True)
class _Unclaimed:
    """A copy that is worth something if `mark` still stands on the board when it has ended: `board`, or else the copy's
    outcome says so."""

    link: Link
    board: BoardView | None
    mark: int
    num_bytes: int
    copy: PendingCopy


class Reading:
    """The share of one pull that comes from one lease."""

    def __init__(self, consumer: Consumer, request: Pull, chosen: Source) -> None:
        self.source = request.sources[chosen.rank]
        self.progress = Progress()
        self.transport = ""
        self.num_bytes = 0
        self.unwanted = False
        self.claimed = False
        self._unclaimed: _Unclaimed | None = None
        self._consumer = consumer
        self._request = request
        self._rank = chosen.rank
        self._reader = Reader(request.pull_id, chosen.reader, chosen.num_readers)
        self._link: Link | None = None
        self._interruption: Interrupted | None = None
        self._waiter: asyncio.Future[object] | None = None
        self._ready: Ready | None = None
        self._more_block_ids: list[int] = []
        """Of the lease, that have come since it was claimed."""
        self._news: asyncio.Future[None] | None = None

    @property
    def peer(self) -> str:
        """For people: engine_id@host:port."""
        return f"{self.source.engine_id}@{self.source.host}:{self.source.port}"

    def interrupt(self, reason: str, message: str) -> None:
        """End what the reading waits for. The first reason counts."""
        if self._interruption is not None:
            return
        self._interruption = Interrupted(reason, message)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self._interruption)

    def follow(self, message: Computed | Withdrawn) -> None:
        """What the producer says of a lease that is still computed."""
        if isinstance(message, Withdrawn):
            self.interrupt(message.reason, message.message)
            return
        self._ready = message.ready
        self._more_block_ids += message.block_ids
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def copy(self) -> None:
        """Everything up to the release; the lease is kept alive until then. Raises Refusal, having let it go."""
        if self._unclaimed is not None and await self._copy_unclaimed(self._unclaimed):
            return
        link, claimed, destination = await self._claim()
        self._link, self.claimed = link, True
        link.readers.add(self)
        try:
            if claimed.ready is not None:
                await self._copy_as_ready(link, claimed, claimed.ready)
            elif spans := await self._plan_all(link, claimed.block_ids, destination):
                await self._copy(link, spans)
                self.num_bytes = spans.num_bytes
        except Refusal:
            self._fail(link)
            raise
        except Exception:
            link.readers.discard(self)
            raise
        self.progress.step(Happening.COPIED)

    def begin(self) -> None:
        """Begin to copy by the producer's board, without a claim, if that can be; then `copy`.

        A mark stands for this transfer, its token and these very blocks, from the offer until before the producer's
        engine hears of the lease's end, and never again (see lease_board). So blocks whose mark is there after they
        were copied were not written meanwhile; on one host we look, else the producer does. What it does not show then
        is as if it had not been copied: our blocks are ours until the pull is reported, and the claim tells the rest.
        """
        source = self.source
        packed = source.packed_block_ids
        if not packed or len(packed) % 8 or len(self._request.sources) != 1 or self._reader.num_readers != 1:
            return  # with several readers, each claims: the first to have read would end the lease for the others
        link = self._consumer.peers.live(source)
        if link is None or link.reshard is not None or link.control.closed:
            return
        board, bytes_per_s = link.board, self._consumer.config.copy_bytes_per_s
        if board is None and not link.memory.checks_marks:
            return
        mark = mark_of(source.transfer_id, source.token, packed)
        if board is not None and not board.holds(mark):
            return
        try:
            self._check_rank(link)
            destination = Destination(self._consumer.registration.layout, self._request.local_block_ids)
            spans = self._plan(link, array("Q", packed), destination)
            num_bytes = spans.num_bytes
            copies_s = num_bytes / (bytes_per_s or (WIRE_BYTES_PER_S if board is None else COPY_BYTES_PER_S))
            if not 0 < copies_s <= MAX_UNCLAIMED_S:
                return
            copy = link.memory.read(spans, mark if board is None else 0)
            self._unclaimed = _Unclaimed(link, board, mark, num_bytes, copy)
        except Refusal:
            return  # the claim says it again, and lets the lease go
        self.transport = link.memory.transport
        self.progress.step(Happening.BEGUN)
        link.readers.add(self)

    async def _copy_unclaimed(self, begun: _Unclaimed) -> bool:
        """What `begin` began; False if it is void, and the lease has to be claimed."""
        try:
            outcome = await self._copied(begun.link, begun.copy, (COPIED, VOID))
        except Refusal:
            if self.progress.state is not State.ENDED:
                self.progress.step(Happening.FAILED)
            if self.unwanted:
                self._consumer.drop(self.source)
            raise
        finally:
            begun.link.readers.discard(self)
        if outcome == VOID or (begun.board is not None and not begun.board.holds(begun.mark)):
            self.progress.step(Happening.VOID)
            return False
        self._link, self.num_bytes = begun.link, begun.num_bytes
        self.progress.step(Happening.COPIED)
        return True

    async def confirm(self) -> None:
        """After `copy`: release the lease as consumed. Raises Refusal if it was not valid until now."""
        if not self.claimed and self._link is not None:
            asyncio.get_running_loop().call_soon(self._link.release, self.source, "read")  # after the report
            self.progress.step(Happening.CONFIRMED)
            return
        link = self._leave()
        try:
            await self._wait(link.release(self.source, "consumed"))
        except Refusal:
            self._fail(link)
            raise
        self.progress.step(Happening.CONFIRMED)

    def give_back(self) -> None:
        """After `copy`, instead of `confirm`: what was copied is of no use, another may claim the lease."""
        link = self._leave()
        self.progress.step(Happening.FAILED)
        if self.unwanted:
            self._consumer.drop(self.source)
        elif not link.control.closed:
            link.release(self.source, "returned")

    def _leave(self) -> Link:
        """No more heartbeats: the lease is let go next."""
        assert self._link is not None
        self._link.readers.discard(self)
        self._link.follow(self.source, None)
        return self._link

    async def _wait(self, awaited: asyncio.Future[_T]) -> _T:
        """The result of `awaited`, which goes on undisturbed if this reading is interrupted. Raises Interrupted."""
        if self._interruption is not None:
            raise self._interruption
        if awaited.done():
            return awaited.result()
        waiter: asyncio.Future[_T] = asyncio.get_running_loop().create_future()

        def hand_on(done: asyncio.Future[_T]) -> None:
            if waiter.done():
                return
            if done.cancelled():
                waiter.set_exception(PeerLost("the connection was given up"))
            elif error := done.exception():
                waiter.set_exception(error)
            else:
                waiter.set_result(done.result())

        awaited.add_done_callback(hand_on)
        self._waiter = waiter  # type: ignore[assignment]
        try:
            return await waiter
        finally:
            self._waiter = None
            awaited.remove_done_callback(hand_on)

    async def _claim(self) -> tuple[Link, Claimed, Destination | None]:
        """Reach the producer and claim the lease; a pooled connection that turns out dead is replaced once."""
        source, peers = self.source, self._consumer.peers
        may_retry = True
        while True:
            try:
                link = peers.live(source)
                if link is None:
                    link = await self._wait(peers.connect(source))
                self._check_rank(link)
            except Refusal as refusal:
                self._step_out(refusal)
                raise
            self.transport = link.memory.transport
            self.progress.step(Happening.CONNECTED)
            destination = None
            try:
                self._more_block_ids = []
                link.follow(source, self.follow)  # before the claim: marks may come right behind its answer
                answer = link.claim(source, self._reader)
                if link.reshard is None:
                    destination = Destination(self._consumer.registration.layout, self._request.local_block_ids)
                claimed = await self._wait(answer)
            except PeerLost as lost:
                if not may_retry:
                    self._step_out(lost)
                    raise
                may_retry = False
                self.progress.step(Happening.PEER_STALE)
                continue
            except Refusal as refusal:
                link.follow(source, None)
                self._step_out(refusal)
                if isinstance(refusal, Interrupted) and not self.unwanted:
                    link.release(source, "returned")  # behind the claim on the same connection
                raise
            assert isinstance(claimed, Claimed)
            self.progress.step(Happening.CLAIMED)
            return link, claimed, destination

    def _check_rank(self, link: Link) -> None:
        """Another rank than the one that was chosen would leave part of our blocks unwritten. Raises Refusal."""
        layout, request = link.layout, self._request
        stages, num_given = max(1, len(layout.stage_layers)), len(request.sources)
        place, num_ranks = layout.pp_rank * layout.tp_size + layout.tp_rank, layout.tp_size * stages
        if (place, num_ranks) != (self._rank, num_given):
            raise Refusal(
                "incompatible",
                f"{link.name} is rank {place} of {num_ranks}, it was given as rank {self._rank} of {num_given}",
            )
        if stages > 1 and layout.stage_layers != request.stage_layers:
            raise Refusal(
                "incompatible",
                f"{link.name} has stage_layers {layout.stage_layers}, the pull says {request.stage_layers}",
            )

    async def _plan_all(self, link: Link, block_ids: list[int], destination: Destination | None = None) -> Spans:
        if link.reshard is not None and link.reshard.pieces(len(self._request.local_block_ids)) > MAX_PLANNED_AT_ONCE:
            return await asyncio.to_thread(self._plan, link, block_ids, destination)
        return self._plan(link, block_ids, destination)

    def _plan(self, link: Link, block_ids: Sequence[int], destination: Destination | None) -> Spans:
        request = self._request
        local, first = request.local_block_ids, request.first_block
        if destination is None:
            assert link.reshard is not None
            spans = link.reshard.plan(block_ids, local, first)
        else:
            self._check_wanted(len(block_ids))
            spans = destination.plan(link.layout, block_ids[first : first + len(local)])
        check_spans(spans, link.num_bytes, self._consumer.registration.region.num_bytes)
        return spans

    def _check_wanted(self, num_blocks: int) -> None:
        """Raises Refusal where a lease of so many blocks has not all that the pull is for."""
        first, end = self._request.first_block, self._request.first_block + len(self._request.local_block_ids)
        if end > num_blocks:
            raise Refusal("invalid", f"blocks {first} to {end} were asked for, the lease has {num_blocks}")

    async def _copy_as_ready(self, link: Link, claimed: Claimed, ready: Ready) -> None:
        """Copy what is computed and wait for more, until all is here. Raises Refusal, with nothing writing any more."""
        request, registration = self._request, self._consumer.registration
        num_blocks = max(len(claimed.block_ids), claimed.num_blocks)
        plans = PartPlans(link.layout, registration.layout, request.local_block_ids, request.first_block)
        if link.reshard is None:
            self._check_wanted(num_blocks)
        self._ready = self._ready or ready
        self.progress.step(Happening.PART_COPIED)
        while plans.copied.first_block < num_blocks:
            block_ids = claimed.block_ids + self._more_block_ids
            now_ready = plans.checked(self._ready, len(block_ids))
            if now_ready == plans.copied or (link.reshard is not None and now_ready.first_block < num_blocks):
                self._news = asyncio.get_running_loop().create_future()
                if link.reshard is None:
                    plans.look_ahead(block_ids)
                await self._wait(self._news)
                continue
            if link.reshard is not None:
                spans, plans.copied = await self._plan_all(link, block_ids), now_ready
            else:
                spans = plans.take(now_ready, block_ids)
                check_spans(spans, link.num_bytes, registration.region.num_bytes)
            if spans:
                self.progress.step(Happening.MORE_READY)
                await self._copy(link, spans)
                self.num_bytes += spans.num_bytes
                self.progress.step(Happening.PART_COPIED)

    async def _copy(self, link: Link, spans: Spans) -> None:
        """Copy, beating for the lease meanwhile. Raises Refusal when nothing writes any more."""
        if link.control.closed:
            raise PeerLost(f"the connection to {link.name} ended")
        await self._copied(link, link.memory.read(spans))

    async def _copied(self, link: Link, copy: PendingCopy, good: tuple[str, ...] = (COPIED,)) -> str:
        """The copy's end, one that is `good`. Raises Refusal when nothing writes any more."""
        peers = self._consumer.peers
        try:
            outcome = await self._wait(copy.ended)
        except Interrupted:
            self.progress.step(Happening.INTERRUPTED)
            copy.stop()
            await asyncio.wait([copy.ended], timeout=self._consumer.config.stop_grace_s)
            if not copy.ended.done():
                await peers.cut(link, "a copy did not stop")
                await copy.ended
            self.progress.step(Happening.STOPPED)
            raise
        if outcome not in good:
            await peers.cut(link, outcome)
            raise Refusal("transport", outcome)
        return outcome

    def _fail(self, link: Link) -> None:
        """After the claim: give the lease back, or drop it if nobody wants it."""
        link.readers.discard(self)
        link.follow(self.source, None)
        state = self.progress.state
        if state is not State.ENDED:
            self.progress.step(Happening.FAILED)
        if self.unwanted:
            self._consumer.drop(self.source)
        elif state is not State.RELEASING and not link.control.closed:
            link.release(self.source, "returned")

    def _step_out(self, refusal: Refusal) -> None:
        """Before the copy: the reading ends here."""
        interrupted = isinstance(refusal, Interrupted)
        self.progress.step(Happening.INTERRUPTED if interrupted else Happening.FAILED)
        if self.unwanted:
            self._consumer.drop(self.source)
