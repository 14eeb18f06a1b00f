"""A plan over several nodes on this machine: each node an address of loopback, its engines small ones. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from engine_adapter.cluster.deployment_plan import COMPUTED_PROXY_FLAGS
from engine_adapter.cluster.plan import PlannedProcess
from engine_adapter.cluster.processes import DeploymentPlan, Process
from engine_adapter.cluster.share import Share

Engines = Literal["torch", "mock"]
Flavour = Literal["baton", "nixl"]
Place = tuple[str, int]
MAX_TORCH_INSTANCES = 4
"""More would not fit a small machine's memory and patience: mock engines then, unless torch is asked for."""
NODES_A_NET = 250
CALLERS, LOOPBACK = "--metaserver-allow", "127.0.0.0/8"


@dataclass(frozen=True, slots=True)
class Stage:
    """What a rehearsal needs to know of this machine."""

    engines: Engines
    model_dir: str
    """Of torch_engine."""
    mock_command: Sequence[str]
    env: Mapping[str, str]
    moved: Mapping[Place, int]
    """Ports that are taken here, and what is taken instead."""
    flavour: Flavour
    """Of the mock engines: whether a second claim of the same KV is refused."""


def aliases(plan: DeploymentPlan) -> dict[str, str]:
    """An address of loopback for each node; two deployments seldom share one."""
    net = 64 + zlib.crc32(plan.name.encode()) % 128
    return {
        node: f"127.{net}.{index // NODES_A_NET}.{index % NODES_A_NET + 1}" for index, node in enumerate(plan.nodes)
    }


def instances(plan: DeploymentPlan) -> list[Process]:
    """What stands in the rehearsal: one engine for each API server."""
    return [process for process in plan.processes if process.kind == "engine" and process.serves]


def left_out(plan: DeploymentPlan) -> list[str]:
    headless = [it.name for it in plan.processes if it.kind == "engine" and not it.serves]
    return [it.name for it in plan.processes if it.kind == "store"] + headless


def places(plan: DeploymentPlan, engines: Engines) -> Iterator[tuple[str, str, int]]:
    """All that will be listened on, as planned: whose, address, port."""
    where = aliases(plan)
    for process in (*instances(plan), plan.proxy):
        yield process.name, where[process.node], _http_port(process)
        if engines == "torch" and process.kind == "engine":
            for port in _kv_ports(process)[:1]:
                yield f"{process.name}'s KV", where[process.node], port


def contract_of(plan: DeploymentPlan) -> str:
    argv = plan.proxy.argv
    return argv[argv.index("--contract") + 1]


def rehearsal(plan: DeploymentPlan, served_name: str, stage: Stage) -> Share:
    where = aliases(plan)
    engines = instances(plan)
    placed = {it.name: _place(it, where, stage) for it in (*engines, plan.proxy)}
    if stage.engines == "torch":
        started = [_torch(process, where, placed[process.name], served_name, stage) for process in engines]
    else:
        started = [_mock(plan, where, placed, served_name, stage)]
    proxy = _proxy(plan, placed, [it.name for it in started], stage)
    torch = stage.engines == "torch"
    return Share(
        name=plan.name,
        served_name=served_name,
        processes=(*started, proxy),
        to_prompt={it.name: _joined(placed[it.name]) for it in engines} if torch else {},
        proxy_address=_joined(placed["proxy"]),
        num_prefillers=sum(1 for it in engines if it.role == "prefill"),
    )


def _place(process: Process, where: Mapping[str, str], stage: Stage) -> Place:
    planned = where[process.node], _http_port(process)
    return planned[0], stage.moved.get(planned, planned[1])


def _http_port(process: Process) -> int:
    return int(process.serves.rpartition(":")[2])


def _kv_ports(process: Process) -> list[int]:
    return [port for port, what in process.ports if what == "KV"]


def _joined(place: Place) -> str:
    return f"{place[0]}:{place[1]}"


def _planned(
    name: str, role: str, argv: Sequence[str], place: Place, env: Mapping[str, str], after: Sequence[str] = ()
) -> PlannedProcess:
    return PlannedProcess(
        name=name,
        kind="proxy" if role == "proxy" else "engine",
        role=role,
        argv=tuple(argv),
        host=place[0],
        port=place[1],
        ports=(place[1],),
        health_url=f"http://{_joined(place)}/health",
        metrics_url=f"http://{_joined(place)}/metrics",
        after=tuple(after),
        env={"PYTHONUNBUFFERED": "1", **env},
    )


def _torch(process: Process, where: Mapping[str, str], place: Place, served_name: str, stage: Stage) -> PlannedProcess:
    host = where[process.node]
    kv_port = next(iter(_kv_ports(process)), 0)
    kv_port = stage.moved.get((host, kv_port), kv_port)
    argv = (
        *("pd-engine", "serve", "--model", stage.model_dir, "--served-model-name", served_name),
        *("--role", process.role, "--host", host, "--port", str(place[1]), "--device", "cpu"),
        *("--engine-id", f"{process.name}-rehearsed-{host}", "--num-threads", "1"),
        *("--kv-pool-bytes", str(16 * 1024**2), "--sidecar", "auto", "--sidecar-listen", f"{host}:{kv_port}"),
    )
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return _planned(process.name, process.role, argv, place, {**stage.env, **threads})


def _mock(
    plan: DeploymentPlan, where: Mapping[str, str], placed: Mapping[str, Place], served_name: str, stage: Stage
) -> PlannedProcess:
    """One process stands for all engines: what a prefiller hands out, a decoder must find."""
    words = [*stage.mock_command, "--model", served_name, "--contract", contract_of(plan), "--flavour", stage.flavour]
    for role in ("prefill", "decode"):
        words += [f"--{role}-at", *(_joined(placed[it.name]) for it in instances(plan) if it.role == role)]
    num_ranks = max(sum(len(it.dp_ranks) for it in plan.processes if it.instance == name) for name in _prefillers(plan))
    if contract_of(plan) == "mooncake":
        words += ["--num-ranks", str(num_ranks)]
    last = placed[instances(plan)[-1].name]  # they start to listen in their order
    return _planned("engines", "mock", words, last, stage.env)


def _prefillers(plan: DeploymentPlan) -> set[str]:
    return {it.instance for it in plan.processes if it.role == "prefill"}


def _proxy(plan: DeploymentPlan, placed: Mapping[str, Place], after: Sequence[str], stage: Stage) -> PlannedProcess:
    place = placed["proxy"]
    contract = "pull" if stage.engines == "torch" else contract_of(plan)
    words = ["pd-proxy", "--host", place[0], "--port", str(place[1]), "--contract", contract]
    for role, flag in (("prefill", "prefiller"), ("decode", "decoder")):
        standing = [placed[it.name] for it in instances(plan) if it.role == role]
        ports = [str(port) for _, port in standing]
        words += [f"--{flag}-hosts", *(host for host, _ in standing), f"--{flag}-ports", *ports]
        if contract == "mooncake" and role == "prefill":  # of a mock engine they are one
            words += ["--prefiller-bootstrap-ports", *ports]
    own = list(_own_flags(plan.proxy.argv))
    if contract == "layerwise":  # they call from 127.0.0.1, whatever address they listen on
        at = own.index(CALLERS) + 1 if CALLERS in own else 0
        own[at:at] = [LOOPBACK] if at else [CALLERS, LOOPBACK]
    return _planned("proxy", "proxy", [*words, *own], place, stage.env, after)


def _own_flags(argv: Sequence[str]) -> Iterator[str]:
    """What the file gives the proxy beside what is computed."""
    kept = False
    for word in argv[1:]:
        if word.startswith("--"):
            kept = word.removeprefix("--") not in COMPUTED_PROXY_FLAGS
        if kept:
            yield word
