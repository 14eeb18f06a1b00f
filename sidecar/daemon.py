"""The sidecar process: makes everything, serves until told to stop, takes everything apart in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable

from aiohttp import web

from sidecar.config import SidecarConfig, split_address
from sidecar.copy_executor import CopyExecutor
from sidecar.deliveries import Deliveries
from sidecar.direct_pools import DirectPools
from sidecar.engine_session import EngineSession
from sidecar.errors import LayoutRefused, StartError
from sidecar.landings import Landings
from sidecar.lease_board import LeaseBoard
from sidecar.leases import State
from sidecar.metrics import CONTENT_TYPE, SidecarMetrics
from sidecar.offers import Offers
from sidecar.peer_session import PeerSession
from sidecar.peers import PeerTable
from sidecar.regions import boot_id
from sidecar.registration import Identity, Registration
from sidecar.server import EngineSocket, Listener, listen_abstract, listen_tcp
from sidecar.store.block_store import BlockStore
from sidecar.store.metrics import StoreMetrics
from sidecar.store.registry import open_store
from sidecar.store.store_table import StoreTable
from sidecar.taken_ports import check_ports
from sidecar.tenancy import Tenancy
from sidecar.transfer_table import TransferTable
from sidecar.transport.registry import available_transports

logger = logging.getLogger(__name__)

DRAIN_S = 2.0
"""Pulls under way at SIGTERM get this long to end by themselves."""
STORE_DRAIN_S = 3.0
"""Saved blocks get this long to reach the slower tiers of the store."""


class Daemon:
    """One sidecar; also the Host of its engine sessions."""

    def __init__(self, config: SidecarConfig) -> None:
        """Bind every socket and find the transports. Raises StartError or UsageError, with nothing left behind."""
        self._config = config
        host, port = split_address(config.listen)
        check_ports(config, os.environ)
        if host in ("0.0.0.0", "::") and not config.advertise_host:
            raise StartError(f"--listen {config.listen}: give --advertise-host, peers cannot connect to {host}")
        advertised = config.advertise_host or host
        self.metrics = SidecarMetrics()
        self._tenancy: Tenancy | None = None
        self._tenant_session: EngineSession | None = None
        self._sessions: set[EngineSession] = set()
        self._peer_sessions: set[PeerSession] = set()
        self._vacant: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._num_epochs = 0
        self._engine_fault = ""
        """Why the engine that was registered is no more; "" while one is, and before the first."""
        self._stopping = asyncio.Event()
        self._sockets: list[socket.socket] = []
        self._executor = CopyExecutor(config.copy_threads, config.copy_bytes_per_s)
        self._store: BlockStore | None = None
        self._board = _lease_board() if config.transport != "mooncake" else None
        try:
            self._store = open_store(config, StoreMetrics(self.metrics.registry), advertised)
            self.transports = available_transports(config, self._executor, advertised, self._board)
            self._peer_sock = self._keep(listen_tcp(host, port, "--listen"))
            self._metrics_sock = self._keep(listen_tcp(host, config.metrics_port, "--metrics-port"))
            peer_socket = f"pd-sidecar-{secrets.token_hex(16)}"
            self._local_sock = self._keep(listen_abstract(peer_socket))
            self._engine_socket = EngineSocket(config.socket)
        except BaseException:
            for sock in self._sockets:
                sock.close()
            self._executor.close()
            if self._board is not None:
                self._board.close()
            if self._store is not None:
                self._store.close()
            raise
        self._keep(self._engine_socket.sock)
        self.store_tiers = self._store.names if self._store else ()
        self.identity = Identity(
            config.engine_id, config.rank, secrets.token_hex(8), boot_id(), advertised,
            self._peer_sock.getsockname()[1], peer_socket if "shm" in self.transports else "", tuple(self.transports),
        )  # fmt: skip

    def watch_process(self) -> None:
        """For a process of its own: stop at SIGTERM or SIGINT, and where it was asked for, with the parent."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        if self._config.exit_on_stdin_eof:
            self._watch_stdin()

    def stop(self) -> None:
        """Have `serve` end, in order. Called on the loop's thread."""
        self._stopping.set()

    async def serve(self, on_ready: Callable[[str], None]) -> None:
        """Run until `stop`, then drain. `on_ready` gets the line that says where everything is."""
        listeners = [
            Listener(self._engine_socket.sock, self._engine_connected),
            Listener(self._peer_sock, self._peer_connected),
            Listener(self._local_sock, self._peer_connected),
        ]
        runner = await self._serve_http()
        on_ready(self._ready_line())
        try:
            await self._stopping.wait()
            logger.info("stopping")
            for listener in listeners:
                listener.close()
            await self._drain()
        finally:
            self._engine_socket.remove(with_directory=self._config.remove_directory)
            await runner.cleanup()
            self._executor.close()
            if self._board is not None:
                self._board.close()
            if self._store is not None:
                self._store.close()

    def next_epoch(self) -> str:
        """A name for the next registration, unlike any other of any process."""
        self._num_epochs += 1
        return f"{self.identity.sidecar_epoch}-{self._num_epochs}"

    async def admit(self, session: EngineSession, registration: Registration) -> Tenancy:
        """See engine_session.Host. Waits for a predecessor that is being taken apart."""
        while self._tenancy is not None and self._tenancy.registration.retired:
            await asyncio.shield(self._vacant)
        if self._tenancy is not None:
            raise LayoutRefused("another engine has its pool registered with this sidecar")
        config, metrics = self._config, self.metrics
        epoch, layout = registration.epoch, registration.layout
        offers = Offers(config, epoch, layout.num_blocks, metrics, session.send, layout.num_layers, self._board)
        # A limit on copying holds only for what this process copies; ranks that read one lease together claim it.
        may_read = registration.direct and layout.tp_size == 1 and not config.copy_bytes_per_s
        direct = DirectPools(session.hand_over, session.send) if may_read else None
        peers = PeerTable(config, self.identity, registration, self.transports, metrics, direct)
        landings = Landings(config, epoch, layout.num_blocks, metrics, session.send)
        pulls = landings.pulls = TransferTable(config, registration, peers, metrics, landings.pull_ended)
        deliveries = Deliveries(self.identity, epoch, peers, offers)
        store = None
        if self._store and registration.region.on_host and not registration.staged:
            store = StoreTable(self._store, registration, config.rank, self._executor)
        self._tenancy = Tenancy(
            registration, offers, peers, pulls, landings, deliveries, self.transports.values(), store
        )
        self._tenant_session = session
        self._engine_fault = ""
        for transport in self.transports.values():
            transport.registered(registration)
        logger.info(
            "pool_registered epoch=%s bytes=%d layout=%s",
            registration.epoch, registration.region.num_bytes, registration.layout.summary(),
        )  # fmt: skip
        return self._tenancy

    async def dismiss(self, session: EngineSession, why: str) -> None:
        """See engine_session.Host."""
        if self._tenant_session is not session or self._tenancy is None:
            return
        self._vacant = asyncio.get_running_loop().create_future()
        await self._tenancy.retire(why)
        self._tenancy = None
        self._tenant_session = None
        self._engine_fault = why
        self._vacant.set_result(None)

    def tenant(self) -> Tenancy | None:
        """Who may be read from now."""
        return self._tenancy if self._tenancy and not self._tenancy.registration.retired else None

    def _engine_connected(self, sock: socket.socket) -> None:
        session = EngineSession(sock, self)
        self._sessions.add(session)
        session.ended.add_done_callback(lambda _: self._sessions.discard(session))

    def _peer_connected(self, sock: socket.socket) -> None:
        if len(self._peer_sessions) >= self._config.max_peers:
            logger.warning("peer_refused limit=%d", self._config.max_peers)
            sock.close()
            return
        self._peer_sessions.add(
            PeerSession(
                sock, self._config, self.identity, self.transports, self.metrics, self.tenant,
                self._peer_sessions.discard,
            )
        )  # fmt: skip

    async def _drain(self) -> None:
        if self._tenancy is not None:
            await self._tenancy.pulls.drain(DRAIN_S)
            self._tenancy.landings.close("the sidecar is stopping")
            await self._tenancy.pulls.close("the sidecar is stopping")
        sessions = list(self._sessions)
        for session in sessions:
            session.close("the sidecar is stopping")
        if sessions:
            await asyncio.wait([session.ended for session in sessions])
        for peer in list(self._peer_sessions):
            peer.close("the sidecar is stopping")
        if self._store is not None:
            await self._store.drain(STORE_DRAIN_S)
        await asyncio.sleep(0)

    async def _serve_http(self) -> web.AppRunner:
        application = web.Application()
        application.router.add_get("/metrics", self._metrics_page)
        application.router.add_get("/healthz", self._health_page)
        runner = web.AppRunner(application, access_log=None, handle_signals=False)
        await runner.setup()
        await web.SockSite(runner, self._metrics_sock).start()
        return runner

    async def _metrics_page(self, request: web.Request) -> web.Response:
        tenancy = self._tenancy
        for state in (State.OFFERED, State.CLAIMED):
            self.metrics.leases.labels(state).set(tenancy.offers.count(state) if tenancy else 0)
        self.metrics.queued_copies.set(self._executor.num_queued)
        self.metrics.open_pulls.set(len(tenancy.pulls) if tenancy else 0)
        self.metrics.open_landings.set(len(tenancy.landings) if tenancy else 0)
        self.metrics.registered_bytes.set(tenancy.registration.region.num_bytes if tenancy else 0)
        if self._store is not None:
            self._store.measure()
        return web.Response(body=self.metrics.page(), headers={"Content-Type": CONTENT_TYPE})

    async def _health_page(self, request: web.Request) -> web.Response:
        """503 when a transport is broken or the engine is gone; 200 while the first one has yet to come."""
        faults = {name: fault for name, transport in self.transports.items() if (fault := transport.fault())}
        if self._engine_fault:
            faults["engine"] = self._engine_fault
        tenant = self.tenant()
        state = {
            "status": "broken" if faults else "ok",
            "engine_id": self.identity.engine_id,
            "engine_registered": tenant is not None,
            "epoch": tenant.registration.epoch if tenant else None,
            "transports": list(self.transports),
            "faults": faults,
            "store": {"tiers": self.store_tiers, "faults": self._store.faults() if self._store else {}},
        }
        return web.json_response(state, status=503 if faults else 200)

    def _ready_line(self) -> str:
        peer, metrics = self._peer_sock.getsockname(), self._metrics_sock.getsockname()
        line = (
            f"ready socket={self._config.socket} listen={_join(peer)} metrics={_join(metrics)} "
            f"transports={','.join(self.transports)}"
        )
        logger.info("%s engine_id=%s pid=%d", line, self._config.engine_id, os.getpid())
        return line

    def _watch_stdin(self) -> None:
        try:
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._stdin_readable)
        except OSError as error:
            self._engine_socket.remove()
            self._executor.close()
            raise StartError("--exit-on-stdin-eof: standard input must be a pipe from the parent") from error

    def _stdin_readable(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            logger.info("stdin_ended")
            self._stopping.set()

    def _keep(self, sock: socket.socket) -> socket.socket:
        self._sockets.append(sock)
        return sock


async def run(config: SidecarConfig) -> None:
    """Serve one sidecar until it is told to stop. Raises StartError."""
    gc.freeze()  # what the imports made stays; without it every full collection walks it
    daemon = Daemon(config)
    daemon.watch_process()
    await daemon.serve(lambda line: print(line, flush=True))


def _lease_board() -> LeaseBoard | None:
    try:
        return LeaseBoard()
    except OSError as error:
        logger.warning("no_lease_board error=%s consequence=every lease is claimed before it is read", error)
        return None


def _join(address: tuple[object, ...]) -> str:
    host = str(address[0])
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
