"""`pd-cluster`: a deployment from one file. `up` serves it, `plan` prints it, `demo` serves it and shows one answer."""

from __future__ import annotations

import argparse
import asyncio
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from engine_adapter.cluster import check_command, demo, deployment_rules, node_commands, rank_table_command
from engine_adapter.cluster.config import load, with_flags
from engine_adapter.cluster.deployment import is_deployment, text_of
from engine_adapter.cluster.deployment_plan import deployment_plan
from engine_adapter.cluster.errors import ClusterError, ConfigError, nearest
from engine_adapter.cluster.plan_output import as_json, local_as_json
from engine_adapter.cluster.screen import Screen
from engine_adapter.cluster.shell_script import script
from engine_adapter.cluster.up import Deployment, check, deployment, up

USAGE_STATUS = 2


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line, with the nearest right word."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_STATUS, f"{self.prog}: {message}\n")

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def main() -> NoReturn:
    arguments = _parse(sys.argv[1:])
    try:
        sys.exit(arguments.run(arguments))
    except ClusterError as error:
        for problem in error.problems:
            print(f"pd-cluster: {problem}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(0)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = Parser(prog="pd-cluster", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pd-baton {version('pd-baton')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    by_name = {
        "up": _command(commands, "up", _up, "start the deployment, watch over it, stop it in order at Ctrl-C"),
        "plan": _command(commands, "plan", _plan, "print every command in start order and start nothing"),
        "demo": _command(commands, "demo", _demo, "like up, with one streamed answer shown and measured"),
    }
    by_name["plan"].add_argument(
        "--node", metavar="ADDRESS", help="of a deployment over several nodes: this one's share"
    )
    by_name["plan"].add_argument(
        "--format", choices=("shell", "json"), default="shell", help="shell runs as it is with bash (%(default)s)"
    )
    by_name["ranktable"] = rank_table_command.add_to(commands)
    by_name["check"] = check_command.add_to(commands)
    by_name |= node_commands.add_running_commands(commands)
    by_name["up"].add_argument("--log-dir", type=Path, help="for logs, instead of a directory below --dir")
    node_commands.add_up_flags(by_name["up"])
    by_name["up"].add_argument("--check-only", action="store_true", help="say whether it could start here, and end")
    by_name["demo"].add_argument("--once", action="store_true", help="stop after the answer")
    by_name["demo"].add_argument("--prompt", default=demo.PROMPT, help="what to ask")
    if words and not words[0].startswith("-") and words[0] not in by_name:
        parser.error(f'unknown command "{words[0]}"; {nearest(words[0], by_name)}')
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        flag = unknown[0].partition("=")[0]
        used = by_name[arguments.command]
        used.error(f'unknown argument "{flag}"' + (f"; {nearest(flag, used.flags())}" if flag[0] == "-" else ""))
    return arguments


def _command(commands: argparse._SubParsersAction[Parser], name: str, run: object, what: str) -> Parser:
    command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
    command.set_defaults(run=run)
    command.add_argument(
        "file", type=Path, metavar="FILE", help="a deployment, see configs/examples/ and configs/deployments/"
    )
    command.add_argument("--model", metavar="DIR", help="serve this Hugging Face directory instead of the file's model")
    command.add_argument("--port", type=int, help="the proxy's port, instead of the file's")
    command.add_argument("--dir", type=Path, default=Path(".baton"), help="for logs and made models (%(default)s)")
    return command


def _deployment(arguments: argparse.Namespace) -> Deployment:
    source = str(arguments.file)
    if is_deployment(text_of(arguments.file)):
        raise ClusterError(f"{source} is a deployment over several nodes; `up {source} --rehearse` runs it here")
    config = with_flags(load(arguments.file), source, model_dir=arguments.model, port=arguments.port)
    return deployment(config, arguments.dir, getattr(arguments, "log_dir", None))


def _up(arguments: argparse.Namespace) -> int:
    if is_deployment(text_of(arguments.file)):
        return node_commands.run_up(arguments)
    for flag in node_commands.UP_FLAGS:
        if getattr(arguments, flag):
            raise ConfigError(f"--{flag}: {arguments.file} has no [[node]], all of it runs on one machine")
    here = _deployment(arguments)
    if arguments.check_only:
        check(here)
        print(f"{arguments.file}: {len(here.plan.processes)} processes could start here")
        return 0
    asyncio.run(up(here, Screen()))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    if is_deployment(text_of(arguments.file)):
        return _plan_of_nodes(arguments)
    if arguments.node is not None:
        raise ConfigError(f"--node {arguments.node}: {arguments.file} has no [[node]], all of it runs on one machine")
    if arguments.format == "json":
        print(local_as_json(_deployment(arguments).plan), end="")
        return 0
    for process in _deployment(arguments).plan.processes:
        print(f"# {process.name}\n{process.shell_line()}")
    return 0


def _plan_of_nodes(arguments: argparse.Namespace) -> int:
    for flag, value in (("--model", arguments.model), ("--port", arguments.port)):
        if value is not None:
            raise ConfigError(f"{flag}: for a deployment over several nodes, say it in {arguments.file}")
    source, node = str(arguments.file), arguments.node
    planned = deployment_plan(deployment_rules.load(arguments.file))
    node_commands.check_node(planned, source, node)
    print(as_json(planned, node) if arguments.format == "json" else script(planned, source, node), end="")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    here, screen = _deployment(arguments), Screen()

    async def then() -> bool:
        made = here.config.model.make is not None
        try:
            await demo.show(here.plan, screen, prompt=arguments.prompt, random_weights=made)
        except ClusterError as error:
            if arguments.once:
                raise
            screen.event(f"the demonstration failed, the cluster stays: {error}")
        return not arguments.once

    asyncio.run(up(here, screen, then))
    return 0


if __name__ == "__main__":
    main()
