"""Starts the processes of a plan, watches them, starts the dead ones again, and stops all in order.

    waiting -> starting -> healthy <-> unhealthy        each of them -> dead -> (delay) waiting
    any -> stopping -> stopped

A process that dies, or stays unwell, before it was healthy once makes `start` fail: its command is wrong, and more
of the same won't help. Later deaths are answered by a restart with back-off, for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from engine_adapter.cluster.backoff import Backoff
from engine_adapter.cluster.child import Child, Guard
from engine_adapter.cluster.errors import StartFailed
from engine_adapter.cluster.plan import Plan, PlannedProcess
from engine_adapter.cluster.readiness import answers

NUM_LAST_LINES = 15
NUM_START_ATTEMPTS = 3
"""Of a process that was never healthy and did not end by its own judgement (`FINAL`)."""
OVERDUE = "was not healthy in time and was killed"
FINAL = (OVERDUE, "died with status 1", "died with status 2")
"""Ends that another attempt won't change: 1: our commands cannot run here and said why; 2: unknown flags."""


class State(enum.StrEnum):
    WAITING = "waiting"
    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    DEAD = "dead"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between looks, and how many failed looks make a healthy process unhealthy."""

    starting_s: float = 0.1
    healthy_s: float = 1.0
    elsewhere_s: float = 1.0
    timeout_s: float = 5.0
    num_failures: int = 3


@dataclass(slots=True)
class Watched:
    """A planned process as it is now."""

    process: PlannedProcess
    backoff: Backoff
    state: State = State.WAITING
    child: Child | None = None
    num_restarts: int = 0
    healthy_since: float | None = None
    """Loop time its present health began."""
    was_healthy: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once, at its first health."""
    is_healthy: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int | None:
        return self.child.pid if self.child and self.state not in (State.DEAD, State.STOPPED) else None


Report = Callable[[Watched, str, list[str]], None]
"""Called at every change with the process, one line about it, and its last log lines when it died."""


class Supervisor:
    """`start`, then `watch` as long as it pleases, then `stop`; `stop` is right at any time."""

    def __init__(
        self,
        plan: Plan,
        *,
        run_dir: Path,
        guard: Guard,
        env: Mapping[str, str],
        report: Report,
        start_timeout_s: float,
        stop_timeout_s: float,
        elsewhere: Mapping[str, str] | None = None,
        pace: Pace | None = None,
        backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self.watched = {process.name: Watched(process, backoff()) for process in plan.processes}
        self.elsewhere = {name: asyncio.Event() for name in elsewhere or {}}
        """Of what runs on other nodes: set when it was first seen to be ready."""
        self._ready_urls = dict(elsewhere or {})
        self._plan = plan
        self._run_dir = run_dir
        self._env = env
        self._report = report
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._pace = pace or Pace()
        self._guard = guard
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._looks: list[asyncio.Task[None]] = []
        self._http: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Start everything, in order; return when all are healthy. Raises StartFailed; call `stop` then, too.

        What runs elsewhere is waited for without a limit, by whom it comes after.
        """
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._pace.timeout_s))
        self._looks = [asyncio.create_task(self._look_elsewhere(name)) for name in self.elsewhere]
        for watched in self.watched.values():
            self._log_path(watched.process).unlink(missing_ok=True)
            self._keepers[watched.process.name] = asyncio.create_task(self._keep(watched), name=watched.process.name)
        ready = asyncio.create_task(self._all_were_healthy())
        try:
            await asyncio.wait([ready, *self._keepers.values()], return_when=asyncio.FIRST_COMPLETED)
            self._raise_failure()
        finally:
            ready.cancel()

    async def watch(self) -> None:
        """Runs for ever; raises what made the watch over a process fail, a full disk for its log, say."""
        await asyncio.wait(self._keepers.values(), return_when=asyncio.FIRST_EXCEPTION)
        self._raise_failure()

    async def stop(self) -> None:
        """Proxy, engines, sidecars: each is asked, and killed at its deadline. Then nothing is left."""
        tasks = [*self._keepers.values(), *self._looks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stage in self._plan.stop_stages():
            await asyncio.gather(*(self._stop_one(self.watched[process.name]) for process in stage))
        if self._http is not None:
            await self._http.close()

    def kill(self) -> None:
        """All at once; `stop`, running or called later, finds them dead."""
        for watched in self.watched.values():
            if watched.child:
                watched.child.kill()

    async def _all_were_healthy(self) -> None:
        for watched in self.watched.values():
            await watched.was_healthy.wait()

    def _raise_failure(self) -> None:
        for keeper in self._keepers.values():
            if keeper.done():
                keeper.result()

    async def _stop_one(self, watched: Watched) -> None:
        child = watched.child
        if child is None or watched.state is State.DEAD:
            watched.state = State.STOPPED
            return
        self._change(watched, State.STOPPING, "is asked to stop")
        if await child.stop(self._stop_timeout_s):
            self._change(watched, State.STOPPED, "stopped")
        else:
            self._change(watched, State.STOPPED, f"did not stop within {self._stop_timeout_s:g} s and was killed")

    async def _keep(self, watched: Watched) -> None:
        """The life of a process: until it is cancelled, or failed in too many attempts to be healthy once."""
        for name in watched.process.after:
            await (self.elsewhere.get(name) or self.watched[name].was_healthy).wait()
        while True:
            for name in watched.process.needs:
                await self.watched[name].is_healthy.wait()
            how = await self._live_once(watched)
            assert watched.child is not None
            lines = watched.child.log.last_lines(NUM_LAST_LINES)
            delay_s = watched.backoff.died(asyncio.get_running_loop().time(), watched.healthy_since)
            self._lose_health(watched)
            if not watched.was_healthy.is_set() and (how in FINAL or watched.backoff.num_deaths >= NUM_START_ATTEMPTS):
                self._change(watched, State.DEAD, f"{how} before it was ready", lines)
                raise StartFailed(f"{watched.process.name} did not start; its log: {watched.child.log.path}")
            self._change(watched, State.DEAD, f"{how}; starts again in {delay_s:g} s", lines)
            await asyncio.sleep(delay_s)
            watched.num_restarts += 1

    async def _live_once(self, watched: Watched) -> str:
        """Start it and watch it until it ends; in words how it ended."""
        process = watched.process
        child = Child(process.argv, {**self._env, **process.env}, self._log_path(process), self._guard)
        watched.child = child
        self._change(watched, State.STARTING, "starts" if not watched.num_restarts else "starts again")
        overdue = asyncio.create_task(self._watch_health(watched, child))
        try:
            status = await child.wait()
        finally:
            overdue.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await overdue
        return OVERDUE if overdue.done() and not overdue.cancelled() else cause(status)

    async def _watch_health(self, watched: Watched, child: Child) -> None:
        """Look at its health for ever; return, with the child killed, if it took too long to become healthy."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._start_timeout_s
        num_failures = 0
        while watched.healthy_since is not None or watched.state is State.UNHEALTHY or loop.time() < deadline:
            well = await self._looks_well(watched.process)
            num_failures = 0 if well else num_failures + 1
            if well and watched.state is not State.HEALTHY:
                watched.healthy_since = loop.time()
                watched.was_healthy.set()
                watched.is_healthy.set()
                self._change(watched, State.HEALTHY, "healthy")
            elif watched.state is State.HEALTHY and num_failures >= self._pace.num_failures:
                self._lose_health(watched)
                self._change(watched, State.UNHEALTHY, "unhealthy: " + watched.process.health_url)
            starting = watched.state is State.STARTING
            await asyncio.sleep(self._pace.starting_s if starting else self._pace.healthy_s)
            child.log.keep_within()
        child.kill()

    async def _looks_well(self, process: PlannedProcess) -> bool:
        assert self._http is not None
        return await answers(self._http, process.health_url, self._pace.timeout_s)

    async def _look_elsewhere(self, name: str) -> None:
        assert self._http is not None
        while not self.elsewhere[name].is_set():
            if await answers(self._http, self._ready_urls[name], self._pace.timeout_s):
                self.elsewhere[name].set()
            await asyncio.sleep(self._pace.elsewhere_s)

    def _lose_health(self, watched: Watched) -> None:
        watched.healthy_since = None
        watched.is_healthy.clear()

    def _change(self, watched: Watched, state: State, line: str, last_lines: list[str] | None = None) -> None:
        watched.state = state
        self._report(watched, line, last_lines or [])

    def _log_path(self, process: PlannedProcess) -> Path:
        return self._run_dir / f"{process.name}.log"


def cause(status: int) -> str:
    """An exit status in words; negative for a signal, as subprocess has it."""
    if status >= 0:
        return f"died with status {status}"
    try:
        return f"died of {signal.Signals(-status).name}"
    except ValueError:
        return f"died of signal {-status}"
