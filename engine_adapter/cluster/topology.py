"""Where everything of a deployment stands: the processes of each instance, their ranks, devices and ports.

Pure, and defined for all that parses: what does not fit is in `Topology.conflicts` and said by `deployment_rules`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engine_adapter.cluster.allocation import Conflict, Ledger, facts_of
from engine_adapter.cluster.connectors import PortUse
from engine_adapter.cluster.deployment import Deployment, Instance, RoleName


@dataclass(frozen=True, slots=True)
class Placement:
    """One process of an instance."""

    name: str
    node: str
    dp_ranks: tuple[int, ...]
    devices: tuple[int, ...]
    port: int | None
    """Of its API server; None: headless."""
    kv_port: int
    """What it binds for KV begins here; see `Group.kv_port` for what it is told."""
    metrics_port: int | None = None
    """Of its first sidecar, if it has sidecars whose ports are known before."""


@dataclass(frozen=True, slots=True)
class Group:
    """One instance, with what its role says filled in."""

    name: str
    key: str
    """`instance[2]`: where the file says it."""
    offset: int
    """Among the copies of that entry."""
    spec: Instance
    dp: int
    tp: int
    pp: int
    ep: int | None
    internal: bool
    """One process a node instead of one a data-parallel rank."""
    engine_id: str = ""
    kv_port: int = 0
    """What every process of it is told, where the connector counts from there by the global rank."""
    dp_rpc_port: int = 0
    llmdatadist_port: int = 0
    placements: tuple[Placement, ...] = ()

    @property
    def role(self) -> RoleName:
        return self.spec.role

    @property
    def world(self) -> int:
        """Devices of one data-parallel rank."""
        return self.tp * self.pp

    @property
    def local(self) -> int:
        """Data-parallel ranks on each of its nodes."""
        return max(1, self.dp // len(self.spec.nodes))

    @property
    def master(self) -> str:
        return self.spec.nodes[0]

    @property
    def http_nodes(self) -> tuple[str, ...]:
        return self.spec.nodes[:1] if self.internal else self.spec.nodes

    @property
    def num_http_ports(self) -> int:
        """On each of those nodes."""
        return 1 if self.internal else self.local

    def num_kv_ports(self, use: PortUse) -> int:
        """In a row from its kv_port, counted alike on all its nodes."""
        sidecars = 0 if self.internal and self.local > 1 else self.local * self.world
        ports = {"group": self.dp * self.world, "rank": self.dp, "instance": 1, "sidecar": sidecars}
        return ports.get(use, 0)


@dataclass(frozen=True, slots=True)
class Topology:
    groups: tuple[Group, ...]
    conflicts: tuple[Conflict, ...]

    def of_role(self, role: RoleName) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.role == role)


def topology(deployment: Deployment) -> Topology:
    ledger, use = Ledger(deployment), facts_of(deployment).ports
    drafts = list(_drafts(deployment))
    for key, port, owner, nodes in (*_fixed_services(deployment), *_fixed_by_instances(drafts, use)):
        for node in nodes:
            ledger.fix_port(node, port, owner, key)
    for draft in drafts:
        if draft.spec.devices and not draft.offset:
            ledger.fix_devices(draft.spec.nodes, draft.spec.devices, draft.name, f"{draft.key}.devices")
    groups = tuple(_placed(deployment, ledger, draft, index) for index, draft in enumerate(drafts))
    return Topology(groups, tuple(ledger.conflicts))


def _drafts(deployment: Deployment) -> Iterator[Group]:
    """Every instance, numbered by role, its sizes known and its ports not yet."""
    numbers = {"prefill": 0, "decode": 0}
    for index, spec in enumerate(deployment.instance):
        role = deployment.role(spec.role)
        for offset in range(spec.count):
            yield Group(
                name=f"{spec.role}-{numbers[spec.role]}",
                key=f"instance[{index}]",
                offset=offset,
                spec=spec,
                dp=spec.dp or role.dp,
                tp=spec.tp or role.tp,
                pp=spec.pp or role.pp,
                ep=spec.ep or role.ep,
                internal=role.dp_mode == "internal",
            )
            numbers[spec.role] += 1


Fixed = tuple[str, int, str, tuple[str, ...]]
"""key, port, whose it is, the nodes where it is bound"""


def _fixed_services(deployment: Deployment) -> Iterator[Fixed]:
    yield "proxy.port", deployment.proxy.port, "the proxy", (deployment.proxy.node,)
    if deployment.mooncake_master:
        master = deployment.mooncake_master
        yield "mooncake_master.port", master.port, "mooncake_master", (master.node,)
        yield "mooncake_master.metrics_port", master.metrics_port, "mooncake_master's metrics", (master.node,)


def _fixed_by_instances(drafts: Iterable[Group], use: PortUse) -> Iterator[Fixed]:
    for group in drafts:
        spec, key, name = group.spec, group.key, group.name
        if spec.port:
            first = spec.port + group.offset * group.num_http_ports
            for port in range(first, first + group.num_http_ports):
                yield f"{key}.port", port, f"{name}'s HTTP", group.http_nodes
        if spec.kv_port:
            num = group.num_kv_ports(use)
            for port in range(spec.kv_port + group.offset * num, spec.kv_port + (group.offset + 1) * num):
                yield f"{key}.kv_port", port, f"{name}'s KV", spec.nodes
        if spec.dp_rpc_port and group.dp > 1:
            yield f"{key}.dp_rpc_port", spec.dp_rpc_port + group.offset, f"{name}'s DP RPC", spec.nodes[:1]


def _placed(deployment: Deployment, ledger: Ledger, draft: Group, index: int) -> Group:
    spec, name, ports, use = draft.spec, draft.name, deployment.ports, facts_of(deployment).ports

    def port(fixed: int | None, start: int, num: int, nodes: tuple[str, ...], what: str, key: str) -> int:
        if fixed is not None:
            return fixed + draft.offset * num
        return ledger.choose_ports(nodes, start, num, f"{name}'s {what}", key) if num else start

    http = port(spec.port, ports.http, draft.num_http_ports, draft.http_nodes, "HTTP", "ports.http")
    kv_port = port(spec.kv_port, ports.kv, draft.num_kv_ports(use), spec.nodes, "KV", "ports.kv")
    num_rpc, master = (1 if draft.dp > 1 else 0), spec.nodes[:1]
    num_llmdatadist = (draft.dp + 1) * draft.tp if use == "llmdatadist" else 0
    first = ports.llmdatadist
    return Group(
        name=name,
        key=draft.key,
        offset=draft.offset,
        spec=spec,
        dp=draft.dp,
        tp=draft.tp,
        pp=draft.pp,
        ep=draft.ep,
        internal=draft.internal,
        engine_id=str(index),
        kv_port=kv_port,
        dp_rpc_port=port(spec.dp_rpc_port, ports.dp_rpc, num_rpc, master, "DP RPC", "ports.dp_rpc"),
        llmdatadist_port=port(None, first, num_llmdatadist, spec.nodes, "LLMDataDist", "ports.llmdatadist"),
        placements=tuple(_placements(deployment, ledger, draft, http, kv_port)),
    )


def _placements(deployment: Deployment, ledger: Ledger, group: Group, http: int, kv_port: int) -> Iterator[Placement]:
    world, use = group.world, facts_of(deployment).ports
    for node_index, node in enumerate(group.spec.nodes):
        devices = _devices(deployment, ledger, group, node)
        ranks = [node_index * group.local + i for i in range(group.local)]
        shares = [tuple(ranks)] if group.internal else [(rank,) for rank in ranks]
        for i, share in enumerate(shares):
            metrics = None
            if use == "sidecar" and len(share) == 1:
                owner, start = f"{group.name}'s sidecar metrics", deployment.ports.sidecar_metrics
                metrics = ledger.choose_ports([node], start, world, owner, "ports.sidecar_metrics")
            yield Placement(
                name=_process_name(group, node_index, share[0]),
                node=node,
                dp_ranks=share,
                devices=devices[i * world : (i + len(share)) * world],
                port=None if group.internal and node_index else http + i,
                kv_port=kv_port + {"group": share[0] * world, "rank": share[0], "sidecar": i * world}.get(use, 0),
                metrics_port=metrics,
            )


def _process_name(group: Group, node_index: int, first_rank: int) -> str:
    if group.internal:
        return f"{group.name}-node{node_index}" if len(group.spec.nodes) > 1 else group.name
    return f"{group.name}-dp{first_rank}" if group.dp > 1 else group.name


def _devices(deployment: Deployment, ledger: Ledger, group: Group, address: str) -> tuple[int, ...]:
    num = group.local * group.world
    if group.spec.devices:
        return group.spec.devices[group.offset * num : (group.offset + 1) * num]
    if any(node.address == address and node.hardware == "cpu" for node in deployment.node):
        return ()
    return ledger.choose_devices(address, num, group.name, f"{group.key}.nodes")
