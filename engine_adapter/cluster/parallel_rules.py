"""Which parallel sizes fit the nodes, the engine, and each other across the hand-over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine_adapter.cluster.allocation import Conflict, facts_of
from engine_adapter.cluster.connectors import ConnectorFacts
from engine_adapter.cluster.deployment import ROLES, Deployment
from engine_adapter.cluster.topology import Group


def parallel_conflicts(deployment: Deployment, groups: Sequence[Group]) -> Iterator[Conflict]:
    facts, name = facts_of(deployment), deployment.connector.name
    for group in groups:
        yield from _one(deployment, group, facts)
    if facts.sizes_in_config:
        yield from _alike(groups, name)
    prefill = [group for group in groups if group.role == "prefill"]
    for group in groups:
        if group.role == "decode":
            for other in prefill:
                yield from _pair(other, group, facts, name)
    if not facts.unlike_hardware:
        yield from _hardware(deployment, name)


def _one(deployment: Deployment, group: Group, facts: ConnectorFacts) -> Iterator[Conflict]:
    spec, num_nodes, name = group.spec, len(group.spec.nodes), deployment.connector.name
    key = group.key
    if group.dp % num_nodes:
        reason = f"{group.dp} data-parallel ranks can't be shared out evenly over {num_nodes} nodes"
        remedy = f"give a multiple of {num_nodes}, or other nodes; one rank can't span nodes"
        yield Conflict(_said(group, "dp"), str(group.dp), reason, remedy)
    if group.ep not in (None, 1, group.dp * group.tp):
        reason = f"the experts are spread over dp * tp = {group.dp * group.tp} ranks, or over none"
        yield Conflict(_said(group, "ep"), str(group.ep), reason, f"give {group.dp * group.tp}, or 1 for none")
    needed = spec.count * group.local * group.world
    if spec.devices and (len(set(spec.devices)) != len(spec.devices) or len(spec.devices) != needed):
        reason = f"{needed} different devices a node are needed ({group.local} ranks of tp {group.tp} * pp {group.pp}"
        reason += f", {spec.count} times)" if spec.count > 1 else ")"
        yield Conflict(f"{key}.devices", str(list(spec.devices)), reason, "list so many, or leave it out")
    if deployment.engine.kind == "torch" and group.dp * group.tp * group.pp > 1:
        reason = "torch_engine takes one device an instance"
        yield Conflict(key, f"dp {group.dp}, tp {group.tp}, pp {group.pp}", reason, "give more instances instead")
    if group.pp > 1 and not (facts.prefill_pp if group.role == "prefill" else facts.decode_pp):
        yield Conflict(_said(group, "pp"), str(group.pp), f"{name} takes no pipeline stages there", "give 1")
    if group.tp > 1 and name == "BatonConnector" and facts.contract == "layerwise":
        reason = f"{name} pushes layerwise from an instance of one rank to another"
        yield Conflict(_said(group, "tp"), str(group.tp), reason, "give 1, or leave connector.extra.contract out")
    if group.dp > 1 and not facts.external_dp and not group.internal:
        reason = f"the decoder must know which rank prefilled, which {name} can't say with one API server a rank"
        yield Conflict(_said(group, "dp"), str(group.dp), reason, f'give 1, or {group.role}.dp_mode = "internal"')


def _said(group: Group, size: str) -> str:
    """The key by which the file says a size of an instance."""
    return f"{group.key}.{size}" if getattr(group.spec, size) is not None else f"{group.role}.{size}"


def _alike(groups: Sequence[Group], name: str) -> Iterator[Conflict]:
    for role in ROLES:
        alike = [group for group in groups if group.role == role]
        for group in alike[1:]:
            for size in ("dp", "tp", "pp"):
                if getattr(group, size) != getattr(alike[0], size):
                    reason = f"{alike[0].name} has {getattr(alike[0], size)}, and {name} knows one size a role"
                    remedy = f"say {size} once, in [{role}]"
                    yield Conflict(_said(group, size), str(getattr(group, size)), reason, remedy)


def _pair(prefill: Group, decode: Group, facts: ConnectorFacts, name: str) -> Iterator[Conflict]:
    larger, smaller = max(prefill.tp, decode.tp), min(prefill.tp, decode.tp)
    if facts.decode_tp == "divides" and prefill.tp < decode.tp:
        reason = f"it is larger than {prefill.name}'s tp = {prefill.tp}, and {name} can't spread KV over more ranks"
        yield Conflict(_said(decode, "tp"), str(decode.tp), reason, "raise the prefillers' tp, or lower this")
    elif facts.decode_tp != "any" and larger % smaller:
        reason = f"it and {prefill.name}'s tp = {prefill.tp} do not divide each other, so no rank's KV fits another's"
        yield Conflict(_said(decode, "tp"), str(decode.tp), reason, "give sizes of which one divides the other")


def _hardware(deployment: Deployment, name: str) -> Iterator[Conflict]:
    used = {address for spec in deployment.instance for address in spec.nodes}
    kinds = {node.hardware: index for index, node in enumerate(deployment.node) if node.address in used}
    if len(kinds) > 1:
        key, value = f"node[{max(kinds.values())}].hardware", " and ".join(sorted(kinds))
        yield Conflict(key, value, f"{name} does not join unlike hardware", "use nodes of one kind")
