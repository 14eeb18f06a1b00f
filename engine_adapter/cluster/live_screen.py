"""One screen that shows a share live, on a terminal: a table of its processes, and what happened last below it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence

from engine_adapter.cluster.screen import LINE_LIMIT, Events, Screen
from engine_adapter.cluster.supervisor import State, Supervisor, Watched

try:
    from rich.console import Console, Group, RenderableType
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text
except ImportError:  # the extra "cluster" is not installed: plain lines
    HAS_RICH = False
else:
    HAS_RICH = True

NUM_EVENTS = 10
HEADINGS = ("process", "address", "state", "pid", "restarts")
COLOURS = {State.HEALTHY: "green", State.UNHEALTHY: "red", State.DEAD: "red", State.STARTING: "yellow"}
Row = tuple[str, str, str, str, str]


def rows_of(all_watched: Iterable[Watched], limit: int) -> list[Row]:
    """One a process; where that is more than `limit`, those that are alike in role and state are one."""
    watched = list(all_watched)
    if len(watched) <= limit:
        return [_row(one) for one in watched]
    groups: dict[tuple[str, State], list[Watched]] = {}
    for one in watched:
        groups.setdefault((one.process.role, one.state), []).append(one)
    return [_row(group[0]) if len(group) == 1 else _rows_as_one(group) for group in groups.values()]


def _row(one: Watched) -> Row:
    return one.process.name, one.process.address, one.state.value, str(one.pid or "-"), str(one.num_restarts)


def _rows_as_one(group: list[Watched]) -> Row:
    first, last = group[0].process, group[-1].process
    names = f"{first.name} … {last.name} ({len(group)})"
    restarts = sum(one.num_restarts for one in group)
    return names, f"{first.address} … {last.address}", group[0].state.value, "-", str(restarts)


def screen_for(title: str) -> Events:
    """Live on a terminal, plain lines otherwise."""
    if HAS_RICH and (console := Console()).is_terminal:
        return LiveScreen(title, console)
    return Screen()


if HAS_RICH:

    class LiveScreen:
        """`watch` gives it what to show; until then, events only. `close` leaves the last picture.

        Only a thread of its own writes: a terminal that is stopped (Ctrl-S) must not stop the watch over processes.
        """

        def __init__(self, title: str, console: Console) -> None:
            self._title = title
            self._console = console
            self._events: deque[str] = deque(maxlen=NUM_EVENTS)
            self._supervisor: Supervisor | None = None
            self._live = Live(console=console, get_renderable=self._picture, refresh_per_second=2)
            self._live.start()

        def watch(self, supervisor: Supervisor) -> None:
            self._supervisor = supervisor

        def event(self, text: str) -> None:
            self._events.append(f"{time.strftime('%H:%M:%S')} {text}")

        def change(self, watched: Watched, text: str, last_lines: Sequence[str]) -> None:
            self.event(f"{watched.process.name}: {text}")
            self._events.extend(f"    | {line[:LINE_LIMIT]}" for line in last_lines)

        def close(self) -> None:
            self._live.stop()

        def _picture(self) -> RenderableType:
            table = Table(*HEADINGS, title=self._title, title_justify="left", expand=False)
            watched = list(self._supervisor.watched.values()) if self._supervisor else []
            for row in rows_of(watched, max(4, self._console.height - NUM_EVENTS - 6)):
                colour = COLOURS.get(State(row[2]), "")
                table.add_row(*row[:2], Text(row[2], style=colour), *row[3:])
            awaited = self._awaited()
            waits = [Text(f"waits for {awaited}", style="yellow")] if awaited else []
            return Group(table, *waits, *(Text(event, no_wrap=True, overflow="ellipsis") for event in self._events))

        def _awaited(self) -> str:
            if self._supervisor is None:
                return ""
            names = [name for name, ready in self._supervisor.elsewhere.items() if not ready.is_set()]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return ", ".join(names[:3]) + more
