"""The command: its flags, its start, its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.proxy_blackbox.harness import (
    CHAT,
    HOST,
    PROXY,
    Answer,
    Engines,
    Proxy,
    body_of,
    connected,
    eventually,
    raw_post,
    text_for,
)


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROXY, *flags], capture_output=True, text=True, timeout=20)


def one_line(text: str) -> str:
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text


@pytest.mark.parametrize(
    ("flags", "named", "nearest"),
    [
        (["--prefiler-hosts", "a"], "--prefiler-hosts", "--prefiller-hosts"),
        (["--decoder-prots", "1"], "--decoder-prots", "--decoder-ports"),
        (["--port", "eighty"], "--port", ""),
        (["--policy", "least_laod"], "least_laod", "least_load"),
        (["--prefiller-hosts", "a", "b", "c", "--prefiller-ports", "1", "2"], "--prefiller-ports", ""),
        (["--log-level", "LOUD"], "--log-level", ""),
        (["stray"], "stray", ""),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it_and_exit_2(flags: list[str], named: str, nearest: str) -> None:
    ended = run(*flags)
    assert ended.returncode == 2 and ended.stdout == ""
    assert named in one_line(ended.stderr) and nearest in ended.stderr


def test_a_configuration_is_checked_without_being_used(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        ended = run("--host", HOST, "--port", str(taken.getsockname()[1]), "--check-config")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "pd-proxy: the configuration can be used\n", "")
    for flags in (
        ["--polcy", "a"],
        ["--tls-cert", str(tmp_path / "none.pem"), "--tls-key", str(tmp_path / "none.pem")],
        ["--api-key-file", str(tmp_path / "none")],
        ["--metaserver-allow", "everybody"],
    ):
        ended = run("--check-config", *flags)
        assert ended.returncode == 2 and flags[0] in one_line(ended.stderr) and not ended.stdout


def test_a_wrong_key_in_the_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text('prefiller_host = ["a"]\n')
    ended = run("--config", str(file))
    assert ended.returncode == 2
    assert "prefiller_host" in one_line(ended.stderr) and "prefiller_hosts" in ended.stderr


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    ended = run("--config", str(tmp_path / "none.toml"))
    assert ended.returncode == 2 and "none.toml" in one_line(ended.stderr)


def test_an_occupied_port_is_one_line_and_exit_1() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run("--host", HOST, "--port", str(port))
    assert ended.returncode == 1 and str(port) in one_line(ended.stderr)


def test_help_and_version() -> None:
    helped = run("--help")
    assert helped.returncode == 0
    for flag in ("--prefiller-hosts", "--decoder-ports", "--max-retries", "--policy", "--workers", "--max-body-bytes"):
        assert flag in helped.stdout
    assert run("--version").stdout.startswith("pd-baton ")


def test_it_starts_before_its_engines_and_serves_when_they_are_there(
    start_proxy: Callable[..., Proxy], engines: Engines
) -> None:
    for port in (*engines.prefill, *engines.decode):
        engines.stop(port)
    proxy = start_proxy("--health-retry-interval-s", "0.1")
    assert proxy.post(CHAT, body_of(CHAT)).status in (502, 503)
    for port in (*engines.prefill, *engines.decode):
        engines.start(port)
    eventually(lambda: proxy.post(CHAT, body_of(CHAT)).status != 200, "not served")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_what_is_in_flight_and_exits_0(start_proxy: Callable[..., Proxy], number: int) -> None:
    proxy = start_proxy()
    fields = body_of(CHAT, num_tokens=30, stream=True, mock={"interval_s": 0.03})
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(proxy.post(CHAT, fields)))
    idle = socket.create_connection((HOST, proxy.port), timeout=5)
    thread.start()
    eventually(lambda: proxy.get("/healthcheck").json["request_num"] != 1, "not in flight")
    os.kill(proxy.process.popen.pid, number)
    assert idle.recv(1) == b"", "an idle connection is closed at once"
    idle.close()
    eventually(lambda: not _refused(proxy.port), "still accepts")
    thread.join(10)
    assert answers[0].text == text_for(fields) and answers[0].events[-1] == "[DONE]"
    assert proxy.process.popen.wait(5) == 0
    assert "Traceback" not in proxy.process.output


def test_a_drain_ends_at_its_deadline(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy("--drain-timeout-s", "0.5")
    with connected(proxy.port) as sock:
        fields = body_of(CHAT, num_tokens=90_000, stream=True, mock={"interval_s": 0.05})
        sock.sendall(raw_post(CHAT, json.dumps(fields).encode()))
        assert sock.recv(1000)
        os.kill(proxy.process.popen.pid, signal.SIGTERM)
        assert proxy.process.popen.wait(5) == 0
    eventually(engines.wrong, "the engines are not idle")


def test_it_leaves_no_child_and_no_open_descriptor_behind(start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy("--upstream-keepalive-s", "0.2")
    process = psutil.Process(proxy.process.popen.pid)
    proxy.post(CHAT, body_of(CHAT))
    eventually(lambda: _num_idle(proxy), "idle connections stay open")
    before = process.num_fds()
    for number in range(30):
        proxy.post(CHAT, body_of(CHAT, f"{number}", stream=bool(number % 2)))
    eventually(lambda: _num_idle(proxy), "idle connections stay open")
    eventually(lambda: process.num_fds() > before, "descriptors leak")
    assert process.children() == []


def _num_idle(proxy: Proxy) -> int:
    return sum(one["connections"]["idle"] for one in proxy.get("/instances").json["instances"])


def _refused(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return True
    return False
