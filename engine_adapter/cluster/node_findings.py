"""What a node's answers mean: one finding a check, with what to do about it. Pure.

How hccn_tool words its answers is not documented; the documents only ask for UP and Success. So `link`, `net_health`,
addresses and pings decide, in any case of letters; where an option's answer merely lacks what is usual, that is a
warning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from engine_adapter.cluster.deployment import Node
from engine_adapter.cluster.node_probes import NOT_FOUND, TIMED_OUT, Answers, Said, address_option, is_npu

Status = Literal["ok", "failed", "warning", "unknown"]
ADDRESS = r"\d+\.\d+\.\d+\.\d+|[0-9a-f]*:[0-9a-f:]+:[0-9a-f]+"
NUM_QUOTED = 70


@dataclass(frozen=True, slots=True)
class Finding:
    node: str
    check: str
    status: Status
    said: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class DeviceCheck:
    option: str
    is_right: Callable[[str], bool]
    otherwise: Status
    """Where the answer came and is not right."""
    remedy: str


def _has(pattern: str, without: str = r"(?!)") -> Callable[[str], bool]:
    return lambda text: bool(re.search(pattern, text, re.I)) and not re.search(without, text, re.I)


DEVICE_CHECKS = (
    DeviceCheck("lldp", _has("ifname"), "warning", "is the cable in, and LLDP on at the switch?"),
    DeviceCheck("link", _has(r"\bup\b", r"\bdown\b"), "failed", "check cable, optical module and switch port"),
    DeviceCheck("net_health", _has("success", "unsuccess"), "failed", "check -netdetect and -gateway, and VLANs"),
    DeviceCheck("netdetect", _has(ADDRESS), "warning", "hccn_tool -i N -netdetect -s address GATEWAY"),
    DeviceCheck("gateway", _has(ADDRESS), "warning", "hccn_tool -i N -gateway -s gateway ADDRESS"),
)  # fmt: skip
ADDRESS_REMEDY = "give the device an address: hccn_tool -i N -ip -s address A netmask M, or mount /etc/hccn.conf"


def npu_findings(node: Node, answers: Answers) -> Iterator[Finding]:
    if not is_npu(node):
        return
    if "no/hccn_tool" in answers:
        remedy = "mount /usr/local/Ascend/driver/tools/hccn_tool into the container, or set HCCN_TOOL_PATH"
        yield Finding(node.address, "hccn_tool", "unknown", "not on this node: its checks are left out", remedy)
    else:
        for check in DEVICE_CHECKS:
            yield _of_devices(node, answers, check.option, check.is_right, check.otherwise, check.remedy)
        yield _addresses(node, answers)
        yield _tls(node, answers)
    yield _hccn_conf(node, answers)
    if node.hardware == "A3":
        yield _super_pod(node, answers)


def _of_devices(
    node: Node, answers: Answers, key: str, is_right: Callable[[str], bool], otherwise: Status, remedy: str
) -> Finding:
    """One finding for all devices; the worst of them says its status."""
    worst: Status = "ok"
    wrong: dict[str, list[int]] = {}
    for device in range(node.devices):
        said = answers.get(f"{key}/{device}")
        if said and said.status == 0 and is_right(said.text):
            continue
        came = said is not None and said.status == 0 and said.text
        worst = "failed" if not came or worst == "failed" else otherwise
        wrong.setdefault(quoted(said), []).append(device)
    if not wrong:
        return Finding(node.address, key, "ok", f"all {node.devices} devices")
    text = "; ".join(f"device {', '.join(map(str, devices))}: {said}" for said, devices in wrong.items())
    return Finding(node.address, key, worst, text, remedy)


def quoted(said: Said | None) -> str:
    if said is None or said.status in (TIMED_OUT, 137):
        return "no answer in time"
    text = " ".join(said.text.split()) or "says nothing"
    return (text if len(text) <= NUM_QUOTED else text[:NUM_QUOTED] + "…") + (
        f" (status {said.status})" if said.status else ""
    )


def _addresses(node: Node, answers: Answers) -> Finding:
    """There is one, and it is the file's."""
    option = address_option(node)
    found = _of_devices(node, answers, option, _has(rf"ipaddr\W*({ADDRESS})"), "failed", ADDRESS_REMEDY)
    if found.status != "ok" or not node.device_ips:
        return found
    others = [
        f"device {device}: {match[1]}, the file has {expected}"
        for device, expected in enumerate(node.device_ips)
        if (match := re.search(rf"ipaddr\W*({ADDRESS})", answers[f"{option}/{device}"].text, re.I))
        and match[1] != expected
    ]
    if not others:
        return found
    return Finding(
        node.address, option, "failed", "; ".join(others), "correct node.device_ips, or the device's address"
    )


def tls_switch(text: str) -> str:
    """Of one device, in the tool's words: `0`, `1`, or the line that says switch."""
    match = re.search(r"switch\W{0,3}(\d+|on|off|enable|disable)", text, re.I)
    if match:
        return match[1].lower()
    line = next((line for line in text.splitlines() if "switch" in line.lower()), "")
    return re.sub(r"dev_?id\W*\d+\W*", "", line, flags=re.I).strip()


def tls_switches(node: Node, answers: Answers) -> dict[str, list[int]]:
    """Devices by what their switch says."""
    found: dict[str, list[int]] = {}
    for device in range(node.devices):
        said = answers.get(f"tls/{device}")
        if said and tls_switch(said.text):
            found.setdefault(tls_switch(said.text), []).append(device)
    return found


TLS_REMEDY = "the same on all devices of all nodes: hccn_tool -i N -tls -s enable 0"


def _tls(node: Node, answers: Answers) -> Finding:
    found = tls_switches(node, answers)
    if sum(map(len, found.values())) < node.devices:
        return _of_devices(node, answers, "tls", _has("switch"), "warning", TLS_REMEDY)
    said = ", ".join(f"{value} on device {', '.join(map(str, devices))}" for value, devices in found.items())
    if len(found) > 1:
        return Finding(node.address, "tls", "failed", said, TLS_REMEDY)
    return Finding(node.address, "tls", "ok", f"switch {next(iter(found))}")


def _hccn_conf(node: Node, answers: Answers) -> Finding:
    said = answers.get("hccn.conf")
    if said is None or not said.text:
        remedy = "mount it into the container: docker run -v /etc/hccn.conf:/etc/hccn.conf"
        return Finding(node.address, "hccn.conf", "failed", "/etc/hccn.conf is absent or empty", remedy)
    wrong = [
        f"address_{device} is {match[1]}, the file has {expected}"
        for device, expected in enumerate(node.device_ips)
        if (match := re.search(rf"^address_{device}=(\S+)", said.text, re.M)) and match[1] != expected
    ]
    if wrong and node.hardware == "A2":
        return Finding(node.address, "hccn.conf", "failed", "; ".join(wrong), "correct node.device_ips, or hccn.conf")
    return Finding(node.address, "hccn.conf", "ok", f"{len(said.text.splitlines())} lines")


def super_pod_id(answers: Answers) -> str:
    for key, said in answers.items():
        if key.startswith("spod/") and (match := re.search(r"Super Pod ID\s*:\s*(\S+)", said.text, re.I)):
            return match[1]
    return ""


def _super_pod(node: Node, answers: Answers) -> Finding:
    if "no/npu-smi" in answers:
        remedy = "mount /usr/local/bin/npu-smi into the container"
        return Finding(node.address, "npu-smi", "unknown", "not on this node: its checks are left out", remedy)
    remedy = 'is the driver of A3 loaded, and the node in a super pod? else hardware = "A2"'
    found = _of_devices(node, answers, "spod", _has(r"(?s)(?=.*Super Pod ID).*SDID"), "failed", remedy)
    known = super_pod_id(answers)
    if found.status == "ok" and node.super_pod_id and known != node.super_pod_id:
        said = f"super pod {known}, the file has {node.super_pod_id}"
        return Finding(node.address, "spod-info", "failed", said, "correct node.super_pod_id")
    return Finding(node.address, "spod-info", found.status, found.said, found.remedy)


BAD_PING = r"unreachable|time[sd]? ?out|fail|error|\b100(\.0+)?% packet loss"


def ping_finding(node: Node, answers: Answers, peers: dict[str, Sequence[str]]) -> Iterator[Finding]:
    """Of each peer one."""
    for peer, addresses in peers.items():
        name = f"ping {peer}"
        if not addresses:
            remedy = f"say node.device_ips of {peer} in the file, or check all nodes at once (without --node)"
            yield Finding(node.address, name, "unknown", "the addresses of its devices are not known", remedy)
            continue
        failed: list[str] = []
        for device in range(node.devices):
            for address in addresses:
                said = answers.get(f"ping/{device}/{address}")
                if said is None or said.status or not said.text or re.search(BAD_PING, said.text, re.I):
                    failed.append(f"{device} to {address}: {quoted(said)}")
        num = node.devices * len(addresses)
        if failed:
            remedy = "check VLAN, routes and the switch between them; hccn_tool -i N -net_health -g"
            more = f" and {len(failed) - 1} more of {num}" if len(failed) > 1 else f", 1 of {num}"
            yield Finding(node.address, name, "failed", f"device {failed[0]}{more}", remedy)
        else:
            yield Finding(node.address, name, "ok", f"{num} pairs of devices")


def not_found(said: Said | None) -> bool:
    return said is None or said.status == NOT_FOUND
