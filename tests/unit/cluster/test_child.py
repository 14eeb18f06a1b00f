from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_adapter.cluster.child import GUARD, ISOLATED_PYTHON, Child, ChildLog, Guard
from tests.unit.cluster.conftest import is_alive, own_children, wait_for

PRINT_AND_SLEEP = 'import time; print("up", flush=True); time.sleep(60)'
DEAF = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print("up", flush=True); time.sleep(60)'


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    with Guard(tmp_path / "sockets") as guard:
        yield guard


def python(code: str, path: Path, guard: Guard) -> Child:
    return Child([sys.executable, "-c", code], os.environ, path / "a.log", guard)


def ignores(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line.split()[1] for line in lines if line.startswith("SigIgn"))
    return bool(int(mask, 16) & 1 << (number - 1))


async def up(child: Child) -> None:
    async with asyncio.timeout(10):
        while "up" not in child.log.last_lines(1):  # noqa: ASYNC110 it is another process that writes
            await asyncio.sleep(0.01)


async def test_a_child_leads_a_session_of_its_own_and_ends_when_asked(tmp_path: Path, guard: Guard) -> None:
    child = python(PRINT_AND_SLEEP, tmp_path, guard)
    await up(child)
    assert os.getsid(child.pid) == os.getpgid(child.pid) == child.pid
    assert await child.stop(timeout_s=10)
    assert await child.wait() == -signal.SIGTERM
    assert not is_alive(child.pid)


async def test_a_deaf_child_is_killed_at_the_deadline(tmp_path: Path, guard: Guard) -> None:
    child = python(DEAF, tmp_path, guard)
    await up(child)
    assert not await child.stop(timeout_s=0.1)
    assert await child.wait() == -signal.SIGKILL


async def test_its_status_is_its_own(tmp_path: Path, guard: Guard) -> None:
    assert await python("raise SystemExit(7)", tmp_path, guard).wait() == 7


async def test_an_ended_child_is_signalled_no_more(tmp_path: Path, guard: Guard) -> None:
    child = python("", tmp_path, guard)
    await child.wait()
    child.terminate()
    child.kill()
    assert await child.stop(timeout_s=1)


async def test_a_command_that_does_not_exist_says_so_in_its_log(tmp_path: Path, guard: Guard) -> None:
    child = Child(["no-such-command"], os.environ, tmp_path / "a.log", guard)
    assert await child.wait() == 127
    assert child.log.last_lines(1) == ["no-such-command: no such command on PATH"]


def test_a_trampoline_whose_supervisor_is_gone_does_not_start_the_command(tmp_path: Path) -> None:
    trampoline = GUARD.with_name("trampoline.py")
    touch = tmp_path / "touched"
    gone = subprocess.run([*ISOLATED_PYTHON, str(trampoline), "1", "touch", str(touch)], check=False)
    assert gone.returncode != 0
    assert not touch.exists()


def test_the_last_lines_are_those_of_this_start(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("of the one before\n")
    log = ChildLog(path, ["command"])
    assert log.last_lines(5) == []
    with path.open("a") as file:
        file.write("".join(f"{i}\n" for i in range(10)))
    assert log.last_lines(3) == ["7", "8", "9"]
    assert "command" in path.read_text()


def test_a_long_log_is_moved_away_and_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    log = ChildLog(path, ["command"])
    with path.open("ab") as writer:
        writer.write(b"x" * 100 + b"\n")
        writer.flush()
        log.keep_within(10_000)
        assert not (tmp_path / "a.log.1").exists()
        log.keep_within(100)
        writer.write(b"after\n")
    assert path.read_bytes() == b"after\n"
    assert (tmp_path / "a.log.1").read_bytes().endswith(b"x\n")
    assert log.last_lines(5) == ["after"]


def test_a_removed_log_is_no_reason_to_fail(tmp_path: Path) -> None:
    log = ChildLog(tmp_path / "a.log", ["command"])
    log.path.unlink()
    log.keep_within(1)
    assert log.last_lines(5) == []


def test_the_guard_ends_groups_and_removes_the_directory(tmp_path: Path) -> None:
    directory = tmp_path / "sockets"
    directory.mkdir()
    (directory / "a.sock").touch()
    left = subprocess.Popen([sys.executable, "-c", DEAF], start_new_session=True, stdout=subprocess.DEVNULL)
    spared = subprocess.Popen([sys.executable, "-c", DEAF], start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        with Guard(directory) as guard:
            guard.began(left.pid)
            guard.began(spared.pid)
            guard.ended(spared.pid)
            wait_for(lambda: ignores(guard.pid, signal.SIGTERM), "the guard is up")
            os.kill(guard.pid, signal.SIGTERM)  # does not impress it
        assert left.wait(10) == -signal.SIGKILL
        assert spared.poll() is None
        assert not directory.exists()
    finally:
        spared.kill()
        spared.wait()


def test_a_killed_guard_leaves_no_directory_either(tmp_path: Path) -> None:
    directory = tmp_path / "sockets"
    directory.mkdir()
    with Guard(directory) as guard:
        os.kill(guard.pid, signal.SIGKILL)
        wait_for(lambda: not is_alive(guard.pid), "the guard dies")
        guard.began(2**22 + 1)
    assert not directory.exists()


@pytest.mark.parametrize("kill_guard_first", [False, True])
def test_nothing_survives_a_supervisor_killed_by_9(tmp_path: Path, kill_guard_first: bool) -> None:
    """With the guard killed before, the kernel still ends the children; their own children need the guard."""
    (tmp_path / "sockets").mkdir()
    supervisor = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SUPERVISOR), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert supervisor.stdout is not None
        child, guard, grandchild = map(int, supervisor.stdout.readline().split())
        if kill_guard_first:
            os.kill(guard, signal.SIGKILL)
        supervisor.kill()
        supervisor.wait()
        supervisor.stdout.close()
        wait_for(lambda: not is_alive(child), "the child is gone", 5)
        if not kill_guard_first:
            wait_for(lambda: not is_alive(grandchild), "its own child is gone", 5)
            wait_for(lambda: not is_alive(guard), "the guard is gone", 5)
            assert not (tmp_path / "sockets").exists()
        elif is_alive(grandchild):
            os.kill(grandchild, signal.SIGKILL)
    finally:
        if supervisor.poll() is None:
            supervisor.kill()
            supervisor.wait()


SUPERVISOR = """
    import asyncio, os, pathlib, sys
    from engine_adapter.cluster.child import Child, Guard

    PARENT = '''
    import subprocess, sys, signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("up", subprocess.Popen(["sleep", "60"]).pid, flush=True)
    time.sleep(60)
    '''

    async def main():
        path = pathlib.Path(sys.argv[1])
        guard = Guard(path / "sockets")
        code = "\\n".join(line.strip() for line in PARENT.splitlines())
        child = Child([sys.executable, "-c", code], os.environ, path / "a.log", guard)
        while not child.log.last_lines(1):
            await asyncio.sleep(0.01)
        print(child.pid, guard.pid, child.log.last_lines(1)[0].split()[1], flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
"""


def test_own_children_sees_a_child() -> None:
    """What the other tests look for left-overs with."""
    with subprocess.Popen(["sleep", "60"]) as child:
        assert child.pid in own_children()
        child.kill()
