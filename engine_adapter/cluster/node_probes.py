"""What is asked on a node before anything starts there, as a script of bash, and its answer taken apart. Pure.

The script needs bash and coreutils only, so that any remote shell can run it. Each answer is one section; what a tool
does not say within its time is an answer, too (status 124).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine_adapter.cluster.deployment import Node

DRIVER_TOOLS = "/usr/local/Ascend/driver/tools:/usr/local/bin:/usr/local/sbin"
PROBE_TIMEOUT_S = 15
TIMED_OUT, NOT_FOUND = 124, 127
SECTION = re.compile(r"^@@ (\S+) (\d+)", re.MULTILINE)
LINE_END = "\x1e"
"""Within an answer that is one line."""

HEAD = rf"""
PATH="$PATH:{DRIVER_TOOLS}"; export PATH LC_ALL=C
HCCN="${{HCCN_TOOL_PATH:-hccn_tool}}"
there() {{ command -v "$1" > /dev/null 2>&1; }}
probe() {{ # KEY COMMAND...: one line, so that those of several jobs do not mix
  local key="$1" said status; shift
  said="$(timeout -k 1 {PROBE_TIMEOUT_S} "$@" 2>&1 < /dev/null)"; status=$?
  said="${{said:0:1500}}"
  printf '@@ %s %s %s\n' "$key" "$status" "${{said//$'\n'/$'\x1e'}}"
}}
long() {{ # KEY COMMAND...: of any length, while nothing else runs
  local key="$1"; shift
  printf '@@ %s 0\n' "$key"; timeout -k 1 {PROBE_TIMEOUT_S} "$@" 2> /dev/null < /dev/null; printf '\n'
}}
""".strip()

VERSIONS = """
import importlib.metadata as m, importlib.util as u
names = ("vllm", "vllm-ascend", "torch", "torch-npu", "pd-baton", "mooncake-transfer-engine",
         "mooncake-transfer-engine-npu", "mooncake-transfer-engine-non-cuda")
for name in names:
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        pass
if u.find_spec("mooncake"):
    print("mooncake", "there")
""".strip()

DEVICE_OPTIONS = ("lldp", "link", "net_health", "netdetect", "gateway", "tls")


@dataclass(frozen=True, slots=True)
class Said:
    """A command's answer."""

    status: int
    text: str


Answers = Mapping[str, Said]


def address_option(node: Node) -> str:
    return "vnic" if node.hardware == "A3" else "ip"


def is_npu(node: Node) -> bool:
    return node.hardware in ("A2", "A3")


def facts_script(node: Node) -> str:
    """All but the pings."""
    lines = [HEAD]
    if is_npu(node):
        lines += ["there \"$HCCN\" || printf '@@ no/hccn_tool 127\\n'", 'if there "$HCCN"; then']
        for device in range(node.devices):
            options = (*DEVICE_OPTIONS, address_option(node))
            probes = "; ".join(f'probe {option}/{device} "$HCCN" -i {device} -{option} -g' for option in options)
            lines.append(f"( {probes} ) &")
        lines.append("fi")
        if node.hardware == "A3":
            lines += ["there npu-smi || printf '@@ no/npu-smi 127\\n'", "if there npu-smi; then"]
            for device in range(node.devices):
                words = f"npu-smi info -t spod-info -i {device // 2} -c {device % 2}"
                lines.append(f"probe spod/{device} {words} &")
            lines.append("fi")
        lines += ["wait", 'long hccn.conf cat "${HCCN_CONF_PATH:-/etc/hccn.conf}"']
        toolkit = '"${ASCEND_HOME_PATH:-/usr/local/Ascend/ascend-toolkit/latest}"'
        files = f"{toolkit}/*/ascend_toolkit_install.info {toolkit}/ascend_toolkit_install.info {toolkit}/version.cfg"
        lines.append(f"long cann grep -hism1 '^version *=' {files}")
    lines += [
        'py="$(sed -n \'1s/^#! *//p\' "$(command -v vllm || command -v pd-engine)" 2> /dev/null)"',
        'case "$py" in *python*) ;; *) py=python3 ;; esac',
        f"probe versions $py -c {shlex.quote(VERSIONS)}",
        "probe shm df -Pk /dev/shm",
        "long nics ls /sys/class/net",
        f"there ip && probe nic ip -o addr show dev {shlex.quote(node.nic)}",
        "long listening awk '$4 == \"0A\" { print $2 }' /proc/net/tcp /proc/net/tcp6",
        "long ephemeral cat /proc/sys/net/ipv4/ip_local_port_range",
        "long reserved cat /proc/sys/net/ipv4/ip_local_reserved_ports",
    ]
    return "\n".join(lines) + "\n"


def ping_script(node: Node, peers: Mapping[str, Iterable[str]]) -> str:
    """Every device of a node asks every device of its peers, by node."""
    option = "hccs_ping" if node.hardware == "A3" else "ping"
    lines = [HEAD]
    for device in range(node.devices):
        for addresses in peers.values():
            probes = "; ".join(
                f'probe ping/{device}/{address} "$HCCN" -i {device} -{option} -g address {shlex.quote(address)}'
                for address in addresses
            )
            if probes:
                lines.append(f"( {probes} ) &")
    return "\n".join([*lines, "wait"]) + "\n"


def answers_of(output: str) -> dict[str, Said]:
    parts = SECTION.split(output)[1:]
    return {
        key: Said(int(status), text.replace(LINE_END, "\n").strip())
        for key, status, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }


def device_addresses(node: Node, answers: Answers) -> list[str]:
    """By the file, else as hccn_tool said."""
    if node.device_ips:
        return list(node.device_ips)
    said = (answers.get(f"{address_option(node)}/{device}") for device in range(node.devices))
    found = (re.search(r"ipaddr\s*:\s*([0-9A-Fa-f.:]+)", one.text) for one in said if one)
    return [match[1] for match in found if match]
