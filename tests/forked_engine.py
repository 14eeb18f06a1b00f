"""`pd-engine` as a process of its own, without the seconds in which torch and transformers are imported.

One server a test process has imported them, and forks: the process is as real as one by exec (its own id, memory and
signals) and runs the same `main`. What starts by exec is shown by `pd-cluster`'s tests, the demonstration and the
command's own.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path


def _run(argv: Sequence[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    gc.freeze()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = list(argv)
    from engine_adapter.torch_engine.cli import main

    sys.exit(main())


@functools.cache
def _server() -> ForkServerContext:
    os.environ["OMP_NUM_THREADS"] = "1"  # read once, as torch is loaded
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engine_adapter.torch_engine.server"])
    return context


class ForkedEngine:
    """What a test uses of `subprocess.Popen`."""

    def __init__(self, argv: Sequence[str], log: Path) -> None:
        self._process = _server().Process(target=_run, args=(tuple(argv), str(log)), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.args = argv
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit status, minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Raise `subprocess.TimeoutExpired` where it still runs after `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)
