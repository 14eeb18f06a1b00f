from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from engine_adapter.cluster import machine
from engine_adapter.cluster.backoff import Backoff
from engine_adapter.cluster.child import Guard
from engine_adapter.cluster.config import load
from engine_adapter.cluster.errors import StartFailed
from engine_adapter.cluster.supervisor import Pace, State, Supervisor, Watched, cause
from engine_adapter.cluster.up import deployment
from tests.unit.cluster.conftest import Bench, is_alive, wait_for

QUICK = Pace(starting_s=0.02, healthy_s=0.05, timeout_s=5.0)
IMPATIENT = Pace(starting_s=0.02, healthy_s=0.05, timeout_s=0.3)
NAMES = ["prefill-0.sidecar", "decode-0.sidecar", "prefill-0", "decode-0", "proxy"]


class Stage:
    """A supervisor over stand-ins, and all it reported."""

    def __init__(self, bench: Bench, guard: Guard, start_timeout_s: float = 20.0, pace: Pace = QUICK) -> None:
        here = deployment(load(bench.file), bench.directory / ".baton")
        here.run_dir.mkdir(parents=True)
        self.bench = bench
        self.reports: list[tuple[str, State, str, list[str]]] = []
        self.changed = asyncio.Event()
        self.supervisor = Supervisor(
            here.plan,
            run_dir=here.run_dir,
            guard=guard,
            env=machine.environment(),
            report=self._report,
            start_timeout_s=start_timeout_s,
            stop_timeout_s=2.0,
            pace=pace,
            backoff=lambda: Backoff(first_s=0.05, max_s=0.2),
        )

    def _report(self, watched: Watched, text: str, last_lines: list[str]) -> None:
        self.reports.append((watched.process.name, watched.state, text, last_lines))
        self.changed.set()

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(15):
            while not holds():
                self.changed.clear()
                await self.changed.wait()

    def pids(self) -> dict[str, int]:
        return {name: watched.pid or 0 for name, watched in self.supervisor.watched.items()}

    def of(self, name: str) -> Watched:
        return self.supervisor.watched[name]

    def states(self, name: str) -> list[State]:
        return [state for who, state, _, _ in self.reports if who == name]


@pytest.fixture
async def stage(bench: Bench) -> AsyncIterator[Callable[..., Stage]]:
    stages: list[Stage] = []
    socket_dir = deployment(load(bench.file), bench.directory / ".baton").socket_dir
    machine.make_private(socket_dir)
    with Guard(socket_dir) as guard:

        def make(**kwargs: Any) -> Stage:
            stages.append(Stage(bench, guard, **kwargs))
            return stages[-1]

        yield make
        for made in stages:
            await made.supervisor.stop()
    assert not [pid for _, _, pid in bench.events() if is_alive(pid)]


async def test_sidecars_before_engines_before_the_proxy_and_back_in_order(stage: Callable[..., Stage]) -> None:
    cluster = stage()
    await cluster.supervisor.start()
    assert all(watched.state is State.HEALTHY for watched in cluster.supervisor.watched.values())
    await cluster.supervisor.stop()
    begun = [name for event, name, _ in cluster.bench.events() if event == "begin"]
    ended = [name for event, name, _ in cluster.bench.events() if event == "end"]
    for engine in ("prefill-0", "decode-0"):
        assert begun.index(f"{engine}.sidecar") < begun.index(engine) < begun.index("proxy")
        assert ended.index("proxy") < ended.index(engine) < ended.index("prefill-0.sidecar")
    assert sorted(begun) == sorted(ended) == sorted(NAMES)
    assert all(watched.pid is None for watched in cluster.supervisor.watched.values())


async def test_an_engine_starts_only_when_its_own_sidecar_is_well(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_SICK", "decode-0.sidecar")
    cluster = stage()
    starting = asyncio.create_task(cluster.supervisor.start())
    await cluster.until(lambda: State.HEALTHY in cluster.states("prefill-0"))
    assert cluster.states("decode-0") == cluster.states("proxy") == []
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting


async def test_a_killed_process_is_reported_and_comes_back_and_no_other_is_touched(stage: Callable[..., Stage]) -> None:
    cluster = stage()
    await cluster.supervisor.start()
    for name in NAMES:
        before = cluster.pids()
        os.kill(before[name], signal.SIGKILL)
        await cluster.until(lambda name=name: cluster.states(name)[-3:] == [State.DEAD, State.STARTING, State.HEALTHY])
        (text, lines) = next(
            (text, lines) for who, state, text, lines in cluster.reports if (who, state) == (name, State.DEAD)
        )
        assert text == "died of SIGKILL; starts again in 0.05 s"
        assert lines == [f"ready {name}"]
        assert cluster.of(name).num_restarts == 1
        assert {who for who, pid in cluster.pids().items() if pid != before[who]} == {name}


async def test_the_delay_grows_with_every_death(stage: Callable[..., Stage]) -> None:
    cluster = stage()
    await cluster.supervisor.start()
    for num_restarts in (1, 2, 3, 4):
        pid = cluster.of("decode-0").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await cluster.until(
            lambda n=num_restarts: (
                cluster.of("decode-0").num_restarts == n and cluster.of("decode-0").state is State.HEALTHY
            )
        )
    delays = [text.split()[-2] for _, state, text, _ in cluster.reports if state is State.DEAD]
    assert delays == ["0.05", "0.1", "0.2", "0.2"]


async def test_a_process_that_never_gets_well_ends_the_start_with_its_last_lines(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_DIE_AT_ONCE", "prefill-0")
    cluster = stage()
    with pytest.raises(StartFailed, match=r"prefill-0 did not start; its log: .*prefill-0\.log"):
        await cluster.supervisor.start()
    deaths = [(text, lines) for who, state, text, lines in cluster.reports if state is State.DEAD]
    assert [lines for _, lines in deaths] == [["one", "two", "the reason"]] * 3
    assert deaths[-1][0] == "died with status 3 before it was ready"


@pytest.mark.parametrize("status", ["1", "2"])
async def test_a_command_that_says_it_cannot_run_is_not_tried_again(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    monkeypatch.setenv("STAND_IN_DIE_AT_ONCE", "proxy")
    monkeypatch.setenv("STAND_IN_STATUS", status)
    cluster = stage()
    with pytest.raises(StartFailed, match="proxy did not start"):
        await cluster.supervisor.start()
    assert cluster.states("proxy") == [State.STARTING, State.DEAD]


async def test_a_process_that_is_not_well_in_time_is_killed(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_SICK", "decode-0")
    cluster = stage(start_timeout_s=4.0)
    with pytest.raises(StartFailed, match="decode-0 did not start"):
        await cluster.supervisor.start()
    assert cluster.reports[-1][2] == "was not healthy in time and was killed before it was ready"


async def test_a_process_deaf_to_sigterm_is_killed_at_its_deadline(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_DEAF", "decode-0")
    cluster = stage()
    await cluster.supervisor.start()
    pid = cluster.of("decode-0").pid
    await cluster.supervisor.stop()
    assert pid is not None
    assert not is_alive(pid)
    texts = {who: text for who, state, text, _ in cluster.reports if state is State.STOPPED}
    assert texts["decode-0"] == "did not stop within 2 s and was killed"
    assert texts["prefill-0"] == "stopped"


async def test_what_a_process_started_itself_ends_with_it(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_CHILD", "proxy")
    cluster = stage()
    await cluster.supervisor.start()
    grandchild, proxy = cluster.bench.pids("child")["proxy"], cluster.of("proxy").pid
    assert proxy is not None
    assert is_alive(grandchild)
    os.kill(proxy, signal.SIGKILL)
    await cluster.until(lambda: State.DEAD in cluster.states("proxy"))
    wait_for(lambda: not is_alive(grandchild), "the proxy's own child is gone")


async def test_a_sick_process_is_reported_and_left_alone_until_it_is_well(stage: Callable[..., Stage]) -> None:
    cluster = stage(pace=IMPATIENT)
    await cluster.supervisor.start()
    pid = cluster.of("prefill-0").pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        await cluster.until(lambda: cluster.of("prefill-0").state is State.UNHEALTHY)
    finally:
        os.kill(pid, signal.SIGCONT)
    await cluster.until(lambda: cluster.of("prefill-0").state is State.HEALTHY)
    assert cluster.of("prefill-0").pid == pid


async def test_a_watch_that_fails_is_not_silent(stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = stage()
    await cluster.supervisor.start()

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("engine_adapter.cluster.child.ChildLog.__init__", full_disk)
    pid = cluster.of("decode-0").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(OSError, match="no space left"):
        async with asyncio.timeout(15):
            await cluster.supervisor.watch()


def test_a_status_in_words() -> None:
    assert cause(0) == "died with status 0"
    assert cause(-9) == "died of SIGKILL"
    assert cause(-250) == "died of signal 250"
