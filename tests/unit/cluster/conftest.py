"""A small cluster of stand-in processes, and its journal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

STAND_IN = Path(__file__).with_name("stand_in.py")


@dataclass(frozen=True)
class Bench:
    """Where a test's cluster lives."""

    directory: Path
    file: Path
    journal: Path

    def events(self) -> list[tuple[str, str, int]]:
        """(event, process name, pid) in the order they happened."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [(event, name, int(pid)) for event, name, pid in map(str.split, lines)]

    def pids(self, event: str = "begin") -> dict[str, int]:
        """By name, the latest."""
        return {name: pid for what, name, pid in self.events() if what == event}

    def write(self, extra: str = "") -> None:
        words = {
            kind: [sys.executable, str(STAND_IN), str(self.journal), kind] for kind in ("engine", "sidecar", "proxy")
        }
        commands = "\n".join(f"{kind} = {json.dumps(argv)}" for kind, argv in words.items())
        self.file.write_text(
            f'[cluster]\nname = "c"\nstop_timeout_s = 2\nstart_timeout_s = 20\n[model]\npath = "m"\n'
            f'[commands]\n{commands}\n[[instance]]\nrole = "prefill"\n[[instance]]\nrole = "decode"\n'
            f"[proxy]\nport = 0\n{extra}"
        )


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    made = Bench(tmp_path, tmp_path / "c.toml", tmp_path / "journal")
    made.write()
    return made


def is_alive(pid: int) -> bool:
    """A zombie nobody reaps is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(holds: Callable[[], object], what: str, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def own_children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
