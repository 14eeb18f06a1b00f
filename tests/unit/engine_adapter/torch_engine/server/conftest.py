"""A made model, its tokenizer, and a real `pd-engine serve` on it: each once a session."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine_adapter.torch_engine.make_model import make_model
from engine_adapter.torch_engine.tokenizer import Tokenizer
from tests.forked import Forked, popen

START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Served:
    """A running instance: where it is, and its process."""

    url: str
    host: str
    port: int
    process: subprocess.Popen[str] | Forked
    log: Path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    make_model(directory, "qwen3", "tiny")
    return directory


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir)


def start_engine(model_dir: Path, log: Path, *flags: str) -> Served:
    command = [
        sys.executable, "-m", "engine_adapter.torch_engine.cli", "serve", "--model", str(model_dir),
        "--served-model-name", "tiny", "--port", "0", "--max-model-len", "512", "--num-blocks", "256",
        "--num-threads", "1", *flags,
    ]  # fmt: skip
    with log.open("w") as stderr:
        process = popen(command, subprocess.PIPE, stderr)
    assert process.stdout is not None
    ready = process.stdout.readline()
    found = re.search(r"^ready listen=([\d.]+):(\d+) ", ready)
    if found is None:
        process.kill()
        process.wait()
        raise AssertionError(f"not ready: {ready!r}\n{log.read_text()}")
    return Served(f"http://{found[1]}:{found[2]}", found[1], int(found[2]), process, log)


def drain(served: Served) -> tuple[bytes, int]:
    """SIGTERM in the middle of a stream: what its client still got, and the exit status."""
    body = b'{"prompt": "x", "max_tokens": 200, "ignore_eos": true, "stream": true}'
    request = urllib.request.Request(served.url + "/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            served.process.send_signal(signal.SIGTERM)
            answer: bytes = response.read()
        return answer, served.process.wait(30)
    finally:
        served.process.kill()
        served.process.wait()
        assert served.process.stdout is not None
        served.process.stdout.close()


@pytest.fixture(scope="session")
def served(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The instance all tests share; at the end it drains, exits with 0, and has logged no traceback."""
    running = start_engine(model_dir, tmp_path_factory.mktemp("engine") / "log")
    yield running
    answer, status = drain(running)
    log = running.log.read_text()
    assert status == 0, log
    assert answer.count(b"data: ") == 201
    assert answer.endswith(b"data: [DONE]\n\n")
    assert "Traceback" not in log, log
