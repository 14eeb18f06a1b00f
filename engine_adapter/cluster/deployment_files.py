"""The files that processes of a deployment read: rank table, mooncake.json, UCM's YAML, ais_bench's model file."""

from __future__ import annotations

import json

from engine_adapter.cluster.addresses import joined
from engine_adapter.cluster.allocation import facts_of
from engine_adapter.cluster.deployment import Deployment
from engine_adapter.cluster.processes import File
from engine_adapter.cluster.rank_table import entries_of, is_complete, rank_table, text_of
from engine_adapter.cluster.topology import Group, Topology


def files_of(deployment: Deployment, where: Topology, group: Group) -> tuple[File, ...]:
    """What the processes of an instance read, on each of its nodes."""
    files = []
    if facts_of(deployment).rank_table:
        files.append(_rank_table(deployment, where))
    if deployment.mooncake_master is not None:
        files.append(_mooncake_json(deployment))
    if deployment.store is not None and group.role == "prefill":
        files.append(_ucm_yaml(deployment))
    return tuple(files)


def _rank_table(deployment: Deployment, where: Topology) -> File:
    """Its text where the file says the devices' addresses; else the command that asks hccn_tool."""
    path = deployment.connector.rank_table
    entries = entries_of(deployment, where)
    if is_complete(entries):
        return File(path, text_of(rank_table(entries, where)))
    return File(path, None, ("pd-cluster", "ranktable", "${DEPLOYMENT}", "--ranktable-path", path))


def _mooncake_json(deployment: Deployment) -> File:
    master = deployment.mooncake_master
    assert master is not None
    ascend = any(node.hardware in ("A2", "A3") for node in deployment.node)
    said = {
        "metadata_server": "P2PHANDSHAKE",
        "protocol": "ascend" if ascend else "tcp",
        "device_name": "",
        "master_server_address": joined(master.node, master.port),
        "global_segment_size": "1GB",
        **master.config,
    }
    return File("./mooncake.json", json.dumps(said, indent=4) + "\n")


def _ucm_yaml(deployment: Deployment) -> File:
    store = deployment.store
    assert store is not None
    lines = (
        "ucm_connectors:",
        '  - ucm_connector_name: "UcmPipelineStore"',
        "    ucm_connector_config:",
        f"      store_pipeline: {json.dumps(store.pipeline)}",
        f"      storage_backends: {json.dumps(store.directory)}",
        f"      cache_buffer_capacity_gb: {store.cache_buffer_gb}",
        f"enable_event_sync: {str(store.event_sync).lower()}",
        f"use_layerwise: {str(store.layerwise).lower()}",
    )
    return File(store.config_path, "\n".join(lines) + "\n")


def ais_bench_model(deployment: Deployment) -> File:
    """The model file of ais_bench's stream-chat client."""
    assert deployment.bench is not None
    said = {
        "path": deployment.model.path,
        "model": deployment.model.served_name or deployment.model.path,
        "host_ip": deployment.proxy.node,
        "host_port": deployment.proxy.port,
        **deployment.bench.model,
    }
    lines = [f"        {key}={_python(value)}," for key, value in said.items()]
    text = "\n".join(
        [
            "from ais_bench.benchmark.models import VLLMCustomAPIChatStream",
            "",
            "models = [",
            "    dict(",
            '        attr="service",',
            "        type=VLLMCustomAPIChatStream,",
            '        abbr="vllm-api-stream-chat",',
            *lines,
            "    )",
            "]",
        ]
    )
    return File("./configs/models/vllm_api/vllm_api_stream_chat.py", text + "\n")


def _python(value: object) -> str:
    if isinstance(value, dict):
        return "dict(" + ", ".join(f"{key}={_python(inner)}" for key, inner in value.items()) + ")"
    return json.dumps(value) if isinstance(value, str) else repr(value)
