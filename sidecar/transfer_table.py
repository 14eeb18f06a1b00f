"""Every pull of one registration, and the story of each: connect, claim, copy, release, report.

A pull is one task that waits for one thing at a time; `interrupt` ends that wait, whoever has a reason: the engine
abandoned it, its time ran out, its peer or its lease was lost. Whatever happens, it is reported exactly once, after
writing has stopped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sidecar.config import SidecarConfig
from sidecar.errors import FrameError, PeerLost, Refusal
from sidecar.metrics import SidecarMetrics
from sidecar.peers import Link, PeerTable
from sidecar.protocol import Claimed, Computed, Pull, PullEnded, PullSource, Withdrawn
from sidecar.ready import Ready, as_copied, follows, mark_fault, parts_between, plan_parts
from sidecar.registration import Registration
from sidecar.spans import Destination, Spans, check_spans
from sidecar.transfer import Happening, Progress, State
from sidecar.transport.contract import COPIED

logger = logging.getLogger(__name__)

DROP_DELAYS_S = (0.0, 0.2, 1.0, 3.0)
"""When a drop is tried; after the last the producer's lease time does the work."""
MAX_DROPS = 4096
"""Drops under way; beyond it likewise."""

_T = TypeVar("_T")


class Interrupted(Refusal):
    """The pull has to end before its time."""


class OpenPull:
    """One pull under way; a Reader to its link."""

    def __init__(self, request: Pull) -> None:
        self.request = request
        self.source = request.source
        self.progress = Progress()
        self.interruption: Interrupted | None = None
        self.unwanted = False
        self.too_many = False
        self.transport = ""
        self.started_at = time.monotonic()
        self.ready: Ready | None = None
        self._waiter: asyncio.Future[object] | None = None
        self._news: asyncio.Future[None] | None = None

    def follow(self, message: Computed | Withdrawn) -> None:
        """What the producer says of a lease that is still computed."""
        if isinstance(message, Withdrawn):
            self.interrupt(message.reason, message.message)
            return
        self.ready = message.ready
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def news(self) -> asyncio.Future[None]:
        """Done at the next mark."""
        self._news = asyncio.get_running_loop().create_future()
        return self._news

    def interrupt(self, reason: str, message: str) -> None:
        """End what the pull waits for. The first reason counts; an ended pull takes no notice."""
        if self.interruption is not None:
            return
        self.interruption = Interrupted(reason, message)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self.interruption)

    async def wait(self, awaited: asyncio.Future[_T]) -> _T:
        """The result of `awaited`, which goes on undisturbed if this pull is interrupted. Raises Interrupted."""
        if self.interruption is not None:
            raise self.interruption
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


class TransferTable:
    """The pulls of one registered engine. `report` is called once for each."""

    def __init__(
        self,
        config: SidecarConfig,
        registration: Registration,
        peers: PeerTable,
        metrics: SidecarMetrics,
        report: Callable[[PullEnded], None],
    ) -> None:
        self._config = config
        self._registration = registration
        self._peers = peers
        self._metrics = metrics
        self._report = report
        self._pulls: dict[str, OpenPull] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._drops: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._pulls)

    def begin(self, request: Pull) -> None:
        """Start a pull. Raises FrameError if its id is in use: no end could be told from the other's."""
        if request.pull_id in self._pulls:
            raise FrameError(f"pull {request.pull_id!r} is open already")
        pull = OpenPull(request)
        pull.too_many = len(self._pulls) >= self._config.max_pulls
        self._pulls[request.pull_id] = pull
        task = asyncio.ensure_future(self._run(pull))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def abandon(self, pull_id: str) -> None:
        """Stop a pull and drop its lease; one that is only waiting for its confirmation is let through."""
        pull = self._pulls.get(pull_id)
        if pull is not None and pull.progress.state is not State.RELEASING:
            pull.unwanted = True
            pull.interrupt("abandoned", "the engine abandoned it")

    def supersede(self, pull_id: str) -> None:
        """Stop a pull because another source has come; one that is only waiting for its confirmation is let through."""
        pull = self._pulls.get(pull_id)
        if pull is not None and pull.progress.state is not State.RELEASING:
            pull.interrupt("abandoned", "another producer took over")

    def drop(self, source: PullSource) -> None:
        """Tell the producer, in the background, that nobody will read this lease."""
        if len(self._drops) >= MAX_DROPS:
            logger.warning("drop_skipped transfer_id=%s under_way=%d", source.transfer_id, len(self._drops))
            return
        task = asyncio.ensure_future(self._drop(source))
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)

    async def drain(self, timeout_s: float) -> None:
        """Let pulls end by themselves for at most `timeout_s`."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    async def close(self, message: str) -> None:
        """Interrupt every pull and return when all have been reported."""
        for pull in list(self._pulls.values()):
            pull.interrupt("abandoned", message)
        for drop in self._drops:
            drop.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, pull: OpenPull) -> None:
        deadline_s = pull.request.deadline_s
        deadline = self._loop.call_later(
            deadline_s, pull.interrupt, "timeout", f"the pull took longer than its {deadline_s:g} s"
        )
        num_bytes = 0
        refusal: Refusal | None = None
        try:
            if pull.too_many:
                raise Refusal("invalid", f"{self._config.max_pulls} pulls are open, which is the limit")
            num_bytes = await self._story(pull)
        except Refusal as error:
            refusal = error
        except Exception as error:  # the last resort: whatever is wrong here, the engine must hear of its pull
            logger.exception("pull_crashed pull_id=%s", pull.request.pull_id)
            refusal = Refusal("transport", f"internal error: {error!r}")
        finally:
            deadline.cancel()
        self._end(pull, num_bytes, refusal)

    async def _story(self, pull: OpenPull) -> int:
        """The straight line. Returns bytes copied. Raises Refusal, with nothing writing any more."""
        link, claimed, destination = await self._claim(pull)
        try:
            spans = self._plan(pull, link, claimed, destination)
            num_bytes = spans.num_bytes
            if claimed.ready is not None:
                await self._copy_as_ready(pull, link, claimed, claimed.ready)
            elif spans:
                await self._copy(pull, link, spans)
            pull.progress.step(Happening.COPIED)
            await pull.wait(link.release(pull.source, "consumed"))
        except Refusal as refusal:
            self._fail(pull, link, refusal)
            raise
        finally:
            link.follow(pull.source, None)
        pull.progress.step(Happening.CONFIRMED)
        return num_bytes

    async def _claim(self, pull: OpenPull) -> tuple[Link, Claimed, Destination]:
        """Reach the producer and claim the lease; a pooled connection that turns out dead is replaced once."""
        source = pull.source
        may_retry = True
        while True:
            try:
                link = self._peers.live(source)
                if link is None:
                    link = await pull.wait(self._peers.connect(source))
            except Refusal as refusal:
                self._step_out(pull, refusal)
                raise
            pull.transport = link.memory.transport
            pull.progress.step(Happening.CONNECTED)
            try:
                link.follow(source, pull.follow)  # before the claim: marks may come right behind its answer
                answer = link.claim(source)
                destination = Destination(self._registration.layout, pull.request.local_block_ids)
                claimed = await pull.wait(answer)
            except PeerLost as lost:
                if not may_retry:
                    self._step_out(pull, lost)
                    raise
                may_retry = False
                pull.progress.step(Happening.PEER_STALE)
                continue
            except Refusal as refusal:
                link.follow(source, None)
                self._step_out(pull, refusal)
                if isinstance(refusal, Interrupted) and not pull.unwanted:
                    link.release(source, "returned")  # behind the claim on the same connection
                raise
            assert isinstance(claimed, Claimed)
            pull.progress.step(Happening.CLAIMED)
            return link, claimed, destination

    def _plan(self, pull: OpenPull, link: Link, claimed: Claimed, destination: Destination) -> Spans:
        request = pull.request
        local = request.local_block_ids
        remote = claimed.block_ids[request.first_block : request.first_block + len(local)]
        if len(remote) != len(local):
            raise Refusal(
                "invalid",
                f"blocks {request.first_block} to {request.first_block + len(local)} were asked for, "
                f"the lease has {len(claimed.block_ids)}",
            )
        spans = destination.plan(link.layout, remote)
        check_spans(spans, link.num_bytes, self._registration.region.num_bytes)
        return spans

    async def _copy_as_ready(self, pull: OpenPull, link: Link, claimed: Claimed, ready: Ready) -> None:
        """Copy what is computed, and meanwhile wait for more, until all is here. Raises Refusal, like _copy."""
        request, ours = pull.request, self._registration.layout
        copied = Ready()
        pull.ready = pull.ready or ready
        pull.progress.step(Happening.PART_COPIED)
        try:
            while copied.first_block < len(claimed.block_ids):
                now_ready = self._checked(pull.ready, copied, link, claimed)
                if now_ready == copied:
                    link.readers.add(pull)
                    await pull.wait(pull.news())
                    continue
                parts = parts_between(copied, now_ready, ours.num_layers, request.first_block)
                spans = plan_parts(
                    parts, link.layout, claimed.block_ids, ours, request.local_block_ids, request.first_block
                )
                check_spans(spans, link.num_bytes, self._registration.region.num_bytes)
                copied = now_ready
                if spans:
                    pull.progress.step(Happening.MORE_READY)
                    await self._copy(pull, link, spans)
                    pull.progress.step(Happening.PART_COPIED)
        finally:
            link.readers.discard(pull)

    def _checked(self, ready: Ready, copied: Ready, link: Link, claimed: Claimed) -> Ready:
        """A peer's mark as far as it can be copied. Raises Refusal where it makes no sense."""
        fault = mark_fault(ready, len(claimed.block_ids), link.layout.num_layers)
        now_ready = as_copied(ready, link.layout)
        if fault or not follows(copied, now_ready):
            raise Refusal("transport", fault or f"the producer said {now_ready} after {copied}")
        return now_ready

    async def _copy(self, pull: OpenPull, link: Link, spans: Spans) -> None:
        """Copy, beating for the lease meanwhile. Raises Refusal when nothing writes any more."""
        if link.control.closed:
            raise PeerLost(f"the connection to {link.name} ended")
        copy = link.memory.read(spans)
        link.readers.add(pull)
        try:
            outcome = await pull.wait(copy.ended)
        except Interrupted:
            pull.progress.step(Happening.INTERRUPTED)
            copy.stop()
            await asyncio.wait([copy.ended], timeout=self._config.stop_grace_s)
            if not copy.ended.done():
                await self._peers.cut(link, "a copy did not stop")
                await copy.ended
            pull.progress.step(Happening.STOPPED)
            raise
        finally:
            link.readers.discard(pull)
        if outcome != COPIED:
            await self._peers.cut(link, outcome)
            raise Refusal("transport", outcome)

    def _fail(self, pull: OpenPull, link: Link, refusal: Refusal) -> None:
        """After the claim: give the lease back, or drop it if nobody wants it."""
        state = pull.progress.state
        if state is not State.ENDED:
            pull.progress.step(Happening.FAILED)
        if pull.unwanted:
            self.drop(pull.source)
        elif state is not State.RELEASING and not link.control.closed:
            link.release(pull.source, "returned")

    def _step_out(self, pull: OpenPull, refusal: Refusal) -> None:
        """Before the copy: the pull ends here."""
        interrupted = isinstance(refusal, Interrupted)
        pull.progress.step(Happening.INTERRUPTED if interrupted else Happening.FAILED)
        if pull.unwanted:
            self.drop(pull.source)

    def _end(self, pull: OpenPull, num_bytes: int, refusal: Refusal | None) -> None:
        source = pull.source
        seconds = time.monotonic() - pull.started_at
        peer = f"{source.engine_id}@{source.host}:{source.port}"
        ok = refusal is None
        num_blocks = len(pull.request.local_block_ids) if ok else 0
        ended = PullEnded(
            pull.request.pull_id, ok, refusal.reason if refusal else "", refusal.message if refusal else "",
            num_blocks, num_bytes, seconds, pull.transport, peer,
        )  # fmt: skip
        pull.interruption = pull.interruption or Interrupted("abandoned", "ended")
        del self._pulls[pull.request.pull_id]
        self._report(ended)
        self._metrics.pull_ended(ended.reason or "ok", pull.transport, peer, num_blocks, num_bytes, seconds)
        logger.log(
            logging.DEBUG if ok else logging.WARNING,
            "pull_ended pull_id=%s ok=%s reason=%s blocks=%d bytes=%d seconds=%.6f transport=%s peer=%s message=%s",
            ended.pull_id, ok, ended.reason, num_blocks, num_bytes, seconds, pull.transport, peer, ended.message,
        )  # fmt: skip

    async def _drop(self, source: PullSource) -> None:
        for delay_s in DROP_DELAYS_S:
            await asyncio.sleep(delay_s)
            try:
                await self._peers.drop(source)
            except PeerLost as lost:
                message = lost.message
                continue
            except Refusal as refusal:
                logger.debug("drop_refused transfer_id=%s reason=%s", source.transfer_id, refusal.reason)
            return
        logger.warning("drop_failed transfer_id=%s error=%s", source.transfer_id, message)
