"""Every pull of one registration: what it reads from which leases, and that it is reported exactly once.

A pull from an engine of several ranks has a reading for each lease that this rank needs (see reading.py). All copy at
once; only when every one has copied is the first lease released as read, so that a pull which fails leaves them whole.
It is reported when nothing of any of them writes any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import zlib
from collections.abc import Callable, Coroutine, Sequence

from sidecar.config import SidecarConfig
from sidecar.errors import FrameError, PeerLost, Refusal
from sidecar.metrics import SidecarMetrics
from sidecar.peers import PeerTable
from sidecar.protocol import Pull, PullEnded, PullSource, ReadDirectly
from sidecar.reading import Consumer, Reading
from sidecar.registration import Registration
from sidecar.reshard import select_sources

logger = logging.getLogger(__name__)

DROP_DELAYS_S = (0.0, 0.2, 1.0, 3.0)
"""When a drop is tried; after the last the producer's lease time does the work."""
MAX_DROPS = 4096
"""Drops under way; beyond it likewise."""


class OpenPull:
    """One pull under way. `interruption` holds the reason and message of the first interrupt."""

    def __init__(self, request: Pull) -> None:
        self.request = request
        self.readings: tuple[Reading, ...] = ()
        self.unread: tuple[PullSource, ...] = ()
        self.interruption: tuple[str, str] | None = None
        self.unwanted = False
        self.too_many = False
        self.confirming = False
        self.started_at = time.monotonic()

    def interrupt(self, reason: str, message: str) -> None:
        """End every reading. The first reason counts; an ended pull takes no notice."""
        if self.interruption is None:
            self.interruption = (reason, message)
            self.pass_on()

    def pass_on(self) -> None:
        """Tell the readings what the pull has been told."""
        for reading in self.readings:
            reading.unwanted = self.unwanted
            if self.interruption is not None:
                reading.interrupt(*self.interruption)


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
        self._consumer = Consumer(config, registration, peers, self.drop)
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
        if not pull.too_many:
            with contextlib.suppress(Refusal):  # the story comes upon it again
                self._choose(pull)
                if len(pull.readings) == 1:
                    pull.readings[0].begin()
        task = asyncio.ensure_future(self._run(pull))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def abandon(self, pull_id: str) -> None:
        """Stop a pull and drop its leases; one that is only waiting for its confirmation is let through."""
        pull = self._pulls.get(pull_id)
        if pull is not None and not pull.confirming:
            pull.unwanted = True
            pull.interrupt("abandoned", "the engine abandoned it")

    def supersede(self, pull_id: str) -> None:
        """Stop a pull because another source has come; one that is only waiting for its confirmation is let through."""
        pull = self._pulls.get(pull_id)
        if pull is not None and not pull.confirming:
            pull.interrupt("abandoned", "another producer took over")

    def drop(self, source: PullSource) -> None:
        """Tell the producer, in the background, that nobody will read this lease."""
        if len(self._drops) >= MAX_DROPS:
            logger.warning("drop_skipped transfer_id=%s under_way=%d", source.transfer_id, len(self._drops))
            return
        task = asyncio.ensure_future(self._drop(source))
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)

    def read_directly(self, read: ReadDirectly) -> None:
        """The engine has read a lease without us, by the producer's board: tell the producer, and count."""
        source = read.source
        link = self._peers.live(source)
        if link is not None and not link.control.closed:
            link.release(source, "read")
        else:
            self.drop(source)
        peer = f"{source.engine_id}@{source.host}:{source.port}"
        self._metrics.pull_ended("ok", "shm", peer, read.num_blocks, read.num_bytes, read.seconds)

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
        if not pull.readings:
            self._choose(pull)
        pull.pass_on()
        if len(pull.readings) == 1:
            await pull.readings[0].copy()
            pull.confirming = True
            await pull.readings[0].confirm()
        else:
            await self._copy_all(pull)
            pull.confirming = True
            await _all([reading.confirm() for reading in pull.readings])
        for source in pull.unread:
            self.drop(source)
        return sum(reading.num_bytes for reading in pull.readings)

    def _choose(self, pull: OpenPull) -> None:
        """Which leases are read. Raises Refusal."""
        request = pull.request
        turn = zlib.crc32(request.sources[0].transfer_id.encode())
        selection = select_sources(self._registration.layout, len(request.sources), request.stage_layers, turn)
        pull.readings = tuple(Reading(self._consumer, request, chosen) for chosen in selection.sources)
        pull.unread = tuple(request.sources[rank] for rank in selection.unread)

    async def _copy_all(self, pull: OpenPull) -> None:
        """Copy from every lease at once; the first that fails ends the others. Raises what it raised."""
        copies = {asyncio.ensure_future(reading.copy()): reading for reading in pull.readings}
        done, going_on = await asyncio.wait(copies, return_when=asyncio.FIRST_EXCEPTION)
        failed = next((copy for copy in done if copy.exception()), None)
        if failed is None:
            return
        peer = copies[failed].peer
        for copy in going_on:
            copies[copy].interrupt("abandoned", f"the same pull's reading from {peer} failed")
        if going_on:
            await asyncio.wait(going_on)
        for copy, reading in copies.items():
            if copy.exception() is None:
                reading.give_back()
        pull.readings = (copies[failed], *(reading for reading in pull.readings if reading is not copies[failed]))
        await failed

    def _end(self, pull: OpenPull, num_bytes: int, refusal: Refusal | None) -> None:
        readings, request = pull.readings, pull.request
        seconds = time.monotonic() - pull.started_at
        first = request.sources[0]
        peer = readings[0].peer if readings else f"{first.engine_id}@{first.host}:{first.port}"
        transport = readings[0].transport if readings else ""
        ok = refusal is None
        num_blocks = len(request.local_block_ids) if ok else 0
        ended = PullEnded(
            request.pull_id, ok, refusal.reason if refusal else "", refusal.message if refusal else "",
            num_blocks, num_bytes, seconds, transport, peer,
        )  # fmt: skip
        pull.interruption = pull.interruption or ("abandoned", "ended")
        if pull.unwanted:
            for source in pull.unread:
                self.drop(source)
        del self._pulls[request.pull_id]
        self._report(ended)
        first_bytes = readings[0].num_bytes if ok else 0
        self._metrics.pull_ended(ended.reason or "ok", transport, peer, num_blocks, first_bytes, seconds)
        for reading in readings[1:] if ok else ():
            self._metrics.also_read(reading.transport, reading.peer, reading.num_bytes)
        logger.log(
            logging.DEBUG if ok else logging.WARNING,
            "pull_ended pull_id=%s ok=%s reason=%s blocks=%d bytes=%d seconds=%.6f transport=%s peer=%s sources=%d "
            "message=%s", ended.pull_id, ok, ended.reason, num_blocks, num_bytes, seconds, transport, peer,
            len(readings), ended.message,
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


async def _all(steps: Sequence[Coroutine[object, object, None]]) -> None:
    """Every step to its end; then what the first failed one raised."""
    for outcome in await asyncio.gather(*steps, return_exceptions=True):
        if outcome is not None:
            raise outcome
