"""The rank table of LLMDataDist, version 1.2: which NPU stands where, prefill first. Pure.

Format: what `gen_ranktable.py` of vllm-ascend's examples writes. Its reader takes the entries of its own server_id
whose device_id is visible to it, in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engine_adapter.cluster.deployment import Deployment, Node
from engine_adapter.cluster.topology import Topology


@dataclass(frozen=True, slots=True)
class Entry:
    """One NPU; `device_ip` and what follows are empty where nobody has asked it yet."""

    server_id: str
    device_id: int
    device_ip: str = ""
    super_pod_id: str = ""
    super_device_id: str = ""

    def as_json(self, cluster_id: int) -> dict[str, str]:
        said = {"server_id": self.server_id, "device_id": str(self.device_id), "device_ip": self.device_ip}
        if self.super_device_id:
            said |= {"super_pod_id": self.super_pod_id, "super_device_id": self.super_device_id}
        return {**said, "cluster_id": str(cluster_id)}


def entries_of(deployment: Deployment, where: Topology) -> tuple[Entry, ...]:
    """Of every device of every instance, prefillers first, with what the file says of them."""
    nodes = {node.address: node for node in deployment.node}
    return tuple(
        _entry(nodes[placement.node], device)
        for role in ("prefill", "decode")
        for group in where.groups
        if group.role == role
        for placement in group.placements
        for device in placement.devices
    )


def _entry(node: Node, device: int) -> Entry:
    def nth(values: Sequence[str]) -> str:
        return values[device] if device < len(values) else ""

    return Entry(node.address, device, nth(node.device_ips), node.super_pod_id, nth(node.super_device_ids))


def is_complete(entries: Iterable[Entry]) -> bool:
    return all(entry.device_ip for entry in entries)


def num_prefill_devices(where: Topology) -> int:
    return sum(len(placement.devices) for group in where.of_role("prefill") for placement in group.placements)


def rank_table(entries: Sequence[Entry], where: Topology) -> dict[str, Any]:
    num_prefill, num_nodes = num_prefill_devices(where), len({entry.server_id for entry in entries})
    return table(entries, num_prefill, len(entries) - num_prefill, num_nodes)


def table(entries: Sequence[Entry], num_prefill: int, num_decode: int, num_nodes: int) -> dict[str, Any]:
    """The first `num_prefill` entries prefill, the next `num_decode` decode; what is left over is left out."""
    listed = [entry.as_json(number) for number, entry in enumerate(entries, start=1)]
    return {
        "version": "1.2",
        "server_count": str(num_nodes),
        "prefill_device_list": listed[:num_prefill],
        "decode_device_list": listed[num_prefill : num_prefill + num_decode],
        "status": "completed",
    }


def text_of(rank_table: dict[str, Any]) -> str:
    return json.dumps(rank_table, indent=4) + "\n"
