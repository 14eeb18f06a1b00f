"""A split deployment out of real processes on loopback: prefillers, decoders, a sidecar beside each, a proxy.

Every command runs as a user would start it, but forked (`tests/forked.py`). `Command.kill9` and `Command.start` kill
one of them and restart it at the same ports; `Deployment.left_over` says what is left anywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.forked import Forked, popen
from tests.ports import free_port

BIN = Path(sys.executable).parent
ANSWER_TIMEOUT_S = 30.0
START_TIMEOUT_S = 300.0
"""An engine imports for seconds on a quiet machine, and for minutes on a busy one."""


def get_json(url: str, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
    with urllib.request.urlopen(url, timeout=timeout_s) as answer:
        return json.load(answer)


def metric(url: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples (name as exposed) that carry `labels`."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=ANSWER_TIMEOUT_S) as answer:
        text = answer.read().decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def make_model(directory: Path, family: str = "qwen3") -> Path:
    """A tiny model by `pd-engine make-model`."""
    command = [str(BIN / "pd-engine"), "make-model", str(directory), "--family", family, "--size", "tiny"]
    with tempfile.TemporaryFile("w+") as output:
        if popen(command, output, output).wait(START_TIMEOUT_S):
            output.seek(0)
            raise AssertionError(output.read())
    return directory


@dataclass
class Command:
    """One process of the deployment; `ready_url` answers 200 once it serves."""

    name: str
    argv: list[str]
    ready_url: str
    log: Path
    process: subprocess.Popen[str] | Forked | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            self.process = popen(self.argv, log, log, Path.cwd(), environment)

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_up(self.ready_url):
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.name} is not ready (exit {self.process.poll()}):\n{self.tail()}")
            time.sleep(0.05)

    def tail(self, num_lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])

    def kill9(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> int | None:
        if self.process is None or self.process.poll() is not None:
            return None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill9()
            raise AssertionError(f"{self.name} did not end on SIGTERM:\n{self.tail()}") from None


@dataclass
class Instance:
    """An engine and the sidecar beside it."""

    role: str
    url: str
    sidecar_url: str
    sidecar: Command
    engine: Command


@dataclass
class Deployment:
    """`num_prefill` + `num_decode` instances behind a proxy at `url`."""

    model: Path
    num_prefill: int = 1
    num_decode: int = 1
    transport: str = "auto"
    engine_args: list[str] = field(default_factory=list)
    decode_args: list[str] = field(default_factory=list)
    """For the decoders, after `engine_args`."""
    prefill_sidecar_args: list[str] = field(default_factory=list)
    proxy_args: list[str] = field(default_factory=list)
    instances: list[Instance] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> Deployment:
        self._directory = Path(tempfile.mkdtemp(prefix="baton-it-"))
        try:
            self._start()
        except BaseException:
            self.__exit__(AssertionError)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        try:
            if kind is None:
                wrong = [command.tail() for command in reversed(self.commands) if command.stop() not in (0, None)]
                assert not wrong, "\n\n".join(wrong)
        finally:
            for command in self.commands:
                if command.process is not None and command.process.poll() is None:
                    command.kill9()
            shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def prefillers(self) -> list[Instance]:
        return [instance for instance in self.instances if instance.role == "prefill"]

    @property
    def decoders(self) -> list[Instance]:
        return [instance for instance in self.instances if instance.role == "decode"]

    @property
    def commands(self) -> list[Command]:
        """In start order."""
        started = [c for c in (getattr(self, "proxy", None),) if c]
        return [i.sidecar for i in self.instances] + [i.engine for i in self.instances] + started

    def _start(self) -> None:
        for role, count in (("prefill", self.num_prefill), ("decode", self.num_decode)):
            self.instances += [self._instance(role, index) for index in range(count)]
        self.proxy = self._proxy()
        sidecars = [command for command in self.commands if command.name.startswith("sidecar-")]
        for batch in (sidecars, [command for command in self.commands if command not in sidecars]):
            for command in batch:
                command.start()
            for command in batch:
                command.wait_ready()

    def _instance(self, role: str, index: int) -> Instance:
        name = f"{role}{index}"
        socket_path = self._directory / f"{name}.sock"
        port, peer_port, metrics_port = free_port(), free_port(), free_port()
        sidecar_url, url = f"http://127.0.0.1:{metrics_port}", f"http://127.0.0.1:{port}"
        sidecar = Command(
            f"sidecar-{name}",
            [str(BIN / "pd-sidecar"), "--socket", str(socket_path), "--listen", f"127.0.0.1:{peer_port}",
             "--engine-id", name, "--rank", "0", "--transport", self.transport, "--metrics-port", str(metrics_port),
             *(self.prefill_sidecar_args if role == "prefill" else ())],
            f"{sidecar_url}/metrics",
            self._directory / f"sidecar-{name}.log",
        )  # fmt: skip
        engine = Command(
            name,
            [str(BIN / "pd-engine"), "serve", "--model", str(self.model), "--served-model-name", "tiny", "--role", role,
             "--port", str(port), "--sidecar", str(socket_path), "--engine-id", name, "--dtype", "float32",
             "--num-threads", "1", *self.engine_args, *(self.decode_args if role == "decode" else [])],
            f"{url}/health",
            self._directory / f"{name}.log",
        )  # fmt: skip
        return Instance(role, url, sidecar_url, sidecar, engine)

    def _proxy(self) -> Command:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        ports = {
            role: [i.url.rsplit(":", 1)[1] for i in self.instances if i.role == role] for role in ("prefill", "decode")
        }
        return Command(
            "proxy",
            [str(BIN / "pd-proxy"), "--host", "127.0.0.1", "--port", str(port),
             "--prefiller-hosts", *["127.0.0.1"] * self.num_prefill, "--prefiller-ports", *ports["prefill"],
             "--decoder-hosts", *["127.0.0.1"] * self.num_decode, "--decoder-ports", *ports["decode"],
             *self.proxy_args],
            f"{self.url}/health",
            self._directory / "proxy.log",
        )  # fmt: skip

    def left_over(self) -> dict[str, float]:
        """Whatever is not at rest, by name: blocks, requests, leases, loads, ledger entries. Empty: settled. A proxy
        that is dead has nothing."""
        found: dict[str, float] = {}
        for instance in self.instances:
            name = instance.engine.name
            for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
                found[f"{name} {gauge}"] = metric(instance.url, gauge)
            for state in ("offered", "claimed"):
                found[f"{name} leases {state}"] = metric(instance.sidecar_url, "baton_sidecar_leases", state=state)
            for gauge in ("baton_sidecar_open_pulls", "baton_sidecar_open_landings"):
                found[f"{name} {gauge}"] = metric(instance.sidecar_url, gauge)
        alive = self.proxy.process is not None and self.proxy.process.poll() is None
        for key, value in flatten(get_json(f"{self.url}/instances")) if alive else []:
            if key.rsplit(".", 1)[-1] in PROXY_LOADS:
                found[f"proxy {key}"] = value
        return {name: value for name, value in found.items() if value}

    def settles(self, within_s: float) -> dict[str, float]:
        """Wait for `left_over` to be empty; what is left when the time is up."""
        deadline = time.monotonic() + within_s
        while (left := self.left_over()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


def expired_leases(split: Deployment) -> float:
    """KV that nobody gave back: its lease was all that freed it."""
    name = "baton_sidecar_offers_ended_total"
    return sum(metric(instance.sidecar_url, name, outcome="expired") for instance in split.instances)


PROXY_LOADS = frozenset(
    {
        "num_in_flight",
        "num_queued",
        "num_reservations",
        "num_entries",
        "num_reclaims_open",
        "kv_held",
        "num_requests",
        "num_tokens",
        "kv_tokens",
    }
)


def flatten(value: Any, prefix: str = "") -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in flatten(inner, f"{prefix}.{key}")]
    if isinstance(value, list):
        return [pair for index, inner in enumerate(value) for pair in flatten(inner, f"{prefix}[{index}]")]
    return [(prefix, float(value))] if isinstance(value, int | float) and not isinstance(value, bool) else []
