"""`pd-cluster check`: asks every node, or this one, what the plan needs of it, and says what to do."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_adapter.cluster import deployment_rules
from engine_adapter.cluster.deployment import Deployment, Node
from engine_adapter.cluster.deployment_plan import deployment_plan
from engine_adapter.cluster.host_findings import compared, host_findings
from engine_adapter.cluster.node_commands import check_node
from engine_adapter.cluster.node_findings import Finding, npu_findings, ping_finding
from engine_adapter.cluster.node_probes import Said, answers_of, device_addresses, facts_script, is_npu, ping_script
from engine_adapter.cluster.rank_table_command import is_here

WHAT = "look at every node, or one, before anything starts: network of the NPUs, versions, memory, ports"
SHELL_FAILED = 255
Nodes = dict[str, dict[str, Said]]


def add_to(commands: Any) -> Any:
    command = commands.add_parser("check", help=WHAT, description=WHAT, allow_abbrev=False)
    command.set_defaults(run=run)
    command.add_argument("file", type=Path, metavar="FILE", help="a deployment, see configs/deployments/")
    command.add_argument("--node", metavar="ADDRESS", help="only this one, which is this machine")
    command.add_argument(
        "--remote-shell", default="ssh -o BatchMode=yes", help="without --node: reaches other nodes (%(default)s)"
    )
    command.add_argument(
        "--timeout-s", type=float, default=120.0, help="for all answers, and pings again (%(default)g)"
    )
    command.add_argument("--json", action="store_true", help="for programs")
    return command


def run(arguments: argparse.Namespace) -> int:
    """0: nothing failed."""
    deployment = deployment_rules.load(arguments.file)
    check_node(deployment_plan(deployment), arguments.file, arguments.node)
    found = asyncio.run(_check(deployment, arguments))
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2))
    else:
        print(as_table(found))
    return 1 if any(finding.status == "failed" for finding in found) else 0


async def _check(deployment: Deployment, arguments: argparse.Namespace) -> list[Finding]:
    chosen = [node for node in deployment.node if arguments.node in (None, node.address)]
    shells = {
        node.address: [] if arguments.node or is_here(node.address) else shlex.split(arguments.remote_shell)
        for node in chosen
    }
    asked = await _ask({node.address: facts_script(node) for node in chosen}, shells, arguments.timeout_s)
    unreached = [
        Finding(node, "reach", "failed", why, f"run `pd-cluster check {arguments.file} --node {node}` there")
        for node, (_, why) in asked.items()
        if why
    ]
    answers = {node: said for node, (said, why) in asked.items() if not why}
    reached = [node for node in chosen if node.address in answers]
    pings = await _pings(deployment, reached, answers, shells, arguments.timeout_s)
    plan = deployment_plan(deployment)
    found: list[Finding] = []
    for node in reached:
        found += npu_findings(node, answers[node.address])
        found += pings.get(node.address, [])
        found += host_findings(deployment, plan, node, answers[node.address])
    return [*unreached, *found, *compared(deployment, answers)]


async def _pings(
    deployment: Deployment, reached: Sequence[Node], answers: Nodes, shells: Mapping[str, list[str]], timeout_s: float
) -> dict[str, list[Finding]]:
    """From every node that has hccn_tool, to the devices of all others that are known."""
    known = {node.address: device_addresses(node, answers.get(node.address, {})) for node in deployment.node}
    asking = [node for node in reached if is_npu(node) and "no/hccn_tool" not in answers[node.address]]
    peers: dict[str, dict[str, Sequence[str]]] = {
        node.address: {it.address: known[it.address] for it in deployment.node if it != node and is_npu(it)}
        for node in asking
    }
    scripts = {node.address: ping_script(node, peers[node.address]) for node in asking if any(peers[node.address])}
    asked = await _ask(scripts, shells, timeout_s)
    return {
        node.address: list(ping_finding(node, asked.get(node.address, ({}, ""))[0], peers[node.address]))
        for node in asking
    }


async def _ask(
    scripts: Mapping[str, str], shells: Mapping[str, list[str]], timeout_s: float
) -> dict[str, tuple[dict[str, Said], str]]:
    """Each node's answers, all nodes at once; and why there are none."""
    done = await asyncio.gather(*(_ask_one(node, script, shells[node], timeout_s) for node, script in scripts.items()))
    return dict(zip(scripts, done, strict=True))


async def _ask_one(node: str, script: str, shell: list[str], timeout_s: float) -> tuple[dict[str, Said], str]:
    argv = [*shell, node, "bash", "-s"] if shell else ["bash", "-s"]
    with tempfile.TemporaryFile() as said:  # what came until the time is over counts
        try:
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=asyncio.subprocess.PIPE, stdout=said, stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return {}, f"{argv[0]}: {error.strerror}"
        errors = b""
        try:
            async with asyncio.timeout(timeout_s):
                _, errors = await process.communicate(script.encode())
        except TimeoutError:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        said.seek(0)
        answers = answers_of(said.read().decode(errors="replace"))
    if shell and (process.returncode == SHELL_FAILED or not answers):
        lines = errors.decode(errors="replace").strip().splitlines()
        return {}, f"{shell[0]}: {lines[-1] if lines else 'no answer'}"
    return answers, ""


MARKS = {"ok": "ok", "failed": "FAILED", "warning": "warning", "unknown": "unknown"}


def as_table(found: Sequence[Finding]) -> str:
    """One line a check; what is not well has its remedy at the end of its line."""
    rows = [("node", "check", "", "found"), *((it.node, it.check, MARKS[it.status], it.said) for it in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for row, finding in zip(rows, [None, *found], strict=True):
        cells = [word.ljust(width) for word, width in zip(row, widths, strict=False)]
        remedy = f" -> {finding.remedy}" if finding and finding.remedy else ""
        lines.append("  ".join([*cells, row[3]]).rstrip() + remedy)
    numbers = {status: sum(1 for it in found if it.status == status) for status in MARKS}
    lines.append(", ".join(f"{number} {status}" for status, number in numbers.items() if number))
    return "\n".join(lines)
