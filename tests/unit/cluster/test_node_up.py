"""`up`, `status` and `down` of a deployment over two nodes, with stand-ins for the engines and the real proxy."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cluster.conftest import wait_for
from tests.unit.cluster.nodes import LIMIT_S, PD_CLUSTER, TEXT, A, B, Nodes

PROMPTS = ("--warm-up-prompts", "1")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    for one in made.started:
        one.end()
    wait_for(lambda: not made.left(), "nothing is left", 10)


def test_two_nodes_start_in_the_plans_order_serve_and_stop_in_reverse(nodes: Nodes) -> None:
    second = nodes.up(B, *PROMPTS)
    second.wait_until("waits for mooncake_master on other nodes")
    assert nodes.names("begin") == []
    assert nodes.run(B, "status", "two").returncode == 1
    first = nodes.up(A, *PROMPTS)
    first.wait_until(f"serves m on http://{A}:{nodes.ports[2]}")
    second.wait_until("serves;")

    begun = nodes.names("begin")
    assert begun[0] == "mooncake_master"
    assert sorted(begun[1:]) == ["decode-0-dp0", "decode-0-dp1", "prefill-0"]
    for process, event in zip(map(nodes.plan.named, begun), nodes.events("begin"), strict=True):
        expected = process.environment(nodes.env)
        seen = event["env"]
        assert {name: seen.get(name) for name in process.env} == {name: expected[name] for name in process.env}
        assert "http_proxy" not in seen or process.kind == "store"
        assert Path(event["cwd"]) == nodes.node_directory(process.node)
        assert process.kind == "store" or "mooncake.json" in event["files"]
        assert (process.role == "prefill") <= ("ucm_config.yaml" in event["files"])
    prompted = nodes.names("prompt")
    assert {"prefill-0", "decode-0-dp0", "decode-0-dp1"} == set(prompted)
    assert nodes.ask()["choices"][0]["text"] in (f" from {nodes.ports[6]}", f" from {nodes.ports[7]}")

    assert nodes.run(A, "status", str(nodes.file)).returncode == 0
    before = nodes.status(A)
    assert [it["state"] for it in before.values()] == ["healthy"] * 3
    os.kill(before["prefill-0"]["pid"], signal.SIGKILL)
    wait_for(lambda: (it := nodes.status(A)["prefill-0"])["restarts"] == 1 and it["state"] == "healthy", "it is back")
    after = nodes.status(A)
    assert {name for name in after if after[name]["pid"] != before[name]["pid"]} == {"prefill-0"}

    for node, process in ((A, first), (B, second)):
        down = nodes.run(node, "down", "two")
        assert (down.returncode, down.stdout) == (0, f"two, {node}: stopped\n")
        assert process.process.wait(LIMIT_S) == 0
        assert "Traceback" not in process.text()
    ended = nodes.names("end")
    assert ended[:2] == ["prefill-0", "mooncake_master"]
    assert sorted(ended[2:]) == ["decode-0-dp0", "decode-0-dp1"]
    said = first.text()
    assert said.index("proxy ") < said.index("is asked to stop")
    stops = [line.split()[1] for line in said.splitlines() if "is asked to stop" in line]
    assert stops == ["proxy", "prefill-0", "mooncake_master"]
    assert nodes.left() == []
    for node in (A, B):
        left = {str(path.relative_to(nodes.directory / node)) for path in (nodes.directory / node).rglob("*")}
        logs = {path for path in left if path.endswith(".log")}
        assert left - logs == {".baton", ".baton/run", ".baton/run/two", f".baton/run/two/{node}",
                               f".baton/run/two/{node}/supervisor.pid"}  # fmt: skip
        assert {Path(path).stem for path in logs} == {it.name for it in nodes.plan.of_node(node)}


def test_nothing_survives_a_kill_9_not_even_its_files(nodes: Nodes) -> None:
    first = nodes.up(A, "--log-dir", "logs")
    wait_for(lambda: "prefill-0" in nodes.names("prompt") or "healthy" in first.text(), "it starts", LIMIT_S)
    wait_for(lambda: nodes.names("begin") == ["mooncake_master", "prefill-0"], "both began", LIMIT_S)
    assert (nodes.directory / A / "mooncake.json").exists()
    first.end()
    wait_for(lambda: not nodes.left(), "nothing is left", 10)
    wait_for(lambda: not (nodes.directory / A / "mooncake.json").exists(), "no file is left", 10)
    assert nodes.run(A, "status", "two").returncode == 1
    assert sorted(path.name for path in (nodes.directory / A / "logs").iterdir()) == [
        "mooncake_master.log",
        "prefill-0.log",
    ]


def test_an_engine_that_does_not_start_ends_it_with_its_words(nodes: Nodes) -> None:
    nodes.afflict("DIE", nodes.ports[3])
    first = nodes.up(A)
    assert first.process.wait(LIMIT_S) == 1
    assert "    | the reason" in first.text()
    assert "pd-cluster: prefill-0 did not start; its log: .baton/run/two/" in first.text()
    assert nodes.names("begin") == ["mooncake_master", *["prefill-0"] * 3]
    assert nodes.left() == []


def test_what_keeps_it_from_starting_is_all_said_and_nothing_starts(nodes: Nodes) -> None:
    (nodes.node_directory(A) / "mooncake.json").write_text("{}")
    (nodes.directory / "bin" / "vllm").unlink()
    with socket.create_server(("127.0.0.1", nodes.ports[5])):
        result = nodes.run(A, "up", str(nodes.file), "--node", A)
        checked = nodes.run(A, "up", str(nodes.file), "--node", A, "--check-only")
    assert result.returncode == checked.returncode == 1
    assert result.stderr == checked.stderr
    assert result.stderr.splitlines() == [
        "pd-cluster: vllm: no such command on PATH; install it on this node, or activate its environment",
        f"pd-cluster: port {nodes.ports[5]} on 0.0.0.0 for prefill-0 is occupied; stop what listens there, or give "
        "another",
        "pd-cluster: ./mooncake.json is there already with other contents; move it away, or start in another directory",
    ]
    assert nodes.events("begin") == []


def test_a_second_up_is_refused_and_a_deaf_engine_is_killed_at_the_deadline(nodes: Nodes) -> None:
    nodes.afflict("DEAF", nodes.ports[6])
    nodes.up(A, *PROMPTS)
    second = nodes.up(B, *PROMPTS, "--stop-timeout-s", "1")
    second.wait_until("serves;")
    again = nodes.run(B, "up", str(nodes.file), "--node", B)
    assert again.returncode == 1
    assert f"this cluster is already up (pid {second.process.pid}" in again.stderr
    assert nodes.run(B, "down", str(nodes.file), "--node", B).returncode == 0
    assert "did not stop within 1 s and was killed" in second.text()
    assert nodes.names("end") == ["decode-0-dp1"]


HEADLESS = """
name = "two"
node = [{{ address = "{a}", devices = 2 }}, {{ address = "{b}", devices = 2 }}]
model = {{ path = "/m", served_name = "m" }}
engine = {{ kind = "vllm-ascend", engine_version = "0.11.0" }}
connector = {{ name = "LLMDataDistCMgrConnector" }}
proxy = {{ node = "{a}", port = {ports[0]} }}
ports = {{ http = {ports[1]}, kv = {ports[4]}, dp_rpc = {ports[5]}, llmdatadist = {ports[6]} }}
prefill = {{ dp = 1, tp = 1 }}
decode = {{ dp = 2, tp = 1, dp_mode = "internal" }}
instance = [{{ role = "prefill", nodes = ["{a}"] }}, {{ role = "decode", nodes = ["{a}", "{b}"] }}]
"""


def test_a_headless_engine_is_well_with_its_api_server_and_the_rank_table_is_made_first(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, HEADLESS)
    (tmp_path / "bin" / "hccn_tool").symlink_to(Path(__file__).with_name("npu_tools") / "hccn_tool")
    nodes.env |= {"NODE": "127.0.81.9", "FAULTS": str(tmp_path / "bin")}
    try:
        second = nodes.up(B)
        wait_for(lambda: nodes.names("begin") == ["decode-0-node1"], "the headless one begins", LIMIT_S)
        assert nodes.status(B)["decode-0-node1"]["state"] == "starting"
        first = nodes.up(A, *PROMPTS)
        first.wait_until("serves m on")
        second.wait_until("serves;")
        assert nodes.status(B)["decode-0-node1"]["health_url"] == nodes.plan.named("decode-0-node0").ready_url
        assert all("ranktable.json" in event["files"] for event in nodes.events("begin"))
        table = json.loads((nodes.directory / A / "ranktable.json").read_text())
        assert [it["server_id"] for it in table["decode_device_list"]] == [A, B]
        assert sorted(nodes.names("prompt")[:2]) == ["decode-0-node0", "prefill-0"]
        for node in (A, B):
            assert nodes.run(node, "down", "two").returncode == 0
        assert nodes.names("end")[:2] == ["decode-0-node0", "prefill-0"]
    finally:
        for one in nodes.started:
            one.end()
    wait_for(lambda: not nodes.left(), "nothing is left", 10)


def test_a_rank_table_that_cannot_be_made_is_said_with_the_tools_words(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, HEADLESS)
    result = nodes.run(A, "up", str(nodes.file), "--node", A)
    assert result.returncode == 1
    assert "pd-cluster: ./ranktable.json could not be made:" in result.stderr
    assert "hccn_tool is not on" in result.stderr
    assert nodes.events("begin") == []


def test_on_a_terminal_there_is_one_live_screen(nodes: Nodes) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    process = subprocess.Popen(
        [*PD_CLUSTER, "up", str(nodes.file), "--node", A],
        cwd=nodes.node_directory(A),
        env=nodes.env | {"TERM": "xterm"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    seen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the end of a terminal
            while part := os.read(master, 1 << 16):
                seen.extend(part)

    def shows(*words: bytes) -> bool:
        return all(word in seen for word in words)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_for(lambda: shows(b"prefill-0", b"healthy", b"restarts", b"waits for decode-0-dp0"), "a table", LIMIT_S)
        assert nodes.run(A, "down", "two").returncode == 0
        wait_for(lambda: shows(b"stopped") and process.poll() is not None, "it ends", LIMIT_S)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        reader.join()
        os.close(master)


def test_what_the_proxy_does_not_understand_is_said_before_the_engines_load(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, TEXT.replace("health-interval-s", "helth-interval-s"))
    ended = nodes.run(A, "up", str(nodes.file), "--node", A)
    wanted = (
        "proxy: pd-proxy: unknown flag --helth-interval-s; did you mean --health-interval-s?; correct [proxy].args in"
    )
    assert ended.returncode == 1 and wanted in ended.stderr and not nodes.events("begin")
