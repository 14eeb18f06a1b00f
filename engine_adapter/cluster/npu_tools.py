"""What hccn_tool and npu-smi say of a node's NPUs: one shell a node, here or on another machine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from typing import Literal

from engine_adapter.cluster.errors import ClusterError
from engine_adapter.cluster.rank_table import Entry

DRIVER_TOOLS = "/usr/local/Ascend/driver/tools:/usr/local/bin:/usr/local/sbin"
"""Where the driver puts them; a login over ssh has a shorter PATH than a container's shell."""

TIMEOUT_S = 120.0


def entries_on(
    address: str,
    devices: Sequence[int],
    hardware: Literal["A2", "A3"],
    *,
    chips_per_card: int = 0,
    remote_shell: Sequence[str] = (),
) -> list[Entry]:
    """Ask for each device's address; on A3 also where it is in the super pod. Raises ClusterError.

    `remote_shell`: words that run a command on `address`, such as ("ssh",); none: this machine is it.
    """
    chips = chips_per_card or (2 if hardware == "A3" else 1)
    lines = []
    for device in devices:
        lines.append(f"echo '@ {device}'; \"$HCCN\" -i {device} {'-vnic' if hardware == 'A3' else '-ip'} -g")
        if hardware == "A3":
            lines.append(f"npu-smi info -t spod-info -i {device // chips} -c {device % chips}")
    said = _run(address, "\n".join(lines), remote_shell)
    sections = {int(part.split("\n", 1)[0]): part for part in said.split("@ ")[1:]}
    return [_entry(address, device, hardware, sections.get(device, "")) for device in devices]


def cards_and_chips() -> tuple[int, int]:
    """NPU cards of this machine, and chips a card. Raises ClusterError."""
    said = _run("this machine", "npu-smi info -l", ())
    cards, chips = re.search(r"Total Count\s*:\s*(\d+)", said), re.search(r"Chip Count\s*:\s*(\d+)", said)
    if not cards or not chips:
        raise ClusterError("npu-smi info -l says no Total Count and Chip Count; is the driver loaded?")
    return int(cards[1]), int(chips[1])


def _entry(address: str, device: int, hardware: str, said: str) -> Entry:
    fields = {"ipaddr": r"ipaddr\s*:\s*(\S+)"}
    if hardware == "A3":
        fields |= {"Super Pod ID": r"Super Pod ID\s*:\s*(\S+)", "SDID": r"SDID\s*:\s*(\S+)"}
    found = {name: re.search(pattern, said) for name, pattern in fields.items()}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        tool = "hccn_tool" if "ipaddr" in missing else "npu-smi"
        lines = said.strip().splitlines()[1:] or ["nothing"]
        raise ClusterError(
            f"{tool} on {address} says no {' and no '.join(missing)} of device {device} (it says: {lines[0].strip()}); "
            "is there such a device, and has it an address (cat /etc/hccn.conf)?"
        )
    values = {name: match[1] for name, match in found.items() if match}
    return Entry(address, device, values["ipaddr"], values.get("Super Pod ID", ""), values.get("SDID", ""))


def _run(where: str, script: str, remote_shell: Sequence[str]) -> str:
    script = f'PATH="$PATH:{DRIVER_TOOLS}"\nHCCN="${{HCCN_TOOL_PATH:-hccn_tool}}"\nexec 2>&1\n{script}'
    argv = [*remote_shell, where, script] if remote_shell else ["bash", "-c", script]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise ClusterError(f"{argv[0]} is not on this machine; give --remote-shell, or say node.device_ips") from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"the NPU tools on {where} did not answer within {TIMEOUT_S:g} s") from error
    absent = re.search(r"(hccn_tool|npu-smi): (?:command )?not found", done.stdout)
    if absent:
        raise ClusterError(
            f"{absent[1]} is not on {where}: mount it into the container (docker run -v), "
            "name it by HCCN_TOOL_PATH, or say node.device_ips in the file"
        )
    if remote_shell and done.returncode == 255:
        raise ClusterError(f"{remote_shell[0]} {where}: {(done.stderr.strip() or 'no connection').splitlines()[-1]}")
    return done.stdout
