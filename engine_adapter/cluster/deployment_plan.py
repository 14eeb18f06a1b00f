"""From one deployment file to every process of every node. Pure: same file, same plan."""

from __future__ import annotations

import json
from collections.abc import Iterator

from engine_adapter.cluster.addresses import joined, reachable
from engine_adapter.cluster.allocation import facts_of
from engine_adapter.cluster.connectors import PortUse
from engine_adapter.cluster.deployment import Deployment, MooncakeMaster, Node
from engine_adapter.cluster.deployment_files import ais_bench_model, files_of
from engine_adapter.cluster.dp_templates import templates_of
from engine_adapter.cluster.engine_commands import engine_argv, engine_environment, flags, plain
from engine_adapter.cluster.kv_config import engine_id
from engine_adapter.cluster.processes import DeploymentPlan, NodeChecks, Process
from engine_adapter.cluster.seed_checks import check_lines
from engine_adapter.cluster.topology import Group, Placement, Topology, topology

COMPUTED_PROXY_FLAGS = (
    "host", "port", "contract", "advertise-url", "prefiller-hosts", "prefiller-ports", "prefiller-port",
    "decoder-hosts", "decoder-ports", "decoder-port", "prefiller-bootstrap-ports",
)  # fmt: skip


def deployment_plan(deployment: Deployment) -> DeploymentPlan:
    """Of a deployment that the rules find nothing wrong with."""
    where = topology(deployment)
    store = [_mooncake_master(deployment.mooncake_master)] if deployment.mooncake_master else []
    engines = list(_engines(deployment, where, tuple(process.name for process in store)))
    processes = (*store, *engines, _proxy(deployment, where, engines))
    return DeploymentPlan(
        name=deployment.name,
        nodes=tuple(node.address for node in deployment.node),
        processes=processes,
        checks=tuple(NodeChecks(node.address, check_lines(node, deployment.node)) for node in deployment.node),
        request=_request(deployment),
        bench=_bench(deployment),
        templates=templates_of(where, engines),
    )


def _mooncake_master(master: MooncakeMaster) -> Process:
    said = {"port": master.port, **({"metrics_port": master.metrics_port} if master.metrics_port != 9003 else {})}
    argv = ["mooncake_master"]
    for key, value in {**said, **master.args}.items():  # gflags: underscores
        argv += [f"--{key.strip('-').replace('-', '_')}", str(value)]
    return Process(
        node=master.node,
        name="mooncake_master",
        kind="store",
        argv=tuple(argv),
        env={key: str(value) for key, value in master.env.items() if value is not False},
        unset=tuple(key for key, value in master.env.items() if value is False),
        ready_url=f"tcp://{joined(master.node, master.port)}",
        ports=((master.port, "RPC"), (master.metrics_port, "metrics")),
    )


def _engines(deployment: Deployment, where: Topology, after: tuple[str, ...]) -> Iterator[Process]:
    nodes = {node.address: node for node in deployment.node}
    for group in where.groups:
        for placement in group.placements:
            yield _engine(deployment, where, group, placement, nodes[placement.node], after)


def _engine(
    deployment: Deployment, where: Topology, group: Group, placement: Placement, node: Node, after: tuple[str, ...]
) -> Process:
    env, unset = engine_environment(deployment, group, placement, node)
    serves = joined(placement.node, placement.port) if placement.port else ""
    return Process(
        node=placement.node,
        name=placement.name,
        kind="engine",
        argv=tuple(engine_argv(deployment, where, group, placement, node)),
        env=env,
        unset=unset,
        files=files_of(deployment, where, group),
        ready_url=f"http://{serves}/health" if serves else "",
        after=after,
        role=group.role,
        instance=group.name,
        engine_id=engine_id(deployment, group, placement),
        dp_ranks=placement.dp_ranks,
        devices=placement.devices,
        ports=tuple(_ports(group, placement, facts_of(deployment).ports)),
        serves=serves,
    )


def _ports(group: Group, placement: Placement, use: PortUse) -> Iterator[tuple[int, str]]:
    if placement.port:
        yield placement.port, "HTTP"
    if group.dp > 1 and 0 in placement.dp_ranks:
        yield group.dp_rpc_port, "DP RPC"
    local = len(placement.dp_ranks)
    counts = {"group": local * group.world, "rank": local, "instance": int(0 in placement.dp_ranks)}
    sidecars = group.world if placement.metrics_port is not None else 0
    for i in range(sidecars if use == "sidecar" else counts.get(use, 0)):
        yield placement.kv_port + i, "KV"
    for i in range(sidecars):
        yield (placement.metrics_port or 0) + i, "sidecar metrics"
    if use == "llmdatadist":
        first = 1 if group.dp == 1 else 0 if group.internal else placement.dp_ranks[0]
        for i in range(first * group.tp, (first + local) * group.tp):
            yield group.llmdatadist_port + i, "LLMDataDist"


def _proxy(deployment: Deployment, where: Topology, engines: list[Process]) -> Process:
    proxy, facts = deployment.proxy, facts_of(deployment)
    host = proxy.host or proxy.node
    argv = ["pd-proxy", "--host", host, "--port", str(proxy.port), "--contract", facts.contract]
    for role, flag in (("prefill", "prefiller"), ("decode", "decoder")):
        serving = [process for process in engines if process.serves and process.role == role]
        argv += [f"--{flag}-hosts", *(process.node for process in serving)]
        argv += [f"--{flag}-ports", *(process.serves.rpartition(":")[2] for process in serving)]
    if facts.contract == "mooncake":
        ports = (str(group.kv_port) for group in where.of_role("prefill") for _ in group.http_nodes)
        argv += ["--prefiller-bootstrap-ports", *ports]
    if facts.contract == "layerwise" and host != reachable(host, proxy.node):
        argv += ["--advertise-url", f"http://{joined(proxy.node, proxy.port)}"]
    return Process(
        node=proxy.node,
        name="proxy",
        kind="proxy",
        argv=(*argv, *flags({plain(key): value for key, value in proxy.args.items()})),
        ready_url=f"http://{joined(reachable(host, proxy.node), proxy.port)}/health",
        after=tuple(process.name for process in engines if process.serves),
        ports=((proxy.port, "HTTP"),),
        serves=joined(reachable(host, proxy.node), proxy.port),
    )


def _request(deployment: Deployment) -> tuple[str, ...]:
    request, proxy = deployment.request, deployment.proxy
    body = {"model": deployment.model.served_name or deployment.model.path, **request.body}
    url = f"http://{joined(proxy.node, proxy.port)}{request.path}"
    return ("curl", url, "-H", "Content-Type: application/json", "-d", json.dumps(body))


def _bench(deployment: Deployment) -> Process | None:
    bench, proxy, model = deployment.bench, deployment.proxy, deployment.model
    if bench is None:
        return None
    common = {"node": proxy.node, "name": "bench", "kind": "bench", "after": ("proxy",)}
    if bench.tool == "ais_bench":
        args = {"models": "vllm_api_stream_chat", **bench.args}
        model_file = (ais_bench_model(deployment),)
        return Process(argv=("ais_bench", *flags(args)), files=model_file, unset=_NO_PROXY, **common)  # type: ignore[arg-type]
    said = {
        "backend": "vllm",
        "model": model.served_name or model.path,
        **({"tokenizer": model.path} if model.served_name else {}),
        "host": proxy.node,
        "port": proxy.port,
        **{plain(key): value for key, value in bench.args.items()},
    }
    return Process(argv=("vllm", "bench", "serve", *flags(said)), **common)  # type: ignore[arg-type]


_NO_PROXY = ("http_proxy", "https_proxy")
"""The benchmark must reach the deployment, not a web proxy."""
