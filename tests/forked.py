"""Our commands as processes of their own, without the time in which Python imports what they need.

A command's imports cost more than all else it does in a test: torch and transformers 5 s of CPU, aiohttp 0.4 s. So one
server a command, kept for the whole test process, has imported them and forks. What it forks is as real as what `exec`
starts: its own process id, memory, descriptors and signals, the command's own `main`. That each command starts by
`exec` too is shown by its own tests of its command line, by `pd-cluster`'s and by the demonstration's.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "pd-engine": ("engine_adapter.torch_engine.cli", ("engine_adapter.torch_engine.server",)),
    "pd-sidecar": ("sidecar.cli", ("sidecar.daemon",)),
    "pd-proxy": ("proxy.cli", ("proxy.app",)),
    "bench.mock_engine": ("bench.mock_engine", ()),
}
"""By a command's name, or a module's behind `python -m`: what is run, and what else to import before."""
POLL_S = 0.005


def _loading(env: Mapping[str, str]) -> dict[str, str]:
    """What the dynamic linker reads once, as a process starts."""
    return {name: value for name, value in env.items() if name.startswith("LD_")}


LOADING = _loading(os.environ)
MOST_BYTES = 1 << 20


def popen(
    argv: Sequence[str],
    stdout: IO[Any] | int,
    stderr: IO[Any] | int,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[str] | Forked:
    """Start a command: forked where it is one of COMMANDS, else by `subprocess.Popen`."""
    name = argv[2] if len(argv) > 2 and argv[:2] == [sys.executable, "-m"] else Path(argv[0]).name
    name = {"sidecar.cli": "pd-sidecar", "engine_adapter.torch_engine.cli": "pd-engine"}.get(name, name)
    if name in COMMANDS and _loading(os.environ if env is None else env) == LOADING:
        return Forked(name, argv, stdout, stderr, cwd, env)
    return subprocess.Popen(argv, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL, cwd=cwd, env=env, text=True)


class Forked:
    """A process forked by the server of `name`; has what tests use of `subprocess.Popen`."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        stdout: IO[Any] | int,
        stderr: IO[Any] | int,
        cwd: Path,
        env: Mapping[str, str] | None,
    ) -> None:
        self.args = argv
        self.stdout: IO[str] | None = None
        self._server, self._status = _server(name, os.getpid()), None
        with contextlib.ExitStack() as stack:
            if stdout == subprocess.PIPE:
                read, write = os.pipe()
                self.stdout = os.fdopen(read)
                stack.callback(os.close, write)
            else:
                write = stdout if isinstance(stdout, int) else stdout.fileno()
            errors = write if stderr == subprocess.STDOUT else stderr if isinstance(stderr, int) else stderr.fileno()
            words = list(argv[3:] if argv[1:2] == ["-m"] else argv[1:])
            order = {"words": [str(argv[0]), *words], "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
            self.pid = self._server.ask(order, [write, errors])

    def poll(self) -> int | None:
        """Its exit status, minus the signal that ended it; None while it runs."""
        if self._status is None:
            self._status = self._server.ask({"poll": self.pid})
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Raise `subprocess.TimeoutExpired` where it still runs after `timeout` seconds."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
            time.sleep(POLL_S)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class _Server:
    """The process that has imported a command and forks it: one question at a time, one answer each."""

    def __init__(self, name: str) -> None:
        self._mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", name, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},  # read once, as torch is loaded
            )
        atexit.register(self._mine.close)

    def ask(self, question: dict[str, Any], descriptors: Sequence[int] = ()) -> Any:
        with self._lock:
            socket.send_fds(self._mine, [json.dumps(question).encode()], list(descriptors))
            answer = self._mine.recv(MOST_BYTES)
        if not answer:
            raise RuntimeError("the fork server is dead")
        return json.loads(answer)


@functools.cache
def _server(name: str, pid: int) -> _Server:
    return _Server(name)


def _serve(module: str, others: Sequence[str], server: socket.socket) -> None:
    """Fork on demand until the tests are done. Returns in each process forked, which is to be the command."""
    for one in (module, *others):
        importlib.import_module(one)
    gc.collect()
    gc.freeze()  # what is shared stays shared
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal's group; the tests end what they began
    ended: dict[int, int] = {}
    while message := (received := socket.recv_fds(server, MOST_BYTES, 2))[0]:
        question, descriptors, answer = json.loads(message), received[1], None
        if "poll" in question:
            pid, status = (0, 0) if question["poll"] in ended else os.waitpid(question["poll"], os.WNOHANG)
            if pid:
                ended[pid] = os.waitstatus_to_exitcode(status)
            answer = ended.get(question["poll"])
        elif not (answer := os.fork()):
            server.close()
            signal.signal(signal.SIGINT, interrupt)
            return _take_on(question, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        server.send(json.dumps(answer).encode())
    sys.exit()


def _take_on(order: dict[str, Any], descriptors: Sequence[int]) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, standard in zip((nothing, *descriptors), (0, 1, 2), strict=True):
        os.dup2(descriptor, standard)
    for descriptor in (nothing, *descriptors):
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.argv = order["words"]


def _run(command: str) -> NoReturn:
    """Run the command as `python -m` does. It ends without taking the interpreter apart, which libraries that were
    loaded before the fork do not always survive."""
    status: Any = 0
    try:
        del sys.modules[command]
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    command, before = COMMANDS[sys.argv[1]]
    _serve(command, before, socket.socket(fileno=int(sys.argv[2])))
    _run(command)
