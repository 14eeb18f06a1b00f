"""One child process: its own session, its log, its end. And the guard, which ends what a dead supervisor leaves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

TRAMPOLINE = Path(__file__).with_name("trampoline.py")
GUARD = Path(__file__).with_name("guard.py")
ISOLATED_PYTHON = (sys.executable, "-I", "-S")

LOG_LIMIT_BYTES = 64 * 1024**2
"""Over it a log is moved to `*.log.1` and begun anew: two logs a process at most."""
TAIL_BYTES = 16 * 1024


class Guard:
    """The process that outlives us; it learns of every process group, and removes `directory` at the end.

    A context: at its end the guard has done its last work and is gone.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process = subprocess.Popen(
            [*ISOLATED_PYTHON, str(GUARD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        self.remove_at_end(directory)

    @property
    def pid(self) -> int:
        return self._process.pid

    def began(self, group: int) -> None:
        self._tell(f"+{group}")

    def ended(self, group: int) -> None:
        self._tell(f"-{group}")

    def remove_at_end(self, path: Path) -> None:
        """A file that goes with the cluster; from the root, because the guard runs there."""
        self._tell(f"rm {path.absolute()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)  # where the guard was killed

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # killed: the children still die with us by PR_SET_PDEATHSIG
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()


class Child:
    """A running command. Its process group is its own, and ends with it."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], log_path: Path, guard: Guard) -> None:
        """Start it. Must be called on the supervisor's main thread: the child dies with the thread that forks it."""
        self._guard = guard
        self.log = ChildLog(log_path, argv)
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*ISOLATED_PYTHON, str(TRAMPOLINE), str(os.getpid()), *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
            )
        guard.began(self._process.pid)
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pidfd = os.pidfd_open(self._process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Its exit status once it ended, as subprocess gives it: negative for a signal."""
        return await asyncio.shield(self._ended)

    def terminate(self) -> None:
        if not self._ended.done():
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """The whole group, at once."""
        if not self._ended.done():
            self._kill_group()

    async def stop(self, timeout_s: float) -> bool:
        """SIGTERM, and SIGKILL for the group after `timeout_s`. True if it ended by itself."""
        self.terminate()
        try:
            await asyncio.wait_for(self.wait(), timeout_s)
        except TimeoutError:
            self.kill()
            await self.wait()
            return False
        return True

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._kill_group()  # before the wait: until then nobody else can have its number
        self._ended.set_result(self._process.wait())
        self._guard.ended(self._process.pid)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


class ChildLog:
    """What a process wrote since it was last started."""

    def __init__(self, path: Path, argv: Sequence[str]) -> None:
        self.path = path
        with path.open("ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(argv)}\n".encode())
            self._start = log.tell()

    def last_lines(self, num: int) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            start = self._start if self._start <= size else 0
            log.seek(max(start, size - TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()[-num:]

    def keep_within(self, limit_bytes: int = LOG_LIMIT_BYTES) -> None:
        """Move it away when it is too long. The writer appends (O_APPEND), so it goes on at the new end."""
        if self.path.exists() and self.path.stat().st_size > limit_bytes:
            shutil.copyfile(self.path, self.path.with_name(self.path.name + ".1"))
            os.truncate(self.path, 0)
            self._start = 0
