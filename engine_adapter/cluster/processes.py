"""What a plan over several nodes is made of. Pure data: whoever starts, prints or checks it needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["store", "engine", "proxy", "bench"]

REFERENCE = re.compile(r"(:?)\$\{([A-Za-z_][A-Za-z0-9_]*)\}(:?)")


@dataclass(frozen=True, slots=True)
class File:
    """A file that must be there before a process starts, relative to the directory it runs in."""

    path: str
    text: str | None
    """None: only a command on the nodes can make it."""
    made_by: tuple[str, ...] = ()
    """That command; its word `${DEPLOYMENT}` is the deployment's own file."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process of one node."""

    node: str
    """Address."""
    name: str
    """`prefill-0`, `decode-0-dp3`, `proxy`: unique in the plan, and its log's name."""
    kind: Kind
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """On top of the environment it is started in; a value may refer to that by `${NAME}`, see `environment`."""
    unset: tuple[str, ...] = ()
    files: tuple[File, ...] = ()
    ready_url: str = ""
    """http: 200 when it can do its work; tcp://HOST:PORT: when it accepts; empty: not to be seen from outside
    (a headless engine: the process it belongs to becomes ready)."""
    after: tuple[str, ...] = ()
    """Names, also on other nodes, that must be ready before it is started."""
    role: str = ""
    """prefill or decode, of an engine."""
    instance: str = ""
    """`decode-0`: the processes of one instance have it in common."""
    engine_id: str = ""
    dp_ranks: tuple[int, ...] = ()
    """Of the instance's data-parallel ranks those that run in this process."""
    devices: tuple[int, ...] = ()
    ports: tuple[tuple[int, str], ...] = ()
    """All it listens on, and what for."""
    serves: str = ""
    """HOST:PORT of its API server, which the proxy lists; empty: it has none."""

    def environment(self, outer: Mapping[str, str]) -> dict[str, str]:
        """What it is started with, in an environment of `outer`."""
        kept = {key: value for key, value in outer.items() if key not in self.unset}
        return {**kept, **{key: expanded(value, kept) for key, value in self.env.items()}}


@dataclass(frozen=True, slots=True)
class Template:
    """run_dp_template.sh of an instance's share of a node, and how its processes are started by it."""

    node: str
    instance: str
    file: File
    arguments: tuple[tuple[str, tuple[str, ...]], ...]
    """Of each process by its name."""
    launch: tuple[str, ...]
    """launch_online_dp.py, which starts them all; empty where it can't say all there is to say."""


@dataclass(frozen=True, slots=True)
class NodeChecks:
    """The seeds' own look at a node before anything starts, as lines of bash."""

    node: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeploymentPlan:
    name: str
    nodes: tuple[str, ...]
    processes: tuple[Process, ...]
    """In start order."""
    checks: tuple[NodeChecks, ...]
    request: tuple[str, ...]
    """Asks the proxy something, when all is up."""
    bench: Process | None = None
    templates: tuple[Template, ...] = ()

    def of_node(self, address: str) -> tuple[Process, ...]:
        return tuple(process for process in self.processes if process.node == address)

    def named(self, name: str) -> Process:
        return next(process for process in self.processes if process.name == name)

    @property
    def proxy(self) -> Process:
        return self.named("proxy")


def expanded(value: str, outer: Mapping[str, str]) -> str:
    """`${NAME}` replaced from `outer`; where NAME is empty or not set, one colon beside it goes, too: an empty entry
    of a search path is the current directory."""

    def replaced(match: re.Match[str]) -> str:
        before, name, behind = match.groups()
        known = outer.get(name, "")
        return before + known + behind if known else ":" if before and behind else ""

    return REFERENCE.sub(replaced, value)
