"""A plan as a script that bash runs as it is: files, environment, commands, in start order, node by node."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator

from engine_adapter.cluster.processes import DeploymentPlan, File, Process
from engine_adapter.cluster.shell_words import command_lines, environment_lines

READY = r"""ready() {  # NAME URL: wait until it answers
  command -v curl > /dev/null || { echo "curl is needed on this node, to see when $1 is ready" >&2; exit 1; }
  until case "$2" in
    tcp://*) host="${2#tcp://}" port="${2##*:}"; host="${host%:*}"; host="${host#[}"
      (: > "/dev/tcp/${host%]}/$port") 2> /dev/null ;;
    *) curl --noproxy '*' -fsS -o /dev/null --max-time 5 "$2" 2> /dev/null ;;
  esac; do
    echo "waiting for $1 ($2)" >&2
    sleep "${READY_INTERVAL_S:-2}"
  done
}"""


def script(plan: DeploymentPlan, source: str, node: str | None = None) -> str:
    """Of all nodes: `bash SCRIPT ADDRESS` starts that node's share. Of one: `bash SCRIPT` does. Both also know
    `check` (the seeds' look at the network), `request` (ask the proxy something) and `bench`.
    """
    nodes = [node] if node else [address for address in plan.nodes if plan.of_node(address)]
    parts = [_head(plan, source, node), READY]
    parts += ["\n".join(_node(plan, source, address)) for address in nodes]
    parts += [_function("request", "\n".join(command_lines(_quoted(plan.request))))]
    if plan.bench is not None:
        parts.append(_function("bench", "\n".join(_bench(plan.bench))))
    parts.append("\n".join(_choice(plan, nodes, node)))
    return "\n\n".join(parts) + "\n"


def _head(plan: DeploymentPlan, source: str, node: str | None) -> str:
    usage = "bash SCRIPT" if node else "bash SCRIPT ADDRESS"
    shown = source.replace("\n", " ")
    what = f"node {node}" if node else f"{len(plan.nodes)} nodes"
    lines = [
        "#!/bin/bash",
        f"# {plan.name}: {what}, {len(plan.of_node(node) if node else plan.processes)} processes; from {shown}",
        f"# Runs in the current directory, where files and logs go: {usage} [check | request | bench]",
        "set -u",
        f"DEPLOYMENT={shlex.quote(source)}",
    ]
    return "\n".join(lines)


def _node(plan: DeploymentPlan, source: str, address: str) -> Iterator[str]:
    processes = plan.of_node(address)
    waited: set[str] = set()
    lines = ["trap 'kill $(jobs -p) 2> /dev/null' EXIT", "trap 'exit 143' INT TERM", ""]
    templates = [template for template in plan.templates if template.node == address]
    for file in unique(file for process in processes for file in process.files):
        lines += [*_file(file), ""]
    calls: dict[str, list[str]] = {}
    for template in templates:
        if template.launch:
            lines.append(f"# instead of its lines below: cd {template.instance} && {shlex.join(template.launch)}")
        lines += [*_file(template.file), ""]
        calls |= {name: ["bash", template.file.path, *words] for name, words in template.arguments}
    for process in processes:
        lines += [
            f"ready {name} {shlex.quote(plan.named(name).ready_url)}" for name in process.after if name not in waited
        ]
        waited.update(process.after)
        if process.name in calls:
            lines.append(f"{shlex.join(calls[process.name])} > {process.name}.log 2>&1 &")
        else:
            lines += [*process_lines(process), ""]
    yield _function(f"start_{_identifier(address)}", "\n".join([*lines, "wait"]))
    checks = next(checks.lines for checks in plan.checks if checks.node == address)
    yield ""
    yield _function(f"check_{_identifier(address)}", "\n".join(checks) or ":")


def process_lines(process: Process) -> Iterator[str]:
    """In a subshell, in the background, its output in a log of its name."""
    where = process.ready_url or "headless"
    yield f"# {process.name}: {where}"
    yield "("
    yield from environment_lines(process.env, process.unset)
    yield from command_lines(_quoted(process.argv), "exec ")
    yield f") > {process.name}.log 2>&1 &"


def _file(file: File) -> Iterator[str]:
    path = shlex.quote(file.path)
    if file.text is None:
        words = " ".join('"$DEPLOYMENT"' if word == "${DEPLOYMENT}" else shlex.quote(word) for word in file.made_by)
        yield f"test -e {path} || {words} || exit 1"
        return
    directory = file.path.rpartition("/")[0]
    if directory not in ("", "."):
        yield f"mkdir -p {shlex.quote(directory)}"
    mark = "END_OF_FILE"
    while mark in file.text:
        mark += "_"
    yield f"cat > {path} <<'{mark}'"
    yield file.text.removesuffix("\n")
    yield mark


def _bench(bench: Process) -> Iterator[str]:
    for file in bench.files:
        yield from _file(file)
    yield from environment_lines(bench.env, bench.unset)
    yield from command_lines(_quoted(bench.argv))


def _choice(plan: DeploymentPlan, nodes: list[str], node: str | None) -> Iterator[str]:
    more = ["request", *(["bench"] if plan.bench else [])]
    usage = " | ".join([*([] if node else ["ADDRESS [check]"]), *(["check"] if node else []), *more])
    yield 'case "${1-}" in'
    if node:
        yield f"  '') start_{_identifier(node)} ;;"
        yield f"  check) check_{_identifier(node)} ;;"
    for address in [] if node else nodes:
        name = _identifier(address)
        yield f'  {address}) if [ "${{2-}}" = check ]; then check_{name}; else start_{name}; fi ;;'
    for name in more:
        yield f"  {name}) {name} ;;"
    there = f"; ADDRESS: {' '.join(nodes)}" if node is None else ""
    yield f'  *) echo "usage: bash $0 {usage}{there}" >&2; exit 2 ;;'
    yield "esac"


def _function(name: str, body: str) -> str:
    """Not indented: a here-document's end must stand at the beginning of its line."""
    return f"{name}() {{\n{body}\n}}"


def _quoted(words: Iterable[str]) -> list[str]:
    return [shlex.quote(word) for word in words]


def _identifier(address: str) -> str:
    """Of a function: no address has an underscore of its own."""
    return address.replace("-", "__").replace(":", "_x").replace(".", "_")


def unique(files: Iterable[File]) -> tuple[File, ...]:
    return tuple(dict.fromkeys(files))
