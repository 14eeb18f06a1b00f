"""`pd-cluster` as its users have it: a process, its output, its exit status, and what it leaves (nothing)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from engine_adapter.cluster import machine
from tests.unit.cluster.conftest import Bench, is_alive, wait_for

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "engine_adapter.cluster.cli"]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], env=ENV, text=True, capture_output=True, check=False, timeout=60)


class Running:
    """A `pd-cluster up` in its own process, its output in a file."""

    def __init__(self, bench: Bench, *words: str) -> None:
        self.bench = bench
        self.output = bench.directory / "output"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [*COMMAND, *(words or ("up", "c.toml"))], env=ENV, stdout=file, stderr=subprocess.STDOUT
            )

    def text(self) -> str:
        return self.output.read_text()

    def wait_until(self, text: str) -> None:
        wait_for(lambda: text in self.text() or self.process.poll() is not None, f"{text!r} is never said", 30)
        assert text in self.text(), self.text()

    def left(self) -> list[int]:
        return [pid for _, _, pid in self.bench.events() if is_alive(pid)]


@pytest.fixture
def started(bench: Bench) -> Iterator[list[Running]]:
    all_started: list[Running] = []
    yield all_started
    for one in all_started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
    for one in all_started:
        wait_for(lambda one=one: not one.left(), "nothing is left", 10)
    socket_dir = machine.socket_directory(bench.directory / ".baton/run/c")
    wait_for(lambda: not socket_dir.exists(), "no socket is left", 10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_until_a_signal_and_leaves_nothing(bench: Bench, started: list[Running], number: int) -> None:
    cluster = Running(bench)
    started.append(cluster)
    cluster.wait_until("serves m on http://127.0.0.1:")
    assert {name for event, name, _ in bench.events() if event == "prompt"} == {"prefill-0", "decode-0", "proxy"}
    cluster.process.send_signal(number)
    assert cluster.process.wait(30) == 0
    assert cluster.left() == []
    assert "Traceback" not in cluster.text()
    assert not machine.socket_directory(bench.directory / ".baton/run/c").exists()


def test_nothing_survives_a_kill_9_of_the_supervisor_and_it_starts_again(bench: Bench, started: list[Running]) -> None:
    first = Running(bench)
    started.append(first)
    first.wait_until("serves m on")
    first.process.kill()
    first.process.wait()
    wait_for(lambda: not first.left(), "nothing is left", 10)
    again = Running(bench)
    started.append(again)
    again.wait_until("serves m on")


def test_a_signal_while_it_starts_stops_it_too(
    bench: Bench, started: list[Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENV, "STAND_IN_SICK", "decode-0")
    cluster = Running(bench)
    started.append(cluster)
    cluster.wait_until("prefill-0 ")
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.process.wait(30) == 0


def test_a_second_signal_does_not_wait_for_the_deaf(
    bench: Bench, started: list[Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENV, "STAND_IN_DEAF", "proxy")
    bench.file.write_text(bench.file.read_text().replace("stop_timeout_s = 2", "stop_timeout_s = 60"))
    cluster = Running(bench)
    started.append(cluster)
    cluster.wait_until("serves m on")
    cluster.process.send_signal(signal.SIGINT)
    cluster.wait_until("is asked to stop")
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.process.wait(30) == 0


def test_a_failed_start_says_why_and_stops_the_others(
    bench: Bench, started: list[Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENV, "STAND_IN_DIE_AT_ONCE", "decode-0")
    cluster = Running(bench)
    started.append(cluster)
    assert cluster.process.wait(30) == 1
    assert "    | the reason\n" in cluster.text()
    assert "pd-cluster: decode-0 did not start; its log: .baton/run/c/decode-0.log" in cluster.text()
    assert cluster.left() == []


def test_a_second_up_of_the_same_cluster_is_refused(bench: Bench, started: list[Running]) -> None:
    cluster = Running(bench)
    started.append(cluster)
    cluster.wait_until("serves m on")
    second = run("up", "c.toml")
    assert second.returncode == 1
    assert f"this cluster is already up (pid {cluster.process.pid}" in second.stderr
    assert cluster.process.poll() is None


def test_a_model_is_made_where_it_is_absent_and_only_there(bench: Bench, started: list[Running]) -> None:
    bench.file.write_text(bench.file.read_text().replace('path = "m"', "make = {}"))
    for expected in (True, False):
        cluster = Running(bench)
        started.append(cluster)
        cluster.wait_until("serves qwen3-small on")
        assert ("making a small qwen3 model" in cluster.text()) is expected
        cluster.process.send_signal(signal.SIGTERM)
        assert cluster.process.wait(30) == 0
    assert [path.name for path in (bench.directory / ".baton/models").iterdir()] == ["qwen3-small"]


def test_what_keeps_it_from_starting_is_said_before_anything_starts(bench: Bench) -> None:
    (bench.directory / "m" / "config.json").unlink()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run("up", "c.toml", "--port", str(port))
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"pd-cluster: port {port} on 127.0.0.1 for proxy is occupied; stop what listens there or give another "
        "(proxy.port, --port)",
        "pd-cluster: model directory m has no config.json; give a Hugging Face model directory, or make one: "
        "pd-engine make-model m --family qwen3 --size tiny",
    ]
    assert bench.events() == []


def test_check_only_says_whether_it_could(bench: Bench) -> None:
    result = run("up", "c.toml", "--check-only")
    assert (result.returncode, result.stdout) == (0, "c.toml: 5 processes could start here\n")
    bench.write("[sidecar]\nport = 1\n[nonsense]\n")
    assert run("up", "c.toml", "--check-only").returncode == 2
    assert bench.events() == []


def test_plan_prints_commands_bash_takes(bench: Bench) -> None:
    result = run("plan", "c.toml", "--model", "a b")
    assert result.returncode == 0
    assert subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=False).returncode == 0
    assert result.stdout.count("--model 'a b'") == 2
    assert [line for line in result.stdout.splitlines() if line.startswith("#")] == [
        "# prefill-0.sidecar",
        "# decode-0.sidecar",
        "# prefill-0",
        "# decode-0",
        "# proxy",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["up", "c.toml", "--prot", "1"], 'pd-cluster up: unknown argument "--prot"; did you mean "--port"?'),
        (["demo", "c.toml", "--onse"], 'pd-cluster demo: unknown argument "--onse"; did you mean "--once"?'),
        (["upp", "c.toml"], 'pd-cluster: unknown command "upp"; did you mean "up"?'),
        (["up", "c.toml", "more"], 'pd-cluster up: unknown argument "more"'),
        (["up"], "pd-cluster up: the following arguments are required: FILE"),
        (["up", "c.toml", "--port", "x"], "pd-cluster up: argument --port: invalid int value: 'x'"),
    ],
)
def test_a_wrong_word_is_one_line_and_status_2(bench: Bench, words: list[str], line: str) -> None:
    result = run(*words)
    assert (result.returncode, result.stderr) == (2, line + "\n")


def test_a_wrong_key_is_one_line_and_status_2(bench: Bench) -> None:
    bench.write("[engine]\nblok_size = 1\n")
    result = run("up", "c.toml")
    assert (result.returncode, result.stderr) == (
        2,
        'pd-cluster: c.toml: unknown key "engine.blok_size"; did you mean "block_size"?\n',
    )


def test_help_and_version() -> None:
    assert run("--version").stdout == f"pd-baton {version('pd-baton')}\n"
    result = run("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("up", "plan", "demo"))


def test_a_demonstration_that_fails_ends_it_only_when_asked_for_once(bench: Bench, started: list[Running]) -> None:
    """The stand-ins answer without a stream."""
    once = run("demo", "c.toml", "--once")
    assert once.returncode == 1
    assert "pd-cluster: the answer came, but no sidecar moved KV" in once.stderr
    cluster = Running(bench, "demo", "c.toml")
    started.append(cluster)
    cluster.wait_until("serves m on")
    assert "the demonstration failed, the cluster stays: the answer came, but no sidecar moved KV" in cluster.text()
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.process.wait(30) == 0


@pytest.mark.parametrize("after_s", [0.05, 0.3, 0.6, 0.9])
def test_ctrl_c_while_it_still_imports_is_quiet(after_s: float, tmp_path: Path) -> None:
    launched = "from engine_adapter.cluster.launch import main; print(flush=True); main()"
    launch = [sys.executable, "-c", launched, "up", "missing.toml"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(launch, env=ENV, cwd=tmp_path, text=True, **streams)
    assert process.stdout is not None
    process.stdout.readline()  # Python itself has started: before, nobody can be quiet
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert "Traceback" not in said
    assert process.returncode in (-signal.SIGINT, 0, 1, 2)
