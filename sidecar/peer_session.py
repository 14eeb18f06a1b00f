"""The producer's side of one connection from another sidecar: hello, then claims, heartbeats and releases."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Mapping
from itertools import count
from typing import Protocol

from sidecar import protocol
from sidecar.config import SidecarConfig
from sidecar.connection import FrameConnection
from sidecar.errors import FrameError, Refusal
from sidecar.landings import Landings
from sidecar.layout import layout_fault, mismatch
from sidecar.leases import Claimant, Reader
from sidecar.metrics import SidecarMetrics
from sidecar.offers import Offers
from sidecar.protocol import (
    PEER_FRAME_BYTES,
    PROTOCOL_VERSION,
    CallRefused,
    Claim,
    Claimed,
    Deliver,
    Done,
    Heartbeat,
    Message,
    OpenRegion,
    PeerHello,
    PeerWelcome,
    Refused,
    RegionOpened,
    Release,
    decode,
    encode,
    version_fault,
)  # fmt: skip
from sidecar.regions import reopen_read_only
from sidecar.registration import Identity, Registration
from sidecar.transport.contract import Transport

logger = logging.getLogger(__name__)

_ids = count(1)


class Tenant(Protocol):
    """The registered engine, as its readers see it."""

    registration: Registration
    offers: Offers
    landings: Landings
    peer_sessions: set[PeerSession]


class PeerSession:
    """One connected consumer. It is tied at its hello to the registration that it named."""

    def __init__(
        self,
        sock: socket.socket,
        config: SidecarConfig,
        identity: Identity,
        transports: Mapping[str, Transport],
        metrics: SidecarMetrics,
        tenant: Callable[[], Tenant | None],
        on_closed: Callable[[PeerSession], None],
    ) -> None:
        self._id = next(_ids)
        self._identity = identity
        self._transports = transports
        self._metrics = metrics
        self._current_tenant = tenant
        self._on_closed = on_closed
        self._tenant: Tenant | None = None
        self._claimant = Claimant("", self._id)
        self._mismatch = ""
        self._local = sock.family == socket.AF_UNIX
        self._tasks: set[asyncio.Task[None]] = set()
        self._connection = FrameConnection(
            sock, max_frame_bytes=PEER_FRAME_BYTES, on_frame=self._take, on_closed=self._closed,
            gone_s=config.peer_gone_s,
        )  # fmt: skip
        self._hello_timer = asyncio.get_running_loop().call_later(
            config.connect_timeout_s, self.close, "no hello came in time"
        )

    def close(self, why: str) -> None:
        """Cut the consumer off; what it had claimed goes back. Idempotent."""
        self._connection.close(why)

    def _take(self, frame: bytes) -> None:
        if self._tenant is None:
            self._hello_timer.cancel()
            if fault := version_fault(frame, "peer_hello"):
                self._refuse("incompatible", fault)
                return
            message = decode(protocol.from_consumer, frame)
            assert isinstance(message, PeerHello)
            self._greet(message)
            return
        message = decode(protocol.from_consumer, frame)
        if isinstance(message, PeerHello):
            raise FrameError("a second hello")
        if isinstance(message, OpenRegion):
            task = asyncio.ensure_future(self._open(message, self._tenant))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        try:
            self._send(self._answer(message, self._tenant))
        except Refusal as refusal:
            if isinstance(message, Claim):
                self._metrics.claim_refused(refusal.reason)
                logger.info("claim_refused transfer_id=%s reason=%s", message.transfer_id, refusal.reason)
            self._send(CallRefused(message.call_id, refusal.reason, refusal.message))

    def _greet(self, hello: PeerHello) -> None:
        tenant = self._current_tenant()
        identity = self._identity
        if hello.wants_engine_id != identity.engine_id:
            message = f"engine {hello.wants_engine_id!r} is not here, this is {identity.engine_id!r}"
            self._refuse("wrong_engine", message)
            return
        if tenant is None:
            self._refuse("stale_epoch", f"no engine is registered here any more under {hello.wants_epoch!r}")
            return
        if hello.wants_epoch != tenant.registration.epoch:
            message = f"the producer restarted: the epoch is {tenant.registration.epoch}, not {hello.wants_epoch!r}"
            self._refuse("stale_epoch", message)
            return
        layout = tenant.registration.layout
        if hello.layout is None:
            self._mismatch = "the consumer has no pool registered"
        else:
            self._mismatch = layout_fault(hello.layout) or mismatch(layout, hello.layout)
        self._tenant = tenant
        self._claimant = Claimant(hello.engine_id, self._id)
        tenant.peer_sessions.add(self)
        self._send(
            PeerWelcome(
                PROTOCOL_VERSION, identity.engine_id, tenant.registration.epoch, identity.boot_id,
                identity.transports, identity.peer_socket, layout, self._mismatch,
            )
        )  # fmt: skip

    def _answer(self, message: Claim | Heartbeat | Release | Deliver, tenant: Tenant) -> Message:
        offers = tenant.offers
        if self._mismatch and isinstance(message, Claim | Deliver):
            raise Refusal("incompatible", self._mismatch)
        if isinstance(message, Deliver):
            tenant.landings.deliver(message.landing_id, message.token, message.source)
            return Done(message.call_id)
        if isinstance(message, Claim):
            reader = Reader(message.group, message.reader, message.num_readers)
            lease, lasts_s = offers.claim(message.transfer_id, message.token, self._claimant, reader)
            offers.follow(lease, self._send)
            block_ids = list(lease.block_ids)
            return Claimed(message.call_id, block_ids, lease.num_tokens, lasts_s, lease.ready, lease.num_blocks)
        if isinstance(message, Heartbeat):
            offers.heartbeat(message.transfer_id, message.token, self._claimant)
        else:
            offers.release(message.transfer_id, message.token, self._claimant, message.outcome)
        return Done(message.call_id)

    async def _open(self, message: OpenRegion, tenant: Tenant) -> None:
        try:
            if tenant.registration.retired:
                raise Refusal("stale_epoch", "the producer's pool is no longer registered")
            transport = self._transports.get(message.transport)
            if transport is None or (transport.needs_same_host and not self._local):
                raise Refusal("incompatible", f"transport {message.transport!r} is not to be had on this connection")
            served = await transport.serve(tenant.registration)
        except Refusal as refusal:
            self._send(CallRefused(message.call_id, refusal.reason, refusal.message))
            return
        num_bytes = tenant.registration.region.num_bytes
        if served.fd is None:
            self._send(RegionOpened(message.call_id, num_bytes, False, served.session, served.base_address))
            return
        fds = [served.fd]
        if (board := tenant.offers.board) is not None:
            with contextlib.suppress(OSError):  # then each lease is claimed
                fds.append(reopen_read_only(board.fd))
        answer = RegionOpened(message.call_id, num_bytes, with_descriptor=True, with_board=len(fds) == 2)
        try:
            self._connection.send(encode(answer), fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _refuse(self, reason: str, message: str) -> None:
        self._metrics.hello_refused(reason)
        self._send(Refused(reason, message))
        self._connection.close(message)

    def _send(self, message: Message) -> None:
        self._connection.send(encode(message))

    def _closed(self, why: str) -> None:
        self._hello_timer.cancel()
        logger.debug("peer_session_closed engine_id=%s reason=%s", self._claimant.engine_id, why)
        if self._tenant is not None:
            self._tenant.peer_sessions.discard(self)
            self._tenant.offers.connection_lost(self._id)
        self._on_closed(self)
