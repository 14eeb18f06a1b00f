"""The command and the environment of one engine process. Order of both is the order they are printed in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from engine_adapter.cluster import versions
from engine_adapter.cluster.addresses import joined
from engine_adapter.cluster.allocation import facts_of
from engine_adapter.cluster.deployment import Args, Deployment, Node
from engine_adapter.cluster.kv_config import engine_id, kv_transfer_config
from engine_adapter.cluster.topology import Group, Placement, Topology

COMPUTED_FLAGS = (
    "model", "port", "headless", "served-model-name", "data-parallel-size", "data-parallel-size-local",
    "data-parallel-rank", "data-parallel-start-rank", "data-parallel-address", "data-parallel-rpc-port",
    "tensor-parallel-size", "pipeline-parallel-size", "enable-expert-parallel", "no-enable-expert-parallel",
    "kv-transfer-config",
)  # fmt: skip
COMPUTED_TORCH_FLAGS = (
    "model", "served-model-name", "role", "port", "device", "engine-id", "sidecar", "sidecar-listen",
    "sidecar-metrics-port",
)  # fmt: skip

ROLE_ARGS: dict[str, Args] = {
    "prefill": {"gpu-memory-utilization": 0.9, "enforce-eager": True},
    "decode": {"gpu-memory-utilization": 0.9},
}
"""A prefiller computes few, large batches: graphs of batch sizes would be of no use to it."""

HEADLESS_HAS_NO = ("host", "port", "api-server-count")
"""They are about the API server."""

DEVICE_VARIABLE = {"A2": "ASCEND_RT_VISIBLE_DEVICES", "A3": "ASCEND_RT_VISIBLE_DEVICES", "gpu": "CUDA_VISIBLE_DEVICES"}
TORCH_DEVICES = {"A2": "npu", "A3": "npu", "gpu": "cuda", "cpu": "cpu"}

COMPUTED_VARIABLES = (
    "HCCL_IF_IP", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME",
    "VLLM_HOST_IP", *DEVICE_VARIABLE.values(), "DISAGGREGATED_PREFILL_RANK_TABLE_PATH", "MOONCAKE_CONFIG_PATH",
    "VLLM_LLMDD_RPC_PORT", "VLLM_ASCEND_LLMDD_RPC_PORT", "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT",
    "VLLM_MOONCAKE_BOOTSTRAP_PORT",
)  # fmt: skip


def engine_argv(deployment: Deployment, where: Topology, group: Group, placement: Placement, node: Node) -> list[str]:
    args = merged_args(deployment, group, node)
    if deployment.engine.kind == "torch":
        return [*_torch(deployment, group, placement, node), *flags(args)]
    words = ["vllm", "serve", deployment.model.path]
    computed = dict(_vllm_flags(deployment, group, placement, args))
    rest = {key: value for key, value in args.items() if key != "host"}
    if placement.port is None:
        rest = {key: value for key, value in rest.items() if key not in HEADLESS_HAS_NO}
    kv = {"kv-transfer-config": kv_transfer_config(deployment, where, group, placement)}
    return [*words, *flags({**computed, **rest, **kv})]


def merged_args(deployment: Deployment, group: Group, node: Node) -> Args:
    """Engine's over role's defaults, the role's over those, the instance's over all."""
    defaults = {} if deployment.engine.kind == "torch" else ROLE_ARGS[group.role]
    layers = (deployment.engine.args, deployment.role(group.role).args, group.spec.args)
    return {
        "host": "::" if ":" in node.address else "0.0.0.0",
        **defaults,
        **{plain(key): value for layer in layers for key, value in layer.items()},
    }


def plain(flag: str) -> str:
    return flag.strip("-").replace("_", "-")


def _vllm_flags(deployment: Deployment, group: Group, placement: Placement, args: Args) -> Iterator[tuple[str, Any]]:
    headless = placement.port is None
    if not headless:
        yield "host", args["host"]
        yield "port", placement.port
    else:
        yield "headless", True
    if group.dp > 1:
        yield "data-parallel-size", group.dp
        if group.internal:
            if headless:
                yield "data-parallel-start-rank", placement.dp_ranks[0]
            yield "data-parallel-size-local", len(placement.dp_ranks)
        else:
            yield "data-parallel-rank", placement.dp_ranks[0]
        yield "data-parallel-address", group.master
        yield "data-parallel-rpc-port", group.dp_rpc_port
    yield "tensor-parallel-size", group.tp
    if group.pp > 1:
        yield "pipeline-parallel-size", group.pp
    if group.ep is not None:
        yield "enable-expert-parallel" if group.ep > 1 else "no-enable-expert-parallel", True
    if deployment.model.served_name:
        yield "served-model-name", deployment.model.served_name


def _torch(deployment: Deployment, group: Group, placement: Placement, node: Node) -> list[str]:
    computed: Args = {
        "model": deployment.model.path,
        **({"served-model-name": deployment.model.served_name} if deployment.model.served_name else {}),
        "role": group.role,
        "port": placement.port,
        "device": TORCH_DEVICES[node.hardware],
        "engine-id": engine_id(deployment, group, placement),
        "sidecar": "auto",
        "sidecar-listen": joined(placement.node, placement.kv_port),
        "sidecar-metrics-port": placement.metrics_port,
    }
    return ["pd-engine", "serve", *flags(computed)]


def flags(args: Args) -> list[str]:
    words: list[str] = []
    for key, value in args.items():
        if value is False:
            continue
        words.append("--" + plain(key))
        if isinstance(value, list):
            words += [str(item) for item in value]
        elif isinstance(value, Mapping):
            words.append(json.dumps(value))
        elif value is not True:
            words.append(str(value))
    return words


def engine_environment(
    deployment: Deployment, group: Group, placement: Placement, node: Node
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What is set, and what is unset."""
    layers = (deployment.engine.env, deployment.role(group.role).env, group.spec.env)
    said = {key: value for layer in layers for key, value in layer.items()}
    env = {**_computed_environment(deployment, group, placement, node), **said}
    unset = tuple(key for key, value in env.items() if value is False)
    return {key: str(value) for key, value in env.items() if value is not False}, unset


def _computed_environment(deployment: Deployment, group: Group, placement: Placement, node: Node) -> dict[str, str]:
    env: dict[str, str] = {}
    kind, nic = deployment.engine.kind, node.nic
    if kind == "vllm-ascend":
        sockets = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
        env |= {"HCCL_IF_IP": node.address, **dict.fromkeys(sockets, nic)}
        env |= {"OMP_PROC_BIND": "false", "OMP_NUM_THREADS": "10"}
    elif kind == "vllm":
        sockets = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        env |= {"VLLM_HOST_IP": node.address, **dict.fromkeys(sockets, nic)}
    if node.hardware in DEVICE_VARIABLE:
        env[DEVICE_VARIABLE[node.hardware]] = ",".join(str(device) for device in placement.devices)
    env |= _connector_environment(deployment, group, placement)
    if deployment.store is not None:
        env["PYTHONHASHSEED"] = "0"  # blocks are found by Python's hashes, which must agree on all nodes
    if deployment.mooncake_master is not None:
        env["MOONCAKE_CONFIG_PATH"] = "./mooncake.json"
    return env


def _connector_environment(deployment: Deployment, group: Group, placement: Placement) -> dict[str, str]:
    use = facts_of(deployment).ports
    if use == "llmdatadist":
        variable = versions.llmdatadist_port_variable(versions.version_of(deployment.engine.engine_version))
        return {
            "DISAGGREGATED_PREFILL_RANK_TABLE_PATH": deployment.connector.rank_table,
            variable: str(group.llmdatadist_port),
        }
    if use == "rank":
        return {"VLLM_NIXL_SIDE_CHANNEL_HOST": placement.node, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(group.kv_port)}
    if use == "instance":
        return {"VLLM_MOONCAKE_BOOTSTRAP_PORT": str(group.kv_port)}
    return {}
