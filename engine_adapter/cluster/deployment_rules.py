"""What can't be true of a deployment, each with the key, its value, the reason and the remedy. Pure but for `load`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from engine_adapter.cluster import version_rules
from engine_adapter.cluster.allocation import Conflict
from engine_adapter.cluster.deployment import Deployment, read, text_of
from engine_adapter.cluster.deployment_plan import COMPUTED_PROXY_FLAGS
from engine_adapter.cluster.engine_commands import (
    COMPUTED_FLAGS,
    COMPUTED_TORCH_FLAGS,
    COMPUTED_VARIABLES,
    plain,
)
from engine_adapter.cluster.errors import ConfigError, nearest
from engine_adapter.cluster.parallel_rules import parallel_conflicts
from engine_adapter.cluster.toml_mistakes import Where, key_of
from engine_adapter.cluster.topology import topology

HARDWARE = {"vllm-ascend": ("A2", "A3"), "vllm": ("gpu", "cpu"), "torch": ("A2", "A3", "gpu", "cpu")}


def load(path: Path) -> Deployment:
    """Raises ClusterError (cannot be read) or ConfigError (all that is wrong with it)."""
    return parse(text_of(path), str(path))


def parse(text: str, source: str) -> Deployment:
    reading = read(text, source)
    lines = [*reading.lines, *(f"{source}: {line}" for line in wrong_with(reading.deployment, reading.wrong))]
    if lines:
        raise ConfigError(*lines)
    return reading.deployment


def wrong_with(deployment: Deployment, unread: Sequence[Where] = ()) -> list[str]:
    """One line each: `key = value: reason; remedy`. `unread` are places whose values are the file's in no way: nothing
    is said that may follow from them."""
    found = [*_conflicts(deployment)] if not unread else [*_beside(deployment, unread)]
    return list(dict.fromkeys(f"{it.key} = {it.value}: {it.reason}; {it.remedy}" for it in found))


def _beside(deployment: Deployment, unread: Sequence[Where]) -> Iterator[Conflict]:
    """What is wrong whatever those values are to be, by section."""
    sections = {key_of(where[: 2 if where[0] in ("node", "instance") else 1]) for where in unread}
    for conflict in (*_of_sections(deployment), *_unknown_nodes(deployment)):
        if not any(conflict.key == section or conflict.key.startswith(f"{section}.") for section in sections):
            yield conflict


def _conflicts(deployment: Deployment) -> Iterator[Conflict]:
    yield from _of_sections(deployment)
    unknown = list(_unknown_nodes(deployment))
    yield from unknown
    if unknown:  # what follows would only repeat it in other words
        return
    where = topology(deployment)
    yield from parallel_conflicts(deployment, where.groups)
    yield from where.conflicts


def _of_sections(deployment: Deployment) -> Iterator[Conflict]:
    """What each section has wrong by itself, or with the engine's version."""
    if "\\u0000" in deployment.model_dump_json():
        yield Conflict("the file", "...", "it has a zero byte, which no command line takes", "remove \\u0000")
    yield from _nodes(deployment)
    yield from version_rules.version_conflicts(deployment)
    yield from _computed(deployment)
    yield from _store(deployment)


def _nodes(deployment: Deployment) -> Iterator[Conflict]:
    seen: set[str] = set()
    for index, node in enumerate(deployment.node):
        key = f"node[{index}]"
        if node.address in seen:
            reason = "this node was described before"
            yield Conflict(f"{key}.address", node.address, reason, "remove one, or correct the address")
        seen.add(node.address)
        kind = deployment.engine.kind
        if node.hardware not in HARDWARE[kind]:
            there = ", ".join(HARDWARE[kind])
            remedy = f"give one of {there}, or another engine.kind"
            yield Conflict(f"{key}.hardware", node.hardware, f"{kind} does not run there", remedy)
        for name, values in (("device_ips", node.device_ips), ("super_device_ids", node.super_device_ids)):
            if values and len(values) != node.devices:
                reason = f"there are {len(values)} for {node.devices} devices"
                yield Conflict(f"{key}.{name}", str(list(values)), reason, "give one for each device, or none")
        if node.hardware == "A3" and node.device_ips and not (node.super_device_ids and node.super_pod_id):
            reason = "a rank table of A3 needs super_pod_id and super_device_ids, too"
            yield Conflict(f"{key}.device_ips", str(list(node.device_ips)), reason, "give all three, or none")


def _unknown_nodes(deployment: Deployment) -> Iterator[Conflict]:
    known = [node.address for node in deployment.node]
    named = [("proxy.node", deployment.proxy.node)]
    if deployment.mooncake_master:
        named.append(("mooncake_master.node", deployment.mooncake_master.node))
    named += [(f"instance[{i}].nodes", node) for i, spec in enumerate(deployment.instance) for node in spec.nodes]
    for key, address in named:
        if address not in known:
            yield Conflict(key, address, "no [[node]] has this address", nearest(address, known))
    for index, spec in enumerate(deployment.instance):
        if len(set(spec.nodes)) < len(spec.nodes):
            reason, remedy = "a node is named twice", "name each node once; its ranks follow from dp"
            yield Conflict(f"instance[{index}].nodes", str(list(spec.nodes)), reason, remedy)
    for role, name in (("prefill", "prefiller"), ("decode", "decoder")):
        if role not in {spec.role for spec in deployment.instance}:
            yield Conflict("instance", "[]", f"there is no {name}", f'add an [[instance]] with role = "{role}"')


def _computed(deployment: Deployment) -> Iterator[Conflict]:
    """Flags and variables that the plan writes itself: they would be given twice."""
    torch = deployment.engine.kind == "torch"
    engine_flags = COMPUTED_TORCH_FLAGS if torch else COMPUTED_FLAGS
    reason, remedy = "the plan computes it", "leave it out, and say by its own key what it follows from"
    for place, section in deployment.engine_sections():
        for flag, value in section.args.items():
            if plain(flag) in engine_flags:
                yield Conflict(f"{place}.args.{flag}", str(value), reason, remedy)
        for name, said in section.env.items():
            if name in COMPUTED_VARIABLES:
                yield Conflict(f"{place}.env.{name}", str(said), reason, remedy)
    for flag, value in deployment.proxy.args.items():
        if plain(flag) in COMPUTED_PROXY_FLAGS:
            yield Conflict(f"proxy.args.{flag}", str(value), reason, remedy)


def _store(deployment: Deployment) -> Iterator[Conflict]:
    store = deployment.store
    if store is None:
        return
    if not store.directory.startswith("/"):
        reason = "UCM keeps its blocks in files that all prefillers share"
        remedy = "give a directory, from the root, that every node mounts (NFS, 3FS)"
        yield Conflict("store.directory", repr(store.directory), reason, remedy)
    if deployment.engine.kind == "torch":
        reason = "torch_engine loads no connectors of vLLM"
        yield Conflict("store.kind", store.kind, reason, "remove [store], or give engine.kind vllm or vllm-ascend")
