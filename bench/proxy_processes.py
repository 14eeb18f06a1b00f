"""Processes of a proxy benchmark: the mock engines, the proxy under test, its rivals; and what they cost.

A process is pinned to a core (`taskset`), is waited for until it serves, and is ended by its own pid.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

HOST = "127.0.0.1"
START_TIMEOUT_S = 40.0
STOP_TIMEOUT_S = 10.0
NS = 1e-9
PROBE = b'{"model":"mock","prompt":"probe","max_tokens":2}'

HAPROXY = """global
  maxconn 8192
  nbthread 1
defaults
  mode http
  option http-keep-alive
  option http-no-delay
  timeout connect 10s
  timeout client 120s
  timeout server 120s
frontend in
  bind {host}:{port} backlog 4096
  default_backend engines
backend engines
  balance roundrobin
{servers}
"""


@dataclass(frozen=True)
class Engines:
    """A running `bench.mock_engine`."""

    pid: int
    control_port: int
    prefill_ports: tuple[int, ...]
    decode_ports: tuple[int, ...]


@dataclass(frozen=True)
class Proxy:
    """A running proxy: its name, pid and port."""

    name: str
    pid: int
    port: int

    def cpu_s(self) -> float:
        """CPU seconds used so far, user and system, over all threads and children, to the nanosecond of /proc."""
        return sum(_cpu_s(process.pid) for process in self._processes())

    def rss_bytes(self) -> int:
        return int(sum(process.memory_info().rss for process in self._processes()))

    def _processes(self) -> list[psutil.Process]:
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]


def _cpu_s(pid: int) -> float:
    try:
        threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) * NS
    except (OSError, ValueError, IndexError):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def pinned(command: Sequence[str], core: int | None) -> list[str]:
    return list(command) if core is None or shutil.which("taskset") is None else ["taskset", "-c", str(core), *command]


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process, with both outputs in `log`; ended by SIGTERM and, after STOP_TIMEOUT_S, SIGKILL."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def engines(num_prefill: int, num_decode: int, core: int | None, *flags: str) -> Iterator[Engines]:
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        log = Path(folder) / "engines.log"
        ports = ["--prefill-ports", *["0"] * num_prefill, "--decode-ports", *["0"] * num_decode]
        command = [sys.executable, "-m", "bench.mock_engine", *ports, *flags]
        with running(pinned(command, core), log) as process:
            line = _wait_for_line(log, "ready ", process)
            found = dict(part.split("=") for part in line.split()[1:])
            prefill, decode = (tuple(map(int, found[role].split(","))) for role in ("prefill", "decode"))
            yield Engines(process.pid, int(found["control"]), prefill, decode)


def _wait_for_line(log: Path, start: str, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith(start):
                return line
        time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} did not get ready:\n{log.read_text()}")


@contextlib.contextmanager
def proxy(name: str, command: Sequence[str], port: int, core: int | None, **environment: str) -> Iterator[Proxy]:
    """The proxy, once a completion through it succeeds."""
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        log = Path(folder) / "proxy.log"
        with running(pinned(command, core), log, **environment) as process:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{name} does not serve: {command}\n{log.read_text()[-3000:]}")
                time.sleep(0.1)
            yield Proxy(name, process.pid, port)


def _answers(port: int) -> bool:
    request = urllib.request.Request(
        f"http://{HOST}:{port}/v1/completions", PROBE, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def pd_proxy_command(executable: str, port: int, served: Engines, *flags: str) -> list[str]:
    command = [executable, "--host", HOST, "--port", str(port)]
    for role, ports in (("prefiller", served.prefill_ports), ("decoder", served.decode_ports)):
        command += [f"--{role}-hosts", *[HOST] * len(ports), f"--{role}-ports", *map(str, ports)]
    return [*command, *flags]


def vllm_router_command(executable: str, port: int, served: Engines) -> list[str]:
    command = [executable, "--host", HOST, "--port", str(port), "--vllm-pd-disaggregation", "--policy", "round_robin"]
    for one in served.prefill_ports:
        command += ["--prefill", f"http://{HOST}:{one}"]
    for one in served.decode_ports:
        command += ["--decode", f"http://{HOST}:{one}"]
    command += ["--kv-connector", "nixl", "--log-level", "error", "--prometheus-port", str(free_port())]
    return [*command, "--max-concurrent-requests", "8192", "--disable-circuit-breaker", "--disable-retries"]


def ascend_example_command(python: str, example: Path, port: int, served: Engines) -> list[str]:
    """The example proxy that pd-proxy replaces; it takes the same flags."""
    return [python, *pd_proxy_command(str(example), port, served, "--log-level", "ERROR")]


def bare_relay_command(port: int, served: Engines, folder: Path) -> list[str]:
    """A relay in C that parses nothing, in front of the decoders alone: what the kernel takes for one leg."""
    source, executable = Path(__file__).with_name("bare_relay.c"), folder / "bare_relay"
    subprocess.run(["cc", "-O2", "-o", str(executable), str(source)], check=True)
    return [str(executable), str(port), *map(str, served.decode_ports)]


def haproxy_command(executable: str, port: int, served: Engines, folder: Path) -> list[str]:
    """HAProxy in front of the decoders alone: one leg, the floor of what relaying costs."""
    servers = "\n".join(f"  server d{one} {HOST}:{one} maxconn 8192" for one in served.decode_ports)
    config = folder / "haproxy.cfg"
    config.write_text(HAPROXY.format(host=HOST, port=port, servers=servers))
    return [executable, "-f", str(config), "-db"]
