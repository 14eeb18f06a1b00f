"""`--sidecar auto`: the engine starts a sidecar of its own and keeps it alive.

The sidecar is a child that dies with its engine: it watches its standard input (`--exit-on-stdin-eof`), whose other
end only the engine holds, so that not even `kill -9` of the engine leaves it behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 20.0
"""Importing Mooncake and binding ports takes one to three seconds on a busy machine."""
RESTART_DELAYS_S = (0.1, 0.5, 1.0, 2.0, 5.0)
STOP_TIMEOUT_S = 5.0


class SidecarStartError(Exception):
    """The sidecar did not come up; the message ends with its own last line."""


@dataclass(frozen=True, slots=True)
class SidecarCommand:
    """What the child is started with; ports of 0 are chosen by the sidecar and kept for its restarts."""

    engine_id: str
    listen: str = "127.0.0.1:0"
    transport: str = "auto"
    metrics_port: int = 0
    rank: int = 0
    log_level: str = "INFO"
    more: tuple[str, ...] = ()
    """Further flags, as words."""

    def argv(self, socket_path: str) -> list[str]:
        return [
            sys.executable, "-m", "sidecar.cli", "--socket", socket_path, "--listen", self.listen,
            "--engine-id", self.engine_id, "--rank", str(self.rank), "--transport", self.transport,
            "--metrics-port", str(self.metrics_port), "--log-level", self.log_level, "--exit-on-stdin-eof",
            "--remove-directory", *self.more,
        ]  # fmt: skip


class OwnSidecar:
    """A supervised child `pd-sidecar` on a private socket; `socket_path` is where the engine's client connects."""

    def __init__(self, command: SidecarCommand, socket_path: str = "", *, on_any_cpu: bool = False) -> None:
        """`socket_path` is made up where empty. `on_any_cpu` for a caller that is pinned to cores of its own."""
        self._command = command
        self._on_any_cpu = on_any_cpu
        self._directory = tempfile.TemporaryDirectory(prefix="baton-sidecar-")
        self.socket_path = socket_path or str(Path(self._directory.name) / "sidecar.sock")
        self._process: subprocess.Popen[str] | None = None
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="own-sidecar", daemon=True)

    @property
    def pid(self) -> int | None:
        """Of the child that runs now."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the child and wait for its ready line. Raises SidecarStartError."""
        self._process = self._spawn()
        self._watcher.start()

    def stop(self) -> None:
        """End the child by closing its standard input, then by signal, and remove its directory. Idempotent."""
        self._stopping.set()
        self._end(self._process)
        if self._watcher.is_alive():
            self._watcher.join(READY_TIMEOUT_S)
        self._end(self._process)  # the watcher may just have started another one
        self._directory.cleanup()

    @staticmethod
    def _end(process: subprocess.Popen[str] | None) -> None:
        if process is None:
            return
        if process.stdin:
            process.stdin.close()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()

    def _spawn(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self._command.argv(self.socket_path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        if self._on_any_cpu:
            with contextlib.suppress(OSError):  # it may be dead already, which the next lines find out
                os.sched_setaffinity(process.pid, range(os.cpu_count() or 1))
        timer = threading.Timer(READY_TIMEOUT_S, process.kill)
        timer.start()
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        timer.cancel()
        if not line.startswith("ready"):
            process.kill()
            code = process.wait()
            self._end(process)
            raise SidecarStartError(
                f"pd-sidecar ended with {code} before it was ready: {line or 'see its last lines above'}"
            )
        logger.info("own_sidecar_ready pid=%d %s", process.pid, line.removeprefix("ready "))
        return process

    def _watch(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            process = self._process
            assert process is not None
            code = process.wait()
            if self._stopping.is_set():
                return
            logger.error("own_sidecar_died pid=%d code=%s", process.pid, code)
            self._end(process)
            if self._stopping.wait(RESTART_DELAYS_S[min(failures, len(RESTART_DELAYS_S) - 1)]):
                return
            try:
                self._process = self._spawn()
                failures = 0
            except SidecarStartError as error:
                logger.error("own_sidecar_start_failed error=%s", error)
                failures += 1
