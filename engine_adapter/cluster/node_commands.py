"""`up`, `down` and `status` of deployments over several nodes: what their flags mean."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from engine_adapter.cluster import deployment_rules, machine
from engine_adapter.cluster.config import load
from engine_adapter.cluster.deployment import Deployment, is_deployment, text_of
from engine_adapter.cluster.deployment_plan import deployment_plan
from engine_adapter.cluster.errors import ClusterError, ConfigError, nearest
from engine_adapter.cluster.node_up import Run, problems, up
from engine_adapter.cluster.processes import DeploymentPlan
from engine_adapter.cluster.rehearsal_up import rehearsal_run
from engine_adapter.cluster.run_state import Running, running, status_table
from engine_adapter.cluster.share import listens_on, share_of

UP_FLAGS = ("node", "rehearse", "engine", "once")
START_TIMEOUT_S, STOP_TIMEOUT_S = 3600.0, 60.0


def add_up_flags(command: Any) -> None:
    several = command.add_argument_group("a deployment over several nodes")
    several.add_argument("--node", metavar="ADDRESS", help="start this node's share; what runs on others is awaited")
    several.add_argument("--rehearse", action="store_true", help="all nodes on this machine, on 127.x.y.z, on the CPU")
    several.add_argument(
        "--engine",
        choices=("auto", "torch", "mock"),
        help="of a rehearsal: torch_engine on a tiny model, or mock engines; auto: torch for a few of contract pull",
    )
    several.add_argument("--once", action="store_true", help="of a rehearsal: end after the warm-up prompts")
    several.add_argument(
        "--warm-up-prompts", type=int, default=3, metavar="N", help="to each API server and prefiller (%(default)s)"
    )
    several.add_argument(
        "--start-timeout-s", type=float, default=START_TIMEOUT_S, help="for a process to be ready (%(default)g)"
    )
    several.add_argument(
        "--stop-timeout-s", type=float, default=STOP_TIMEOUT_S, help="for a process to drain and end (%(default)g)"
    )


def run_up(arguments: argparse.Namespace) -> int:
    for flag, value in (("--model", arguments.model), ("--port", arguments.port)):
        if value is not None:
            raise ConfigError(f"{flag}: for a deployment over several nodes, say it in {arguments.file}")
    deployment = deployment_rules.load(arguments.file)
    planned = deployment_plan(deployment)
    if arguments.rehearse:
        if arguments.node is not None:
            raise ConfigError(f"--node {arguments.node}: a rehearsal is of all nodes; give one of the two")
        run = rehearsal_run(deployment, planned, arguments)
    else:
        run = _node_run(deployment, planned, arguments)
    if arguments.check_only:
        found = problems(run)
        if found:
            raise ClusterError(*found)
        print(f"{arguments.file}: {len(run.share.processes)} processes could start here")
        return 0
    asyncio.run(up(run))
    return 0


def _node_run(deployment: Deployment, planned: DeploymentPlan, arguments: argparse.Namespace) -> Run:
    source, node = arguments.file, arguments.node
    for flag, value in (("--engine", arguments.engine), ("--once", arguments.once)):
        if value:
            raise ConfigError(f"{flag}: of a rehearsal; add --rehearse")
    if node is None and len(planned.nodes) == 1:
        node = planned.nodes[0]
    if node is None:
        there = ", ".join(planned.nodes)
        raise ConfigError(f"{source} has several nodes: say which this is by --node ({there}), or add --rehearse")
    check_node(planned, source, node)
    mine = planned.of_node(node)
    if not mine:
        raise ClusterError(f"--node {node}: {source} starts nothing there")
    env = machine.environment(own_first=False)
    run_dir = arguments.dir / "run" / planned.name / node.replace(":", "_")
    return Run(
        share=share_of(planned, node, deployment.model.served_name or deployment.model.path, env),
        source=source.absolute(),
        node=node,
        run_dir=run_dir,
        log_dir=arguments.log_dir or run_dir,
        ports=[(it.name, listens_on(it), port) for it in mine for port, _ in it.ports],
        env=env,
        start_timeout_s=arguments.start_timeout_s,
        stop_timeout_s=arguments.stop_timeout_s,
        num_prompts=arguments.warm_up_prompts,
    )


def check_node(planned: DeploymentPlan, source: object, node: str | None) -> None:
    if node is not None and node not in planned.nodes:
        raise ConfigError(f"--node {node}: {source} has no such node; {nearest(node, planned.nodes)}")


def add_running_commands(commands: Any) -> dict[str, Any]:
    by_name = {
        "down": ("stop what `up` started here, in order", run_down),
        "status": ("say how each process is", run_status),
    }
    parsers = {}
    for name, (what, run) in by_name.items():
        command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        command.set_defaults(run=run)
        command.add_argument("deployment", metavar="FILE|NAME", help="the deployment's file, or its name")
        command.add_argument("--node", metavar="ADDRESS", help="this node's share only; rehearsal: the rehearsal")
        command.add_argument("--dir", type=Path, default=Path(".baton"), help="as `up` was given it (%(default)s)")
        parsers[name] = command
    parsers["status"].add_argument("--json", action="store_true", help="for programs")
    parsers["down"].add_argument(
        "--timeout-s", type=float, default=600.0, help="then what still drains is killed (%(default)g)"
    )
    return parsers


def _shares(arguments: argparse.Namespace) -> list[Running]:
    """What runs. Raises ClusterError if nothing does."""
    given = arguments.deployment
    name = given
    if given.endswith(".toml") or "/" in given or Path(given).is_file():
        text = text_of(Path(given))
        name = deployment_rules.load(Path(given)).name if is_deployment(text) else load(Path(given)).cluster.name
    found = running(arguments.dir, name)
    if arguments.node is not None:
        found = [share for share in found if share.node == arguments.node]
    if not found:
        where = f" on {arguments.node}" if arguments.node else ""
        others = [path.name for path in (arguments.dir / "run").glob("*/") if running(arguments.dir, path.name)]
        hint = f"up are: {', '.join(sorted(others))}" if others else "is it another --dir, or another machine?"
        raise ClusterError(f"{name}{where} is not up ({arguments.dir}/run); {hint}")
    return found


def run_status(arguments: argparse.Namespace) -> int:
    """0: all is well; 1: it is not, or not up."""
    shares = _shares(arguments)
    if arguments.json:
        print(json.dumps([share.said for share in shares], indent=2))
    else:
        print(status_table(shares))
        for share in shares:
            if share.said["awaits"]:
                print(f"{share.node} waits for {', '.join(share.said['awaits'])}")
    return 0 if all(share.is_well for share in shares) else 1


def run_down(arguments: argparse.Namespace) -> int:
    shares = _shares(arguments)
    here = socket.gethostname()
    far = [share for share in shares if share.host != here]
    if far:
        raise ClusterError(*(f"{share.node} was started on {share.host}; run `pd-cluster down` there" for share in far))
    for share in shares:
        _signal(share.pid, signal.SIGTERM)
    for share in shares:
        if not _gone(share.pid, arguments.timeout_s):
            print(f"{share.node}: killing what still drains", file=sys.stderr)
            _signal(share.pid, signal.SIGTERM)  # a second one kills
            _gone(share.pid, arguments.timeout_s)
        print(f"{share.said['name']}, {share.node}: stopped")
    return 0


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise ClusterError(f"process {pid} is another user's; run `pd-cluster down` as that one") from error


def _gone(pid: int, timeout_s: float) -> bool:
    """Wait for a process that is not our child."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], timeout_s)[0])
    finally:
        os.close(process)
