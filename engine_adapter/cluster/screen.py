"""What the terminal shows: plain lines, one a change, one an instance."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Protocol, TextIO

from engine_adapter.cluster.supervisor import Supervisor, Watched

HEADINGS = ("role", "instance", "address", "pid", "state", "sidecar")
LINE_LIMIT = 200
"""Characters of a quoted log line; the log has the rest."""


class Events(Protocol):
    """What says in lines what happens."""

    def event(self, text: str) -> None: ...

    def change(self, watched: Watched, text: str, last_lines: Sequence[str]) -> None: ...

    def watch(self, supervisor: Supervisor) -> None: ...

    def close(self) -> None: ...


class Screen:
    """Writes lines to a stream until nobody reads it any more; that is no reason to stop serving."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._nowhere: TextIO | None = None

    def close(self) -> None:
        if self._nowhere is not None:
            self._nowhere.close()

    def watch(self, supervisor: Supervisor) -> None:
        """Lines say each change; there is nothing more to show."""

    def line(self, text: str = "") -> None:
        self.piece(text + "\n")

    def piece(self, text: str) -> None:
        """Without a line's end, seen at once."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (BrokenPipeError, ValueError):
            self._stream = self._nowhere = open(os.devnull, "w")  # noqa: SIM115 as long as the screen

    def event(self, text: str) -> None:
        self.line(f"{time.strftime('%H:%M:%S')} {text}")

    def change(self, watched: Watched, text: str, last_lines: Sequence[str]) -> None:
        """A supervisor's report."""
        pid = f" pid {watched.pid}" if watched.pid else ""
        self.event(f"{watched.process.name:<18} {watched.process.address:<21}{pid} {text}")
        for last in last_lines:
            self.line(f"    | {last if len(last) <= LINE_LIMIT else last[:LINE_LIMIT] + '…'}")

    def instances(self, all_watched: Iterable[Watched]) -> None:
        """The table of instances, the proxy last."""
        by_name = {watched.process.name: watched for watched in all_watched}
        rows = [HEADINGS]
        for name, watched in by_name.items():
            if watched.process.kind != "sidecar":
                sidecar = by_name.get(f"{name}.sidecar")
                rows.append((watched.process.role, name, *_where(watched), _beside(sidecar)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            self.line("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


def _where(watched: Watched) -> tuple[str, str, str]:
    return watched.process.address, str(watched.pid or "-"), watched.state.value


def _beside(sidecar: Watched | None) -> str:
    return " ".join((_where(sidecar)[0], "pid", *_where(sidecar)[1:])) if sidecar else ""
