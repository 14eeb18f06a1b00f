"""run_dp_template.sh: the processes of one instance on one node as one script, called once for each rank.

Its first seven arguments are those by which launch_online_dp.py of vllm-ascend's documents calls it, so either starts
it. An instance with sidecars needs two more, their ports, and only our own script gives them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

from engine_adapter.cluster.processes import File, Process, Template
from engine_adapter.cluster.shell_words import command_lines, environment_lines
from engine_adapter.cluster.topology import Group, Placement, Topology

POSITIONS = {
    "ASCEND_RT_VISIBLE_DEVICES": 1, "CUDA_VISIBLE_DEVICES": 1, "--port": 2, "--data-parallel-size": 3,
    "--data-parallel-rank": 4, "--data-parallel-address": 5, "--data-parallel-rpc-port": 6, "--tensor-parallel-size": 7,
}  # fmt: skip
RANK, SIDECAR_PORT, METRICS_PORT = 4, 8, 9

_MARK = re.compile("\x00([1-9])\x00")


def templates_of(where: Topology, processes: Iterable[Process]) -> tuple[Template, ...]:
    by_name = {process.name: process for process in processes}
    found = []
    for group in where.groups:
        for node in group.spec.nodes:
            share = [placement for placement in group.placements if placement.node == node]
            template = _template(group, share, [by_name[placement.name] for placement in share])
            found += [template] if template else []
    return tuple(found)


def _template(group: Group, share: list[Placement], processes: list[Process]) -> Template | None:
    """None where there is no external data parallelism, or the processes differ by more than arguments can say."""
    texts = {_text(process, placement) for process, placement in zip(processes, share, strict=True)}
    if group.internal or group.dp == 1 or len(texts) != 1:
        return None
    first = share[0]
    sidecars = first.metrics_port is not None
    launch = () if sidecars or first.devices[:1] != (0,) or group.pp > 1 else _launch(group, first)
    return Template(
        node=first.node,
        instance=group.name,
        file=File(f"./{group.name}/run_dp_template.sh", texts.pop()),
        arguments=tuple((placement.name, _arguments(group, placement)) for placement in share),
        launch=launch,
    )


def _launch(group: Group, first: Placement) -> tuple[str, ...]:
    return (
        *("python", "launch_online_dp.py", "--dp-size", str(group.dp), "--tp-size", str(group.tp)),
        *("--dp-size-local", str(group.local), "--dp-rank-start", str(first.dp_ranks[0])),
        *("--dp-address", group.master, "--dp-rpc-port", str(group.dp_rpc_port)),
        *("--vllm-start-port", str(first.port)),
    )


def _arguments(group: Group, placement: Placement) -> tuple[str, ...]:
    devices = ",".join(str(device) for device in placement.devices)
    words = [devices, placement.port, group.dp, placement.dp_ranks[0], group.master, group.dp_rpc_port, group.tp]
    if placement.metrics_port is not None:
        words += [placement.kv_port, placement.metrics_port]
    return tuple(str(word) for word in words)


def _text(process: Process, placement: Placement) -> str:
    env = {key: f"${POSITIONS[key]}" if key in POSITIONS else value for key, value in process.env.items()}
    words = [
        f'"${POSITIONS[before]}"' if before in POSITIONS else _quoted(_marked(word, process, placement))
        for before, word in zip(["", *process.argv], process.argv, strict=False)
    ]
    more = ", ports of its sidecars and of their metrics" if placement.metrics_port is not None else ""
    lines = (
        "#!/bin/bash",
        f"# {process.instance} on {process.node}. Arguments: devices, port, data-parallel size, rank, address,",
        f"# RPC port, tensor-parallel size{more}",
        'cd "$(dirname "$0")/.." || exit 1',
        *environment_lines(env, process.unset, positional=True),
        *command_lines(words, "exec "),
    )
    return "\n".join(lines) + "\n"


def _marked(word: str, process: Process, placement: Placement) -> str:
    """What differs from rank to rank within a word of JSON, as the number of the argument that says it."""
    if placement.metrics_port is None:
        return word
    word = word.replace(f'"{process.engine_id}"', f'"{process.engine_id.rpartition("-dp")[0]}-dp\x00{RANK}\x00"')
    word = word.replace(f':{placement.kv_port}"', f':\x00{SIDECAR_PORT}\x00"')
    return re.sub(rf'("metrics_port": ){placement.metrics_port}\b', f"\\g<1>\x00{METRICS_PORT}\x00", word)


def _quoted(word: str) -> str:
    """Like shlex.quote, with `"$4"` for a mark."""
    parts = _MARK.split(word)
    return "".join(
        f'"${part}"' if i % 2 else shlex.quote(part) for i, part in enumerate(parts) if part or len(parts) == 1
    )
