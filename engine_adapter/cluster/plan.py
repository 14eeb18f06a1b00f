"""From one deployment file to every process of it: commands, environment, ports, health addresses, order.

Pure: what depends on the machine comes in as a `Site`. Same file and same site, same plan, also for the restarts of a
process: its ports are part of its command.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from engine_adapter.cluster.config import Args, ClusterConfig, Instance, StoreSection

Kind = Literal["sidecar", "engine", "proxy", "store"]

STOP_ORDER: tuple[Kind, ...] = ("proxy", "engine", "sidecar", "store")
"""The proxy drains first, while the engines still answer; a sidecar outlives its engine."""

DEFAULT_KV_POOL_BYTES = 256 * 1024**2
"""pd-engine's own default, said here so that `up` can compare the sum with the machine's memory."""

SOCKET_PATH_LIMIT = 107
"""Bytes a unix socket's path may have on Linux (sun_path holds 108 with the final zero)."""


@dataclass(frozen=True, slots=True)
class Site:
    """What a plan needs to know of the machine."""

    model_dir: str
    socket_dir: str
    """Short, private, removed when the cluster ends."""
    num_cores: int
    free_ports: tuple[int, ...]
    """At least `num_free_ports(config)`, none of them fixed in the file."""


@dataclass(frozen=True, slots=True)
class PlannedProcess:
    """One process: how it is started, when, and how to see that it is well."""

    name: str
    """`prefill-0`, `prefill-0.sidecar`, `proxy`: also its log's name."""
    kind: Kind
    role: str
    argv: tuple[str, ...]
    host: str
    port: int
    """The one it is known by (0: none); `ports` are all it listens on."""
    ports: tuple[int, ...]
    health_url: str
    """200 when it can do its work."""
    metrics_url: str
    needs: tuple[str, ...] = ()
    """Names that must be healthy before each start, also the later ones."""
    after: tuple[str, ...] = ()
    """Names that must be healthy before the first start only."""
    env: dict[str, str] = field(default_factory=dict)
    """On top of the environment `up` was given."""

    @property
    def address(self) -> str:
        return f"{bracketed(self.host)}:{self.port}" if self.port else bracketed(self.host)

    def shell_line(self) -> str:
        """The command as bash takes it, environment included."""
        return " ".join([*(f"{key}={shlex.quote(value)}" for key, value in self.env.items()), shlex.join(self.argv)])


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    served_name: str
    processes: tuple[PlannedProcess, ...]
    """In start order: sidecars, engines, proxy."""

    def of_kind(self, kind: Kind) -> tuple[PlannedProcess, ...]:
        return tuple(process for process in self.processes if process.kind == kind)

    @property
    def proxy(self) -> PlannedProcess:
        return self.of_kind("proxy")[0]

    def stop_stages(self) -> list[tuple[PlannedProcess, ...]]:
        """Processes by the order they are stopped in; those of one stage together."""
        return [stage for kind in STOP_ORDER if (stage := self.of_kind(kind))]


def plan(config: ClusterConfig, site: Site) -> Plan:
    free = iter(site.free_ports)
    num_instances = sum(group.count for group in config.instance)
    num_threads = config.engine.num_threads or max(1, site.num_cores // num_instances)
    served_name = config.model.served_name or site.model_dir.rstrip("/").rpartition("/")[2]
    sidecars, engines = [], []
    for index, (group, name, port) in enumerate(_instances(config, free)):
        sidecar = _sidecar(config, site, name, group.role, index, free)
        sidecars.append(sidecar)
        engines.append(_engine(config, site, group, sidecar, port, num_threads, served_name))
    proxy = _proxy(config, engines, free)
    return Plan(config.cluster.name, served_name, (*sidecars, *engines, proxy))


def num_free_ports(config: ClusterConfig) -> int:
    """How many ports the file leaves to be chosen."""
    num_instances = sum(group.count for group in config.instance)
    sidecars = sum(num_instances for first in (config.sidecar.port, config.sidecar.metrics_port) if not first)
    return sum(group.count for group in config.instance if not group.port) + sidecars + (not config.proxy.port)


def kv_pool_bytes(config: ClusterConfig, block_bytes: int) -> int:
    """KV cache of all instances together. `block_bytes`: one block over all layers, which num_blocks is counted in."""
    num_instances = sum(group.count for group in config.instance)
    if config.engine.num_blocks:
        return num_instances * config.engine.num_blocks * block_bytes
    return num_instances * (config.engine.kv_pool or DEFAULT_KV_POOL_BYTES)


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def reachable(host: str) -> str:
    """Where this machine reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _instances(config: ClusterConfig, free: Iterator[int]) -> Iterator[tuple[Instance, str, int]]:
    """Every instance with its name, numbered by role over all groups, and its port."""
    numbers = {"prefill": 0, "decode": 0}
    for group in config.instance:
        for i in range(group.count):
            yield group, f"{group.role}-{numbers[group.role]}", group.port + i if group.port else next(free)
            numbers[group.role] += 1


def _sidecar(
    config: ClusterConfig, site: Site, name: str, role: str, index: int, free: Iterator[int]
) -> PlannedProcess:
    host = config.cluster.host
    port = config.sidecar.port + index if config.sidecar.port else next(free)
    metrics_port = config.sidecar.metrics_port + index if config.sidecar.metrics_port else next(free)
    argv = (
        *config.commands.sidecar,
        *("--socket", f"{site.socket_dir}/{name}.sock"),
        *("--listen", f"{bracketed(host)}:{port}"),
        *("--engine-id", f"{config.cluster.name}-{name}"),
        *("--rank", "0"),
        *("--transport", config.sidecar.transport),
        *("--metrics-port", str(metrics_port)),
        *(_store_flags(config.store) if role == "prefill" else ()),
        *_flags(config.sidecar.args),
    )
    return PlannedProcess(
        name=f"{name}.sidecar",
        kind="sidecar",
        role=role,
        argv=argv,
        host=host,
        port=port,
        ports=(port, metrics_port),
        health_url=f"http://{bracketed(reachable(host))}:{metrics_port}/healthz",
        metrics_url=f"http://{bracketed(reachable(host))}:{metrics_port}/metrics",
        env={"PYTHONUNBUFFERED": "1"},
    )


def _engine(
    config: ClusterConfig,
    site: Site,
    group: Instance,
    sidecar: PlannedProcess,
    port: int,
    num_threads: int,
    served_name: str,
) -> PlannedProcess:
    engine, host, name = config.engine, config.cluster.host, sidecar.name.removesuffix(".sidecar")
    pool = (
        ("--num-blocks", str(engine.num_blocks))
        if engine.num_blocks
        else ("--kv-pool-bytes", str(int(engine.kv_pool or DEFAULT_KV_POOL_BYTES)))
    )
    argv = (
        *(*config.commands.engine, "serve"),
        *("--model", site.model_dir),
        *("--served-model-name", served_name),
        *("--role", group.role),
        *("--host", host),
        *("--port", str(port)),
        *("--device", engine.device),
        *("--dtype", config.model.dtype),
        *("--sidecar", f"{site.socket_dir}/{name}.sock"),
        *("--engine-id", f"{config.cluster.name}-{name}"),
        *(("--max-model-len", str(engine.max_model_len)) if engine.max_model_len else ()),
        *("--block-size", str(engine.block_size)),
        *pool,
        *("--num-threads", str(num_threads)),
        *_flags({**engine.args, **group.args}),
    )
    threads = str(num_threads)
    return PlannedProcess(
        name=name,
        kind="engine",
        role=group.role,
        argv=argv,
        host=host,
        port=port,
        ports=(port,),
        health_url=f"http://{bracketed(reachable(host))}:{port}/health",
        metrics_url=f"http://{bracketed(reachable(host))}:{port}/metrics",
        needs=(sidecar.name,),
        env={"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
    )


def _proxy(config: ClusterConfig, engines: Iterable[PlannedProcess], free: Iterator[int]) -> PlannedProcess:
    host = config.proxy.host or config.cluster.host
    port = config.proxy.port or next(free)
    by_role = {role: [engine for engine in engines if engine.role == role] for role in ("prefill", "decode")}
    argv = (
        *config.commands.proxy,
        *("--host", host),
        *("--port", str(port)),
        *("--prefiller-hosts", *(reachable(engine.host) for engine in by_role["prefill"])),
        *("--prefiller-ports", *(str(engine.port) for engine in by_role["prefill"])),
        *("--decoder-hosts", *(reachable(engine.host) for engine in by_role["decode"])),
        *("--decoder-ports", *(str(engine.port) for engine in by_role["decode"])),
        *(("--policy", config.proxy.policy) if config.proxy.policy else ()),
        *_flags(config.proxy.args),
    )
    return PlannedProcess(
        name="proxy",
        kind="proxy",
        role="proxy",
        argv=argv,
        host=host,
        port=port,
        ports=(port,),
        health_url=f"http://{bracketed(reachable(host))}:{port}/health",
        metrics_url=f"http://{bracketed(reachable(host))}:{port}/metrics",
        after=tuple(engine.name for engine in engines),
        env={"PYTHONUNBUFFERED": "1"},
    )


def _store_flags(store: StoreSection) -> tuple[str, ...]:
    values = {
        "--store-memory-bytes": store.memory,
        "--store-dir": store.dir,
        "--store-dir-bytes": store.dir_size,
        "--store-mooncake": store.mooncake,
        "--store-mooncake-segment-bytes": store.mooncake_segment,
    }
    words = [(flag, str(value if isinstance(value, str) else int(value))) for flag, value in values.items()
             if value is not None]  # fmt: skip
    return tuple(word for flag_and_value in words for word in flag_and_value)


def _flags(args: Args) -> tuple[str, ...]:
    words: list[str] = []
    for key, value in args.items():
        if value is False:
            continue
        words.append("--" + key.strip("-").replace("_", "-"))
        if isinstance(value, list):
            words += [str(item) for item in value]
        elif value is not True:
            words.append(str(value))
    return tuple(words)
