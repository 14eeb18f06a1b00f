"""Wiring, and the life of the process: start, serve, drain, stop. Only this file constructs the parts."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any

from aiohttp import web

from proxy.access import Access
from proxy.access_log import AccessLog
from proxy.admission import Admission
from proxy.auto_contract import ContractFinder
from proxy.bootstrap import Bootstrap
from proxy.callers import Callers
from proxy.capacity import CapacityReader
from proxy.config import Address, ProxyConfig
from proxy.contracts import AUTO, CONTRACTS
from proxy.control_api import ControlApi
from proxy.control_http import control_protocols
from proxy.descriptors import raise_descriptor_limit
from proxy.discovery.dns import NameWatcher, Resolve, look_up
from proxy.discovery.kubernetes import PodWatcher
from proxy.dispatch import Dispatcher
from proxy.drain import wait_until
from proxy.errors import ConfigError, StartError
from proxy.fan_out import FanOut
from proxy.freed_memory import FreedMemory
from proxy.frontend import LINGER_S, ClientConnection, Services
from proxy.health_probe import Prober
from proxy.instance import Fleet, Role
from proxy.instances_api import InstancesApi
from proxy.keys import upstream_bearer_line
from proxy.kv_ledger import KvLedger
from proxy.legs import Legs
from proxy.listening import is_loopback, listening_sockets, metaserver_url
from proxy.load_board import LoadBoard
from proxy.membership import Membership
from proxy.metaserver import Metaserver
from proxy.metrics import ProxyMetrics, Readings
from proxy.pass_through import PassThrough
from proxy.prefix_board import SharedPrefixes
from proxy.reclaim import Reclaimer
from proxy.relay_thread import RelayThread
from proxy.reload import reload
from proxy.report import Reporter
from proxy.scheduling import make_policy
from proxy.scheduling.prefix_affinity import PrefixAffinity
from proxy.tls import load_certificate, server_context
from proxy.upstream_pool import SWEEP_S
from proxy.workers.accepting import MAX_HANDSHAKES, Acceptor, Connections
from proxy.workers.crew import Crew
from proxy.workers.metrics import dump
from proxy.workers.seat import Seat
from proxy.workers.snapshot import restore, taken

log = logging.getLogger(__name__)

FORWARD_TIMEOUT_S = 5.0  # for another worker to answer a decoder's call, beyond --metaserver-wait-s
TICK_S = SWEEP_S  # of the one coarse timer: overdue and idle connections, the access log, speeds, drained instances
SPEED_DRIFT_A_TICK = 0.03  # the outdated speed of an idle instance is half forgotten after about 6 s


class ProxyApp:
    """`start()`, then `drain()`, then `stop()`. `addresses` is where it listens."""

    def __init__(
        self,
        config: ProxyConfig,
        loop: asyncio.AbstractEventLoop,
        resolve: Resolve = look_up,
        crew: Crew | None = None,
    ) -> None:
        self.config = config
        self._crew = crew
        self._read = config  # as the file and the flags had it last
        self._loop = loop
        self.access = Access(config)
        self._tls = server_context(config)
        bearer_line = upstream_bearer_line(config.upstream_api_key, config.upstream_api_key_file)
        contract = CONTRACTS["pull" if config.contract == AUTO else config.contract]()
        self.bootstrap = Bootstrap(config, loop)
        self.fleet = Fleet(config, loop, crew.row if crew is not None else None)
        self.kv_ledger = KvLedger()
        self.metrics = ProxyMetrics(self.fleet, self.kv_ledger, self._readings())
        self.metaserver = Metaserver(
            config.metaserver_wait_s, Callers(config.metaserver_allow, self.fleet), loop, self.metrics.metaserver_calls
        )
        self.reclaimer = Reclaimer(config, self.fleet, self.kv_ledger, loop)
        wants_lines = log.isEnabledFor(logging.INFO) or "access_log" in config.model_fields_set
        self._access_log = AccessLog(config.access_log if wants_lines else "off")
        self._reporter = reporter = Reporter(self.metrics, self._access_log)
        policies = {role: make_policy(config.policy_of(role), role) for role in Role}
        legs = Legs(
            config, contract, policies, self.fleet, self.kv_ledger, self.reclaimer, reporter, self.bootstrap,
            self.metaserver,
        )  # fmt: skip
        self.admission = Admission(config, legs, self.fleet, loop)
        self.dispatcher = Dispatcher(config, legs, self.admission, reporter, loop, bearer_line)
        self._capacity_reader = CapacityReader(config, self.fleet, loop, bearer_line)
        self.prober = Prober(config, self.fleet, loop, bearer_line)
        self.membership = Membership(config, self.fleet, self.kv_ledger, self.prober, self._capacity_reader, loop)
        self._names = NameWatcher(self.fleet, self.membership, config.dns_refresh_interval, loop, resolve)
        self._pods = PodWatcher(config, self.membership, loop) if config.discover == "k8s" else None
        self._pass_through = PassThrough(config, self.fleet, reporter, bearer_line)
        self.contract_finder = ContractFinder(
            config, self.fleet, self.bootstrap, self.dispatcher.speak, loop, bearer_line
        )
        instances = InstancesApi(
            self.fleet,
            self.membership,
            self.kv_ledger,
            self.reclaimer,
            self.admission,
            self.num_in_flight,
            self.contract_finder,
            crew,
        )
        control = ControlApi(
            self.fleet,
            self.metrics,
            self.num_in_flight,
            bearer_line,
            instances,
            FanOut(self.fleet, bearer_line),
            self._pass_through,
            self.metaserver,
            crew,
        )
        if crew is not None:
            self._join(crew, instances)
            for role, policy in policies.items():
                if isinstance(policy, PrefixAffinity):
                    policy.share(SharedPrefixes(crew.seat.prefixes[role.value], crew.row))
        self._runner = web.AppRunner(
            control.application(),
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,
            auto_decompress=False,
        )
        self._services: Services
        self._servers: list[asyncio.Server | Acceptor] = []
        self._ticker: asyncio.Task[None] | None = None
        self._freed_memory = FreedMemory()
        self._relay_thread: RelayThread | None = None
        self.addresses: list[Address] = []

    def _join(self, crew: Crew, instances: InstancesApi) -> None:
        """What the other workers may ask of this one."""
        crew.shows(lambda: dump(self.metrics.collected()), instances.shown)
        for verb, change in instances.verbs.items():
            crew.does(f"instances/{verb}", change)

        async def post(params: dict[str, Any]) -> None:
            await self.metaserver.post(params["request_id"], params)

        async def forward(worker: int, params: dict[str, Any]) -> None:
            await crew.elsewhere(worker, "metaserver", params, self.config.metaserver_wait_s + FORWARD_TIMEOUT_S)

        async def snapshot(_: None) -> dict[str, Any]:
            return taken(self._read, self.fleet, self.membership)

        crew.does("metaserver", post)
        crew.does("snapshot", snapshot)
        self.metaserver.worker, self.metaserver.forward = crew.worker, forward

    def _readings(self) -> Readings:
        return Readings(
            self.num_in_flight,
            self.num_waiting,
            lambda: len(self.connections),
            lambda role: sum(one.instance.role is role for one in self.membership.waiting.values()),
            lambda: self.admission.num_rejected,
        )

    def num_in_flight(self) -> int:
        return len(self.dispatcher.open) + self._pass_through.num_open

    def num_waiting(self) -> int:
        return self.admission.num_waiting

    @property
    def connections(self) -> set[ClientConnection]:
        """Those of clients, without the ones handed to the control API."""
        return self._services.connections

    async def start(self) -> None:
        """Raises StartError if it cannot listen; nothing is left open then."""
        crew = self._crew
        if crew is None:
            sockets = listening_sockets(self.config.host, self.config.port, self.config.listen_backlog)
        else:
            sockets = crew.seat.listeners
            if crew.seat.replaces and (known := await crew.snapshot()) is not None:
                self._read = restore(known, self.config, self.fleet, self.membership)
                self.access.reload(self._read)
                if self._tls is not None:
                    load_certificate(self._tls, self._read)
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        control = control_protocols(server, self._loop)
        self._services = Services(
            self.config, self._loop, self.dispatcher.serve, control, self._reporter.refused, self.access
        )
        if crew is not None:
            self._services.connections = Connections(crew.row)
        elif self._tls is not None:
            self._services.connections = Connections(LoadBoard(1).row(0))
        num_more = MAX_HANDSHAKES if self._tls is not None else 0
        max_lent = raise_descriptor_limit(self.config.max_connections_each, num_more)
        for one in sockets:
            self.addresses.append(Address(*one.getsockname()[:2]))
            self._servers.append(await self._listen(one))
        self.metaserver.url = metaserver_url(self.config, self.addresses[0].port)
        if crew is not None:
            self.metaserver.url += f"/{crew.worker}"
        if self.config.relay_thread != "off" and (thread := RelayThread.start(self._loop, max_lent)) is not None:
            self._relay_thread = thread
            self.dispatcher.relay_by(thread)
        self.contract_finder.start()
        self.prober.follow()
        self.admission.tick()
        self._capacity_reader.start()
        self._names.start()
        if self._pods is not None:
            self._pods.start()
        self._ticker = self._loop.create_task(self._tick())
        self._warn_of_open_admin()

    def _warn_of_open_admin(self) -> None:
        is_first = self._crew is None or not self._crew.worker
        if is_first and self.access.admin_is_open and not all(map(is_loopback, self.addresses)):
            log.warning(
                "event=admin_is_open listen=%s: whoever reaches it may change /instances; give --admin-api-key",
                ",".join(map(str, self.addresses)),
            )

    async def _listen(self, one: socket.socket) -> asyncio.Server | Acceptor:
        connections = self._services.connections
        if not isinstance(connections, Connections):
            return await self._loop.create_server(self._connection, sock=one, backlog=self.config.listen_backlog)
        acceptor = Acceptor(
            one, self._connection, connections, self._loop, self._tls, self.config.header_read_timeout_s
        )
        acceptor.start()
        return acceptor

    def _connection(self) -> ClientConnection:
        return ClientConnection(self._services)

    async def _tick(self) -> None:
        while True:
            due = monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self.metrics.loop_lag.observe(max(0.0, monotonic() - due))
            for _ in range(2):  # what came while this process stood still is read before anybody's time is up
                await asyncio.sleep(0)
            now = monotonic()
            for instance in self.fleet.all:
                instance.pool.sweep(now)
            for connection in list(self._services.connections):
                connection.check_idle(now)
            for handed in list(self._services.handed_over):
                handed.check_idle(now, LINGER_S)
            for role in Role:
                self.fleet.settle_speeds(role, SPEED_DRIFT_A_TICK)
            self.membership.tick(now)
            self.admission.tick()
            self.access.follow()
            self._access_log.flush()
            self._freed_memory.tick(now)
            if self._crew is not None:
                self._crew.row.beat()

    async def drain(self) -> bool:
        """Take no more connections and wait for what is in flight. Returns whether all of it ended in time."""
        for server in self._servers:
            server.close()
        self._services.draining = True
        for connection in list(self._services.connections):
            connection.close_if_idle()
        return await wait_until(lambda: not self.num_in_flight(), self.config.drain_timeout_s)

    def reload(self, reread: Callable[[], ProxyConfig]) -> None:
        self._read = reload(self.config, self._read, reread, self.membership, self.access, self._tls)

    async def stop(self) -> None:
        for connection in list(self._services.connections):
            connection.break_off()
        await asyncio.sleep(0)
        await wait_until(lambda: not self.dispatcher.open, 1.0)
        await self.reclaimer.finish()
        if self._pods is not None:
            await self._pods.stop()
        self._names.stop()
        self.membership.stop()
        self.contract_finder.stop()
        self.prober.stop()
        self._capacity_reader.stop()
        if self._ticker is not None:
            self._ticker.cancel()
        await self._runner.cleanup()
        await self._pass_through.close()
        for instance in self.fleet.all:
            instance.pool.close()
        await asyncio.sleep(0)
        if self._relay_thread is not None:
            self._relay_thread.stop()
        self._access_log.flush()


async def run(config: ProxyConfig, reread: Callable[[], ProxyConfig]) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal ends it at once. SIGHUP: `reread` and follow."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    app = ProxyApp(config, loop)
    loop.add_signal_handler(signal.SIGHUP, app.reload, reread)
    await app.start()
    print("ready", " ".join(f"listen={address}" for address in app.addresses), flush=True)
    log_ready(config)
    await told.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, lambda *_: os._exit(1))
    await _end(app)
    loop.remove_signal_handler(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # with no handler it would end us as if we had failed


def log_ready(config: ProxyConfig) -> None:
    log.info(
        "event=ready contract=%s prefill_policy=%s decode_policy=%s prefillers=%s decoders=%s",
        config.contract, config.policy_of(Role.PREFILL), config.policy_of(Role.DECODE),
        ",".join(map(str, config.prefillers)), ",".join(map(str, config.decoders)),
    )  # fmt: skip


async def _end(app: ProxyApp) -> None:
    log.info("event=draining in_flight=%d timeout_s=%s", app.num_in_flight(), app.config.drain_timeout_s)
    in_time = await app.drain()
    await app.stop()
    log.info("event=stopped drained=%s", in_time)


async def run_worker(seat: Seat, config: ProxyConfig, reread: Callable[[], ProxyConfig]) -> None:
    """One of several: serve until SIGTERM, or until the parent is gone, then drain. The parent says when to reload."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, told.set)
    crew = Crew(seat, loop)
    await crew.peers.connect()
    try:
        app = ProxyApp(config, loop, crew=crew)

        async def reload(_: None) -> None:
            app.reload(reread)

        crew.does("reload", reload)
        await app.start()
    except (StartError, ConfigError) as error:
        crew.peers.tell_parent("failed", str(error))
        await asyncio.sleep(0)
        crew.peers.close()
        raise
    crew.serve()
    await asyncio.wait(
        [loop.create_task(told.wait()), loop.create_task(crew.peers.parent_is_gone.wait())],
        return_when=asyncio.FIRST_COMPLETED,
    )
    crew.leaving()
    await _end(app)
    crew.stop()
