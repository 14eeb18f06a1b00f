"""The files of a deployment: rank table, mooncake.json, UCM's YAML, run_dp_template.sh, ais_bench's model file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable

from engine_adapter.cluster.addresses import joined
from engine_adapter.cluster.allocation import facts_of
from engine_adapter.cluster.deployment import Deployment
from engine_adapter.cluster.processes import File, Process, Template
from engine_adapter.cluster.rank_table import entries_of, is_complete, rank_table, text_of
from engine_adapter.cluster.shell_words import command_lines, environment_lines
from engine_adapter.cluster.topology import Group, Topology

TEMPLATE_ARGUMENTS = {
    "ASCEND_RT_VISIBLE_DEVICES": 1, "CUDA_VISIBLE_DEVICES": 1, "--port": 2, "--data-parallel-size": 3,
    "--data-parallel-rank": 4, "--data-parallel-address": 5, "--data-parallel-rpc-port": 6, "--tensor-parallel-size": 7,
}  # fmt: skip
"""launch_online_dp.py's positional arguments to run_dp_template.sh."""


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


def templates_of(where: Topology, processes: Iterable[Process]) -> tuple[Template, ...]:
    """For those who start external data parallelism by launch_online_dp.py: the same commands, once a node."""
    by_share: dict[tuple[str, str], list[Process]] = {}
    for process in processes:
        if process.kind == "engine":
            by_share.setdefault((process.node, process.instance), []).append(process)
    groups = {group.name: group for group in where.groups}
    found = (_template(groups[name], share) for (_, name), share in by_share.items())
    return tuple(template for template in found if template is not None)


def _template(group: Group, share: list[Process]) -> Template | None:
    """None where the processes differ by more than the template's arguments can say."""
    if group.internal or group.dp == 1:
        return None
    texts = {_template_text(process) for process in share}
    starts_at_0 = share[0].devices[:1] == (0,) and group.pp == 1
    if len(texts) != 1 or not starts_at_0:
        return None
    first = share[0]
    launch = (
        "python", "launch_online_dp.py",
        *("--dp-size", str(group.dp), "--tp-size", str(group.tp), "--dp-size-local", str(group.local)),
        *("--dp-rank-start", str(first.dp_ranks[0]), "--dp-address", group.master),
        *("--dp-rpc-port", str(group.dp_rpc_port), "--vllm-start-port", str(first.ports[0][0])),
    )  # fmt: skip
    return Template(first.node, group.name, File(f"./{group.name}/run_dp_template.sh", texts.pop()), launch)


def _template_text(process: Process) -> str:
    env = {key: f"${TEMPLATE_ARGUMENTS.get(key)}" if key in TEMPLATE_ARGUMENTS else v for key, v in process.env.items()}
    argv, positions = list(process.argv), TEMPLATE_ARGUMENTS
    words = [
        f'"${positions[before]}"' if before in positions else shlex.quote(word)
        for before, word in zip(["", *argv], argv, strict=False)
    ]
    lines = (
        "#!/bin/bash",
        f"# {process.instance} on {process.node}, started by launch_online_dp.py from this directory:",
        "# devices, port, data-parallel size, rank, address and RPC port, tensor-parallel size",
        'cd "$(dirname "$0")/.."',
        *environment_lines(env, process.unset, positional=True),
        *command_lines(words, "exec "),
    )
    return "\n".join(lines) + "\n"


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
    return File("./ais_bench/models/vllm_api/vllm_api_stream_chat.py", text + "\n")


def _python(value: object) -> str:
    if isinstance(value, dict):
        return "dict(" + ", ".join(f"{key}={_python(inner)}" for key, inner in value.items()) + ")"
    return json.dumps(value) if isinstance(value, str) else repr(value)
