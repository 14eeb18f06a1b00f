"""Real vLLM servers on the CPU, split by our connector, behind pd-proxy (`make test-vllm`).

vLLM runs from an environment of its own (VLLM_VENV), the proxy from this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.deployment import free_port, is_up, metric

ROOT = Path(__file__).resolve().parents[2]
VLLM_VENV = os.environ.get("VLLM_VENV", "")
START_TIMEOUT_S = 300.0
PROBE_TIMEOUT_S = 15.0
"""Of the proxy's probes: two cores have five vLLMs to run, and none of them is to be given up for slowness."""
BLOCK_SIZE = 32
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Server:
    """One process group and its address."""

    name: str
    argv: list[str]
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = os.environ | ENVIRONMENT | self.environment
        # Also in an environment that was not made for this checkout.
        environment["PYTHONPATH"] = f"{environment.get('PYTHONPATH', '')}{os.pathsep}{ROOT}".strip(os.pathsep)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                env=environment,
            )  # fmt: skip

    def wait_ready(self, path: str = "/health") -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_up(self.url + path):
            assert self.process is not None and self.process.poll() is None, f"{self.name} ended: see {self.log}"
            assert time.monotonic() < deadline, f"{self.name} is not up: see {self.log}"
            time.sleep(0.5)

    def kill(self) -> None:
        """The whole group at once, as a machine dies."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def stop(self) -> None:
        """As an operator would; then the group, so that nothing is left behind."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        self.kill()

    def sidecar_pid(self) -> int:
        """Of the sidecar that this server's worker started."""
        assert self.process is not None
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                    if b"sidecar.cli" in command and f"--engine-id\0{self.name}".encode() in b"\0".join(command):
                        return int(entry.name)
        raise AssertionError(f"{self.name} has no sidecar")

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.url, name, **labels)


def vllm_server(
    name: str, model: Path, directory: Path, kv_transfer: dict[str, Any] | None = None, *flags: str,
    num_ranks: int = 1, **environment: str,
) -> Server:  # fmt: skip
    """Without `kv_transfer` (vLLM's --kv-transfer-config) it is an unsplit vLLM."""
    port = free_port()
    argv = [
        f"{VLLM_VENV}/bin/vllm", "serve", str(model), "--served-model-name", "m", "--host", "127.0.0.1",
        "--port", str(port), "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "16",
        "--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", "2048",
        "--tensor-parallel-size", str(num_ranks), *flags,
    ]  # fmt: skip
    if kv_transfer is not None:
        argv += ["--kv-transfer-config", json.dumps({"engine_id": name, **kv_transfer})]
    return Server(name, argv, port, directory / f"{name}.log", environment=environment)


def baton(kv_role: str, **extra: Any) -> dict[str, Any]:
    """Our connector, as --kv-transfer-config has it; `extra` goes into kv_connector_extra_config."""
    return {
        "kv_connector": "BatonConnector",
        "kv_connector_module_path": "engine_adapter.vllm_connector",
        "kv_role": kv_role,
        "kv_connector_extra_config": extra,
    }


def proxy_server(prefillers: list[Server], decoders: list[Server], directory: Path, *flags: str) -> Server:
    port = free_port()
    argv = [
        str(Path(sys.executable).parent / "pd-proxy"), "--port", str(port), "--health-timeout-s", str(PROBE_TIMEOUT_S),
        "--prefiller-hosts", *["127.0.0.1"] * len(prefillers), "--prefiller-ports", *[str(p.port) for p in prefillers],
        "--decoder-hosts", *["127.0.0.1"] * len(decoders), "--decoder-ports", *[str(d.port) for d in decoders], *flags,
    ]  # fmt: skip
    return Server("proxy", argv, port, directory / "proxy.log")


@contextlib.contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Started together, because each takes half a minute; ended whatever happens."""
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready()
        yield
    finally:
        for server in reversed(servers):
            server.stop()


def post(server: Server, path: str, body: dict[str, Any], timeout_s: float = 120.0) -> tuple[int, str]:
    """Status and text of the answer."""
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@dataclass(frozen=True)
class Ask:
    """One greedy request."""

    prompt: str
    chat: bool = False
    stream: bool = False
    max_tokens: int = 24

    def body(self) -> dict[str, Any]:
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        )
        return {"model": "m", "temperature": 0, "max_tokens": self.max_tokens, "stream": self.stream, **asked}

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def text(self, server: Server) -> str:
        status, raw = post(server, self.path, self.body())
        assert status == 200, raw
        if not self.stream:
            choice = json.loads(raw)["choices"][0]
            return str(choice["message"]["content"] if self.chat else choice["text"])
        events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
        assert not [event for event in events if "error" in event], raw
        choices = [choice for event in events for choice in event["choices"]]
        return "".join((c["delta"].get("content") or "") if self.chat else c["text"] for c in choices)


def eventually(condition: Any, within_s: float = 30.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False
