"""What runs, for `pd-cluster status` and `down`: one file a node's share, there as long as its supervisor."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_adapter.cluster.supervisor import State, Supervisor, Watched

STATE_FILE = "state.json"


class StateFile:
    """Written anew at every change."""

    def __init__(self, path: Path, **said: object) -> None:
        self.path = path
        self._said = {"host": socket.gethostname(), "pid": os.getpid(), "since": round(time.time()), **said}

    def write(self, supervisor: Supervisor) -> None:
        awaited = [name for name, ready in supervisor.elsewhere.items() if not ready.is_set()]
        said = {
            **self._said,
            "awaits": awaited,
            "processes": [_said_of(watched) for watched in supervisor.watched.values()],
        }
        part = self.path.with_name(f".{self.path.name}")
        part.write_text(json.dumps(said, indent=2) + "\n")
        part.replace(self.path)


def _said_of(watched: Watched) -> dict[str, object]:
    process = watched.process
    return {
        "name": process.name,
        "kind": process.kind,
        "role": process.role,
        "state": watched.state.value,
        "pid": watched.pid,
        "restarts": watched.num_restarts,
        "address": process.address,
        "health_url": process.health_url,
    }


@dataclass(frozen=True, slots=True)
class Running:
    """A share that is up."""

    node: str
    run_dir: Path
    said: dict[str, Any]

    @property
    def pid(self) -> int:
        return int(self.said["pid"])

    @property
    def host(self) -> str:
        return str(self.said["host"])

    @property
    def is_well(self) -> bool:
        return all(process["state"] == State.HEALTHY for process in self.said["processes"])


def running(state_dir: Path, name: str) -> list[Running]:
    """Every share of the deployment whose supervisor lives, by node."""
    found = []
    for run_dir in sorted((state_dir / "run" / name).glob("*/")):
        said = None
        with contextlib.suppress(OSError, ValueError):
            said = json.loads((run_dir / "live" / STATE_FILE).read_text())
        if said and is_held(run_dir):
            found.append(Running(str(said["node"]), run_dir, said))
    return found


def is_held(run_dir: Path) -> bool:
    """Whether somebody supervises there, see `machine.locked`."""
    try:
        with (run_dir / "supervisor.pid").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """In columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def status_table(shares: Iterable[Running]) -> str:
    rows = [("node", "process", "state", "pid", "restarts", "health")]
    for share in shares:
        for it in share.said["processes"]:
            pid, restarts = str(it["pid"] or "-"), str(it["restarts"])
            rows.append((share.node, it["name"], it["state"], pid, restarts, it["health_url"]))
    return table(rows)
