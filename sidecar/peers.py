"""Connections to producers, kept for the next pull: one link a producer's registration.

A link is made off the main path and shared by every pull that waits for it; a producer that hangs holds up only
those. Each link beats for the leases claimed through it, and is cut when the producer leaves a call unanswered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from sidecar.config import SidecarConfig
from sidecar.direct_pools import DirectPools, Spare
from sidecar.errors import PeerLost, Refusal
from sidecar.layout import layout_fault, mismatch, push_fault
from sidecar.lease_board import BoardView
from sidecar.leases import Reader
from sidecar.message import ProducerKey
from sidecar.metrics import SidecarMetrics
from sidecar.peer_control import Answer, PeerControl, dial
from sidecar.protocol import (
    PROTOCOL_VERSION,
    Claim,
    Computed,
    Deliver,
    Heartbeat,
    OpenRegion,
    PeerHello,
    PeerWelcome,
    PullSource,
    PushTarget,
    RegionOpened,
    Release,
    Withdrawn,
)  # fmt: skip
from sidecar.registration import Identity, Registration
from sidecar.reshard import Reshard, reshard_between
from sidecar.transport.contract import PeerMemory, Transport, common

logger = logging.getLogger(__name__)


class Reading(Protocol):
    """A read under way, as its link sees it."""

    source: PullSource
    claimed: bool

    def interrupt(self, reason: str, message: str) -> None: ...


class Link:
    """One producer's rank, reached and checked: control connection, transport chosen, its pool at hand.

    `reshard` is None where its blocks are copied whole; `board` where its leases have to be claimed.
    """

    def __init__(
        self, key: ProducerKey, control: PeerControl, welcome: PeerWelcome, memory: PeerMemory, reshard: Reshard | None,
        board: BoardView | None = None,
    ) -> None:  # fmt: skip
        self.key = key
        self.name = f"{key[2]}@{key[0]}:{key[1]}"
        self.layout = welcome.layout
        self.num_bytes = welcome.layout.pool_bytes
        self.memory = memory
        self.reshard = reshard
        self.board = board
        self.readers: set[Reading] = set()
        self.used_at = asyncio.get_running_loop().time()
        self.control = control

    @property
    def copied_whole(self) -> bool:
        """Whether a lease of this one rank is all there is to read, block by block, in memory that is mapped here."""
        shared = self.memory.transport == "shm" and self.reshard is None
        return shared and self.layout.tp_size == 1 and len(self.layout.stage_layers) <= 1

    def claim(self, source: PullSource, reader: Reader) -> Answer:
        """Ask for the lease; Claimed or Refusal."""
        return self.control.call(
            lambda call_id: Claim(
                call_id, source.transfer_id, source.token, reader.group, reader.index, reader.num_readers
            )
        )

    def follow(self, source: PullSource, follower: Callable[[Computed | Withdrawn], None] | None) -> None:
        """Tell `follower` what becomes of a lease that is still computed; before it is claimed. None ends that."""
        if follower is None:
            self.control.followers.pop(source.transfer_id, None)
        else:
            self.control.followers[source.transfer_id] = follower

    def release(self, source: PullSource, outcome: str) -> Answer:
        """Say how the read went; Done only if the lease was valid until now."""
        return self.control.call(lambda call_id: Release(call_id, source.transfer_id, source.token, outcome))

    def beat(self) -> None:
        """One heartbeat for each lease claimed here; a pull whose lease is lost is interrupted.

        What is read without a claim has no lease to lose, but where the producer sends it, it has to be there.
        """
        for reader in self.readers:
            if not reader.claimed and self.board is not None:
                continue
            source = reader.source
            answer = self.control.call(partial(Heartbeat, transfer_id=source.transfer_id, token=source.token))
            answer.add_done_callback(partial(self._beaten, reader, reader.claimed))

    async def close(self) -> None:
        """When this returns, nothing of the peer writes here."""
        await self.memory.close()
        if self.board is not None:
            self.board.close()

    @staticmethod
    def _beaten(reader: Reading, claimed: bool, done: Answer) -> None:
        refusal = None if done.cancelled() else done.exception()
        if claimed and isinstance(refusal, Refusal) and not isinstance(refusal, PeerLost):
            reader.interrupt(refusal.reason, refusal.message)


class PeerTable:
    """Every link of one registration."""

    def __init__(
        self,
        config: SidecarConfig,
        identity: Identity,
        registration: Registration,
        transports: Mapping[str, Transport],
        metrics: SidecarMetrics,
        direct: DirectPools | None = None,
    ) -> None:
        """`direct`: what our engine reads without us."""
        self._direct = direct
        self._config = config
        self._identity = identity
        self._registration = registration
        self._transports = transports
        self._metrics = metrics
        self._links: dict[ProducerKey, Link] = {}
        self._connecting: dict[ProducerKey, asyncio.Task[Link]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._ticker = asyncio.ensure_future(self._tick())

    def live(self, source: PullSource) -> Link | None:
        """The pooled link to `source`'s producer, if there is one."""
        link = self._links.get(source.producer)
        if link is None:
            return None
        if link.memory.broken:
            self.cut(link, link.memory.broken)
            return None
        link.used_at = self._loop.time()
        return link

    def connect(self, source: PullSource) -> asyncio.Task[Link]:
        """Begin to reach the producer, or join those who wait already. Its result raises Refusal."""
        key = source.producer
        task = self._connecting.get(key)
        if task is None:
            task = asyncio.ensure_future(self._connect(key))
            self._connecting[key] = task
            task.add_done_callback(lambda done: self._connected(key, done))
        return task

    def cut(self, link: Link, why: str) -> asyncio.Task[None]:
        """Give a link up: its pulls are interrupted, and the task ends when nothing of the peer writes any more."""
        link.control.on_closed = lambda _: None
        link.control.close(why)
        return self._forget(link, why)

    async def deliver(self, target: PushTarget, source: PullSource) -> None:
        """Tell a consumer that `source` is computed for its landing. Raises Refusal; PeerLost is worth another try."""
        key = (target.host, target.port, target.engine_id, target.epoch)
        control, welcome = await dial((target.host, target.port), self._hello(key), self._config.connect_timeout_s)
        try:
            ours = self._registration.layout
            fault = welcome.mismatch or layout_fault(welcome.layout) or push_fault(ours, welcome.layout)
            if fault:
                raise Refusal("incompatible", fault)
            async with asyncio.timeout(self._config.answer_timeout_s):
                await control.call(lambda call_id: Deliver(call_id, target.landing_id, target.token, source))
        except TimeoutError as error:
            raise PeerLost("the delivery was not answered") from error
        finally:
            control.close("delivered")

    async def drop(self, source: PullSource) -> None:
        """Tell the producer that nobody will read this lease. Raises Refusal; PeerLost is worth another try."""
        link = self.live(source)
        if link is not None:
            await link.release(source, "dropped")
            return
        control, _ = await dial(
            (source.host, source.port), self._hello(source.producer), self._config.connect_timeout_s
        )
        try:
            async with asyncio.timeout(self._config.answer_timeout_s):
                await control.call(lambda call_id: Release(call_id, source.transfer_id, source.token, "dropped"))
        except TimeoutError as error:
            raise PeerLost("the drop was not answered") from error
        finally:
            control.close("dropped")

    async def close(self) -> None:
        """Cut every link; when this returns, no peer writes here."""
        self._ticker.cancel()
        connecting = list(self._connecting.values())
        for task in connecting:
            task.cancel()
        await asyncio.gather(*connecting, return_exceptions=True)
        for link in list(self._links.values()):
            self.cut(link, "the pool is no longer registered")
        while self._closing:
            await asyncio.wait(self._closing)

    def _hello(self, key: ProducerKey) -> PeerHello:
        identity = self._identity
        return PeerHello(
            PROTOCOL_VERSION, identity.engine_id, identity.rank, identity.sidecar_epoch, identity.boot_id,
            identity.transports, key[2], key[3], self._registration.layout,
        )  # fmt: skip

    async def _connect(self, key: ProducerKey) -> Link:
        if len(self._links) >= self._config.max_peers:
            raise PeerLost(f"{self._config.max_peers} peers are connected, which is the limit")
        hello = self._hello(key)
        config, spare = self._config, Spare()
        control, welcome = await dial((key[0], key[1]), hello, config.connect_timeout_s, config.peer_gone_s)
        try:
            self._check(welcome)
            same_host = welcome.boot_id == self._identity.boot_id and welcome.peer_socket != ""
            if same_host and "shm" in common(self._identity.transports, welcome.transports, same_host=True):
                try:
                    local, _ = await dial("\0" + welcome.peer_socket, hello, config.connect_timeout_s)
                except PeerLost as lost:
                    logger.info("peer_socket_unreachable error=%s", lost.message)
                    same_host = False
                    if not common(self._identity.transports, welcome.transports, same_host=False):
                        raise PeerLost(f"shm is the only common transport, and {lost.message}") from lost
                else:
                    control.close("continued over the peer socket")
                    control = local
            memory = await self._reach(control, welcome, spare, same_host=same_host)
            reshard = reshard_between(welcome.layout, self._registration.layout)
            link = Link(key, control, welcome, memory, reshard, _board(control, spare))
            if control.closed:
                await link.close()
                raise PeerLost("the connection to the producer's sidecar ended")
            if self._direct is not None and link.copied_whole:
                self._direct.give(key, link.layout, spare)
        except BaseException:
            control.close("no pull is possible")
            raise
        finally:
            spare.close()
        self._links[key] = link
        control.on_closed = lambda why: self._lost(link, why)
        self._metrics.link_opened(link.memory.transport, link.name)
        logger.info("peer_connected peer=%s transport=%s same_host=%s", link.name, link.memory.transport, same_host)
        return link

    def _check(self, welcome: PeerWelcome) -> None:
        fault = welcome.mismatch or layout_fault(welcome.layout) or mismatch(welcome.layout, self._registration.layout)
        if fault:
            raise Refusal("incompatible", fault)

    async def _reach(self, control: PeerControl, welcome: PeerWelcome, spare: Spare, *, same_host: bool) -> PeerMemory:
        """The producer's pool over the best transport that works. Raises Refusal."""
        names = common(self._identity.transports, welcome.transports, same_host=same_host)
        failure = Refusal(
            "incompatible",
            f"no common transport: here {', '.join(self._identity.transports)}, the producer has "
            f"{', '.join(welcome.transports)}, {'one host' if same_host else 'different hosts'}",
        )
        for name in names:
            try:
                async with asyncio.timeout(self._config.open_timeout_s):
                    opened = await control.call(partial(OpenRegion, transport=name))
                    assert isinstance(opened, RegionOpened)
                    if opened.num_bytes < welcome.layout.pool_bytes:
                        raise Refusal("incompatible", f"the producer's region has only {opened.num_bytes} bytes")
                    fd = control.take_fd()
                    spare.keep_pool(fd)
                    return await self._transports[name].open(self._registration, opened, fd)
            except TimeoutError:
                failure = PeerLost(f"opening {name} took longer than {self._config.open_timeout_s:g} s")
            except PeerLost:
                raise
            except Refusal as refusal:
                failure = refusal
            logger.warning("transport_failed transport=%s error=%s", name, failure.message)
        raise failure

    def _connected(self, key: ProducerKey, done: asyncio.Task[Link]) -> None:
        self._connecting.pop(key, None)
        if not done.cancelled():
            done.exception()

    def _lost(self, link: Link, why: str) -> None:
        self._forget(link, why)

    def _forget(self, link: Link, why: str) -> asyncio.Task[None]:
        if self._links.get(link.key) is link:
            del self._links[link.key]
            if self._direct is not None:
                self._direct.take_back(link.key)
            self._metrics.link_closed(link.memory.transport, link.name)
            logger.info("peer_disconnected peer=%s reason=%s", link.name, why)
        for reader in list(link.readers):
            reader.interrupt("unreachable", f"the connection to {link.name} ended: {why}")
        task: asyncio.Task[None] = asyncio.ensure_future(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    async def _tick(self) -> None:
        """Heartbeats, unanswered calls and idle links, for as long as the registration lives."""
        while True:
            await asyncio.sleep(self._config.heartbeat_s)
            now = self._loop.time()
            for link in list(self._links.values()):
                since = link.control.waiting_since
                if since is not None and now - since > self._config.answer_timeout_s:
                    self.cut(link, f"no answer for {now - since:.1f} s")
                elif link.readers:
                    link.beat()
                    link.used_at = now
                elif now - link.used_at > self._config.peer_idle_s:
                    self.cut(link, "idle")


def _board(control: PeerControl, spare: Spare) -> BoardView | None:
    """What came with the pool, if it can be mapped; leases are claimed without it."""
    fd = control.take_board_fd()
    spare.keep_board(fd)
    try:
        return None if fd is None else BoardView(fd)
    except OSError as error:
        logger.warning("lease_board_not_mapped error=%s", error)
        return None
