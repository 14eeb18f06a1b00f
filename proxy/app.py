"""Wiring, and the life of the process: start, serve, drain, stop. Only this file constructs the parts."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable
from time import monotonic

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
from proxy.errors import StartError
from proxy.fan_out import FanOut
from proxy.frontend import LINGER_S, ClientConnection, Services
from proxy.health_probe import Prober
from proxy.instance import Fleet, Role
from proxy.instances_api import InstancesApi
from proxy.keys import upstream_bearer_line
from proxy.kv_ledger import KvLedger
from proxy.legs import Legs
from proxy.load_ledger import settle_speeds
from proxy.membership import Membership
from proxy.metaserver import PATH as METASERVER_PATH
from proxy.metaserver import Metaserver
from proxy.metrics import ProxyMetrics, Readings
from proxy.pass_through import PassThrough
from proxy.reclaim import Reclaimer
from proxy.reload import reload
from proxy.report import Reporter
from proxy.scheduling import make_policy
from proxy.tls import server_context
from proxy.upstream_pool import SWEEP_S

log = logging.getLogger(__name__)

TICK_S = SWEEP_S  # of the one coarse timer: overdue and idle connections, the access log, speeds, drained instances
SPEED_DRIFT_A_TICK = 0.03  # the outdated speed of an idle instance is half forgotten after about 6 s


class ProxyApp:
    """`start()`, then `drain()`, then `stop()`. `addresses` is where it listens."""

    def __init__(self, config: ProxyConfig, loop: asyncio.AbstractEventLoop, resolve: Resolve = look_up) -> None:
        self.config = config
        self._read = config  # as the file and the flags had it last
        self._loop = loop
        self.access = Access(config)
        self._tls = server_context(config)
        bearer_line = upstream_bearer_line(config.upstream_api_key, config.upstream_api_key_file)
        contract = CONTRACTS["pull" if config.contract == AUTO else config.contract]()
        self.bootstrap = Bootstrap(config, loop)
        self.fleet = Fleet(config, loop)
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
        self.membership = Membership(config, self.fleet, self.kv_ledger, self.prober, loop)
        self._names = NameWatcher(self.fleet, self.membership, config.dns_refresh_interval, loop, resolve)
        self._pods = PodWatcher(config, self.membership, loop) if config.discover == "k8s" else None
        self._pass_through = PassThrough(config, self.fleet, reporter, bearer_line)
        self.contract_finder = ContractFinder(
            config, self.fleet, self.bootstrap, self.dispatcher.speak, loop, bearer_line
        )
        control = ControlApi(
            self.fleet,
            self.metrics,
            self.num_in_flight,
            bearer_line,
            InstancesApi(
                self.fleet,
                self.membership,
                self.kv_ledger,
                self.reclaimer,
                self.admission,
                self.num_in_flight,
                self.contract_finder,
            ),
            FanOut(self.fleet, bearer_line),
            self._pass_through,
            self.metaserver,
        )
        self._runner = web.AppRunner(
            control.application(),
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,
            auto_decompress=False,
        )
        self._services: Services
        self._servers: list[asyncio.Server] = []
        self._ticker: asyncio.Task[None] | None = None
        self.addresses: list[Address] = []

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
        sockets = listening_sockets(self.config.host, self.config.port, self.config.listen_backlog)
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        control = control_protocols(server, self._loop)
        self._services = Services(
            self.config, self._loop, self.dispatcher.serve, control, self._reporter.refused, self.access
        )
        for one in sockets:
            self._servers.append(
                await self._loop.create_server(
                    lambda: ClientConnection(self._services),
                    sock=one,
                    backlog=self.config.listen_backlog,
                    ssl=self._tls,
                    ssl_handshake_timeout=self.config.header_read_timeout_s if self._tls is not None else None,
                )
            )
            self.addresses.append(Address(*one.getsockname()[:2]))
        self.metaserver.url = metaserver_url(self.config, self.addresses[0].port)
        self.contract_finder.start()
        self.prober.follow()
        self.admission.tick()
        self._capacity_reader.start()
        self._names.start()
        if self._pods is not None:
            self._pods.start()
        self._ticker = self._loop.create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            due = monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            now = monotonic()
            self.metrics.loop_lag.observe(max(0.0, now - due))
            for instance in self.fleet.all:
                instance.pool.sweep(now)
            for connection in list(self._services.connections):
                connection.check_idle(now)
            for handed in list(self._services.handed_over):
                handed.check_idle(now, LINGER_S)
            for role in Role:
                settle_speeds((one.load for one in self.fleet.members[role]), SPEED_DRIFT_A_TICK)
            self.membership.tick(now)
            self.admission.tick()
            self.access.follow()
            self._access_log.flush()

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
        self._access_log.flush()


def is_loopback(address: Address) -> bool:
    return ipaddress.ip_address(address.host).is_loopback


def metaserver_url(config: ProxyConfig, port: int) -> str:
    scheme = "https" if config.tls_cert else "http"
    base = config.advertise_url.rstrip("/") or f"{scheme}://{Address(config.host.strip('[]'), port)}"
    return base if base.endswith(METASERVER_PATH) else base + METASERVER_PATH


def listening_sockets(host: str, port: int, backlog: int) -> list[socket.socket]:
    """One bound socket for each address `host` means, all on one port. Raises StartError."""
    try:
        found = socket.getaddrinfo(host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartError(f"--host {host}: {error.strerror or error}") from None
    sockets: list[socket.socket] = []
    unusable: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            one = socket.socket(family, kind, protocol)
        except OSError as error:  # an address family this machine lacks
            unusable = error
            continue
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port or (sockets[0].getsockname()[1] if sockets else 0), *address[2:]))
            one.listen(backlog)
            one.setblocking(False)
            sockets.append(one)
        except OSError as error:
            one.close()
            unusable = error
            if error.errno == errno.EADDRNOTAVAIL:
                continue  # localhost may name ::1 where there is no IPv6
            for other in sockets:
                other.close()
            raise StartError(_cannot_listen(host, port, error)) from None
    if not sockets:
        raise StartError(_cannot_listen(host, port, unusable))
    return sockets


def _cannot_listen(host: str, port: int, error: OSError | None) -> str:
    if error is not None and error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; stop what listens there or choose another with --port"
    if error is not None and error.errno == errno.EACCES:
        return f"port {port} needs privileges; choose one above 1023 with --port"
    return f"cannot listen on {host}:{port}: {error.strerror if error else 'no address'}; choose another with --host"


async def run(config: ProxyConfig, reread: Callable[[], ProxyConfig]) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal ends it at once. SIGHUP: `reread` and follow."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    app = ProxyApp(config, loop)
    loop.add_signal_handler(signal.SIGHUP, app.reload, reread)
    await app.start()
    raise_descriptor_limit(config.max_connections)
    print("ready", " ".join(f"listen={address}" for address in app.addresses), flush=True)
    log.info(
        "event=ready contract=%s prefill_policy=%s decode_policy=%s prefillers=%s decoders=%s",
        config.contract, config.policy_of(Role.PREFILL), config.policy_of(Role.DECODE),
        ",".join(map(str, config.prefillers)), ",".join(map(str, config.decoders)),
    )  # fmt: skip
    if app.access.admin_is_open and not all(map(is_loopback, app.addresses)):
        log.warning(
            "event=admin_is_open listen=%s: whoever reaches it may change /instances; give --admin-api-key",
            ",".join(map(str, app.addresses)),
        )
    await told.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, lambda *_: os._exit(1))
    log.info("event=draining in_flight=%d timeout_s=%s", app.num_in_flight(), config.drain_timeout_s)
    in_time = await app.drain()
    await app.stop()
    log.info("event=stopped drained=%s", in_time)
