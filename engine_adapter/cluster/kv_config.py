"""What `--kv-transfer-config` says for one process, by connector and version."""

from __future__ import annotations

from typing import Any

from engine_adapter.cluster import versions
from engine_adapter.cluster.addresses import joined
from engine_adapter.cluster.allocation import facts_of
from engine_adapter.cluster.deployment import ROLES, Deployment
from engine_adapter.cluster.topology import Group, Placement, Topology

KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}

LLMDATADIST_KEYS = {"kv_buffer_device": "npu", "kv_parallel_size": 1}


def kv_transfer_config(deployment: Deployment, where: Topology, group: Group, placement: Placement) -> dict[str, Any]:
    """A prefiller with a prefix store has the store as a second connector beside the one that hands over."""
    hand_over = _hand_over(deployment, where, group, placement)
    if deployment.store is None or group.role != "prefill":
        return hand_over
    engine_id = hand_over.pop("engine_id")  # a child with its own is refused by vLLM 0.32
    return {
        "kv_connector": "MultiConnector",
        "kv_role": KV_ROLES[group.role],
        "engine_id": engine_id,
        "kv_connector_extra_config": {"connectors": [hand_over, _ucm(deployment)]},
    }


def engine_id(deployment: Deployment, group: Group, placement: Placement) -> str:
    """As it is configured. vLLM appends `_dp<rank>` to it, so an instance's processes may share one; sidecars are
    found by it, so with ours every process has its own."""
    if deployment.connector.name == "BatonConnector":
        return f"{deployment.name}-{placement.name}"
    return group.engine_id


def _hand_over(deployment: Deployment, where: Topology, group: Group, placement: Placement) -> dict[str, Any]:
    connector, kind = deployment.connector, deployment.engine.kind
    version = versions.version_of(deployment.engine.engine_version)
    facts, known = facts_of(deployment), versions.connector(kind, connector.name, version)
    config: dict[str, Any] = {"kv_connector": connector.name}
    if facts.ports == "llmdatadist":
        config |= {
            key: value
            for key, value in LLMDATADIST_KEYS.items()
            if versions.belongs("kv-transfer-config", key, kind, version)
        }
    config["kv_role"] = KV_ROLES[group.role]
    if facts.ports in ("group", "llmdatadist"):
        config["kv_port"] = group.kv_port
    config["engine_id"] = engine_id(deployment, group, placement)
    if known and (connector.module_path or not known.registered):
        config["kv_connector_module_path"] = known.module
    config |= connector.config
    extra = {**connector.extra, **_extra(deployment, where, placement)}
    return {**config, "kv_connector_extra_config": extra} if extra else config


def _extra(deployment: Deployment, where: Topology, placement: Placement) -> dict[str, Any]:
    facts = facts_of(deployment)
    if facts.sizes_in_config:
        return {
            role: {"dp_size": group.dp, "tp_size": group.tp, **({"pp_size": group.pp} if group.pp > 1 else {})}
            for role in ROLES
            for group in where.of_role(role)[:1]
        }
    if facts.ports != "sidecar":
        return {}
    if placement.metrics_port is None:  # several ranks in one process: the connector is told the same for all
        return {"listen": joined(placement.node, 0)}
    return {"listen": joined(placement.node, placement.kv_port), "metrics_port": placement.metrics_port}


def _ucm(deployment: Deployment) -> dict[str, Any]:
    assert deployment.store is not None
    version = versions.version_of(deployment.engine.engine_version)
    known = versions.connector(deployment.engine.kind, "UCMConnector", version)
    return {
        "kv_connector": "UCMConnector",
        "kv_role": "kv_both",
        "kv_connector_module_path": known.module if known else "",
        "kv_connector_extra_config": {"UCM_CONFIG_FILE": deployment.store.config_path},
    }
