"""One connection from an engine: hello, then registration, offers and pulls. Its end is the engine's death.

An engine of several processes registers its pool from one and joins it from another (JoinPool).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from typing import Protocol

from sidecar import protocol
from sidecar.connection import FrameConnection
from sidecar.errors import FrameError, LayoutRefused, OfferRefused, Refusal
from sidecar.memory.registry import OWN_PROCESS_ONLY
from sidecar.protocol import (
    ENGINE_FRAME_BYTES,
    PROTOCOL_VERSION,
    Abandon,
    CallFailed,
    Drop,
    EngineHello,
    JoinPool,
    Land,
    MarkReady,
    Message,
    OfferBlocks,
    PoolRegistered,
    Pull,
    PullEnded,
    PushBlocks,
    ReadDirectly,
    ReadHeard,
    Refused,
    RegisterPool,
    Revoke,
    SidecarHello,
    decode,
    encode,
    version_fault,
)  # fmt: skip
from sidecar.registration import Identity, Registration, register, register_memory
from sidecar.store.messages import StoreRequest, store_refusal
from sidecar.tenancy import Tenancy

logger = logging.getLogger(__name__)


class Host(Protocol):
    """What an engine's session needs of the sidecar around it."""

    identity: Identity
    store_tiers: tuple[str, ...]

    def next_epoch(self) -> str: ...

    async def admit(self, session: EngineSession, registration: Registration) -> Tenancy:
        """Make the session's pool the one that is served. Raises LayoutRefused while another engine's is."""
        ...

    def tenant(self) -> Tenancy | None:
        """Whose pool is served now."""
        ...

    async def dismiss(self, session: EngineSession, why: str) -> None:
        """The session ends or registers anew: retire its tenancy, if it has one."""
        ...


class EngineSession:
    """One connected engine."""

    def __init__(self, sock: socket.socket, host: Host) -> None:
        self._host = host
        self._greeted = False
        self._tenancy: Tenancy | None = None
        self._joined = False
        self._registering: asyncio.Task[None] | None = None
        self._connection = FrameConnection(
            sock, max_frame_bytes=ENGINE_FRAME_BYTES, on_frame=self._take, on_closed=self._closed, lingers=True
        )
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def send(self, message: Message) -> None:
        """Queue one message; silently nothing once the engine has gone."""
        self._connection.send(encode(message))

    def hand_over(self, message: Message, fds: Sequence[int]) -> bool:
        """Send one message with descriptors, which stay the caller's, if that can be done at once."""
        return self._connection.send_at_once(encode(message), fds)

    def close(self, why: str) -> None:
        """End the session; `ended` is done when its tenancy is gone."""
        self._connection.close(why)

    def _take(self, frame: bytes) -> None:
        if not self._greeted:
            if fault := version_fault(frame, "engine_hello"):
                self.send(Refused("incompatible", fault))
                self.close(fault)
                return
            self._greet()
            return
        message = decode(protocol.from_engine, frame)
        if isinstance(message, EngineHello):
            raise FrameError("a second hello")
        if isinstance(message, RegisterPool):
            self._register(message)
        elif isinstance(message, JoinPool):
            self._join(message)
        elif isinstance(message, OfferBlocks | PushBlocks):
            self._offer(message)
        elif isinstance(message, Land):
            self._land(message)
        elif isinstance(message, Pull):
            self._pull(message)
        elif isinstance(message, StoreRequest):
            self._ask_store(message)
        elif self._tenancy is not None:
            self._act(message, self._tenancy)

    def _greet(self) -> None:
        identity = self._host.identity
        self._greeted = True
        self.send(
            SidecarHello(
                identity.engine_id, identity.rank, identity.host, identity.port, identity.transports,
                identity.sidecar_epoch, PROTOCOL_VERSION, self._host.store_tiers,
            )
        )  # fmt: skip

    def _act(self, message: MarkReady | Revoke | Abandon | Drop | ReadDirectly, tenancy: Tenancy) -> None:
        if isinstance(message, MarkReady):
            try:
                tenancy.offers.advance(message)
            except Refusal as refusal:
                raise FrameError(refusal.message) from refusal
        elif isinstance(message, Revoke):
            tenancy.offers.revoke(message.transfer_id)
        elif isinstance(message, Abandon):
            if not tenancy.landings.abandon(message.pull_id):
                tenancy.pulls.abandon(message.pull_id)
        elif isinstance(message, ReadDirectly):
            tenancy.pulls.read_directly(message)
            if message.wants_answer:
                self.send(ReadHeard())
        else:
            tenancy.pulls.drop(message.source)

    def _offer(self, message: OfferBlocks | PushBlocks) -> None:
        try:
            if self._tenancy is None:
                raise OfferRefused("no pool is registered")
            offer = self._tenancy.offers.offer(message)
        except OfferRefused as error:
            self.send(CallFailed(message.call_id, "OfferRefused", str(error)))
            return
        self.send(offer)
        if isinstance(message, PushBlocks):
            num_blocks = max(len(message.block_ids), message.num_blocks)
            self._tenancy.deliveries.begin(message.target, offer.transfer_id, offer.token, num_blocks)

    def _land(self, message: Land) -> None:
        try:
            if self._tenancy is None or self._joined:
                raise OfferRefused("no pool is registered by this process")
            self.send(self._tenancy.landings.land(message))
        except OfferRefused as error:
            self.send(CallFailed(message.call_id, "OfferRefused", str(error)))

    def _join(self, message: JoinPool) -> None:
        tenancy = self._host.tenant()
        if tenancy is None or self._registering is not None:
            why = "no pool is registered" if tenancy is None else "this connection registers a pool of its own"
            self.send(CallFailed(message.call_id, "OfferRefused", why))
            return
        self._tenancy, self._joined = tenancy, True
        tenancy.joined.add(self)
        registration = tenancy.registration
        slots = registration.layout.num_blocks if registration.staged else 0
        self.send(PoolRegistered(message.call_id, registration.epoch, slots))

    def _pull(self, message: Pull) -> None:
        if self._tenancy is not None and not self._joined:
            self._tenancy.pulls.begin(message)
            return
        source = message.sources[0]
        peer = f"{source.engine_id}@{source.host}:{source.port}"
        why = "only the process that registered the pool may pull" if self._joined else "no pool is registered"
        self.send(PullEnded(message.pull_id, False, "invalid", why, 0, 0, 0.0, "", peer))

    def _ask_store(self, message: StoreRequest) -> None:
        if self._tenancy is not None and self._tenancy.store is not None:
            self._tenancy.store.handle(message, self.send, may_write=not self._joined)
            return
        answer = store_refusal(
            message, "no pool is registered" if self._tenancy is None else "this sidecar has no store"
        )
        if answer is not None:
            self.send(answer)

    def _register(self, message: RegisterPool) -> None:
        if self._joined:
            raise FrameError("a pool is registered on a connection that has joined another")
        memory = message.memory
        if memory is not None and memory.kind in OWN_PROCESS_ONLY and not self._connection.same_process():
            raise FrameError("an address of another process was registered")
        fd = self._connection.take_fd() if memory is None else None
        previous, self._registering = self._registering, None
        self._registering = asyncio.ensure_future(self._take_pool(message, fd, previous))

    async def _take_pool(self, message: RegisterPool, fd: int | None, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await previous
        self._tenancy = None
        await self._host.dismiss(self, "the engine registers another pool")
        try:
            registration = await self._open_pool(message, fd)
            registration.staged, registration.direct = message.staged, message.direct
            if self._connection.closed:
                registration.close()
                return
            try:
                self._tenancy = await self._host.admit(self, registration)
            except LayoutRefused:
                registration.close()
                raise
        except LayoutRefused as error:
            logger.warning("pool_refused error=%s", error)
            self.send(CallFailed(message.call_id, "LayoutRefused", str(error)))
            return
        self.send(PoolRegistered(message.call_id, registration.epoch))

    async def _open_pool(self, message: RegisterPool, fd: int | None) -> Registration:
        """Raises LayoutRefused."""
        epoch, socket_fd = self._host.next_epoch(), self._connection.fileno()
        if message.memory is not None:
            return await register_memory(epoch, message.layout, message.memory, socket_fd)
        assert fd is not None
        return await register(epoch, message.layout, fd, socket_fd)

    def _closed(self, why: str) -> None:
        asyncio.ensure_future(self._leave(why)).add_done_callback(self._left)

    async def _leave(self, why: str) -> None:
        if self._registering is not None:
            await self._registering
        if self._joined and self._tenancy is not None:
            self._tenancy.joined.discard(self)
        self._tenancy = None
        await self._host.dismiss(self, f"the engine is gone: {why}")

    def _left(self, done: asyncio.Task[None]) -> None:
        if error := done.exception():
            logger.error("engine_session_crashed error=%r", error)
        # Only now: to the engine the end of the connection means that nothing writes into its pool any more.
        self._connection.finish()
        self.ended.set_result(None)
