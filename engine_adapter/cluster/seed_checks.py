"""The commands by which the seeds look at a node's NPU network before anything starts, as lines of bash."""

from __future__ import annotations

from collections.abc import Iterable

from engine_adapter.cluster.deployment import Node


def check_lines(node: Node, nodes: Iterable[Node]) -> tuple[str, ...]:
    """None where there is no NPU. Peers are pinged where the file says the addresses of their devices."""
    if node.hardware not in ("A2", "A3"):
        return ()
    address, ping = ("-vnic", "-hccs_ping") if node.hardware == "A3" else ("-ip", "-ping")
    each = f"for i in {{0..{node.devices - 1}}}; do"
    lines = [
        f"{each} hccn_tool -i $i -lldp -g | grep Ifname; done",
        *(f"{each} hccn_tool -i $i {what} -g; done" for what in ("-link", "-net_health", "-netdetect", "-gateway")),
        "cat /etc/hccn.conf",
        f"{each} hccn_tool -i $i {address} -g; done",
        f"{each} hccn_tool -i $i -tls -g; done | grep switch",
    ]
    if node.hardware == "A3":
        cards = f"for i in {{0..{max(0, node.devices // 2 - 1)}}}; do"
        lines.append(f"{cards} for c in 0 1; do npu-smi info -t spod-info -i $i -c $c; done; done")
    for peer in nodes:
        if peer.address != node.address:
            lines += [f"{each} hccn_tool -i $i {ping} -g address {ip}; done" for ip in peer.device_ips]
    return tuple(lines)
