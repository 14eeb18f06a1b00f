"""Two nodes on this machine's loopback, with stand-ins for what an NPU machine has."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_adapter.cluster.deployment_plan import deployment_plan
from engine_adapter.cluster.deployment_rules import load
from engine_adapter.cluster.processes import DeploymentPlan
from tests.unit.cluster.conftest import is_alive, wait_for

ROOT = Path(__file__).parents[3]
STAND_IN = Path(__file__).with_name("node_stand_in.py")
PD_CLUSTER = [sys.executable, "-m", "engine_adapter.cluster.cli"]
A, B = "127.0.81.1", "127.0.81.2"
LIMIT_S = 60.0

TEXT = """
name = "two"
node = [{{ address = "{a}" }}, {{ address = "{b}" }}]
model = {{ path = "/m", served_name = "m" }}
engine = {{ kind = "vllm-ascend", engine_version = "0.11.0", env = {{ http_proxy = false, LD_X = "/x:${{LD_X}}" }} }}
connector = {{ name = "MooncakeConnectorV1" }}
store = {{ kind = "ucm", directory = "/shared" }}
mooncake_master = {{ node = "{a}", port = {ports[0]}, metrics_port = {ports[1]} }}
proxy = {{ node = "{a}", port = {ports[2]}, args = {{ health-interval-s = 0.2 }} }}

[prefill]
tp = 2
args = {{ max-num-seqs = 8 }}

[decode]
dp = 2
tp = 1

[[instance]]
role = "prefill"
nodes = ["{a}"]
port = {ports[3]}
kv_port = {ports[4]}

[[instance]]
role = "decode"
nodes = ["{b}"]
port = {ports[6]}
kv_port = {ports[8]}
dp_rpc_port = {ports[10]}
"""
NUM_PORTS = 11


def free_ports(num: int) -> list[int]:
    """In a row, from a place of this process's own, below the ephemeral ones and the ports of Mooncake and ADXL."""
    first = 2100 + os.getpid() * 41 % 11000
    while True:
        ports = list(range(first, first + num))
        if all(is_free(port) for port in ports):
            return ports
        first += num


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


@dataclass
class Nodes:
    """A deployment's file, each node's directory, and what the stand-ins wrote down."""

    directory: Path
    text: str = TEXT
    ports: list[int] = field(default_factory=lambda: free_ports(NUM_PORTS))
    started: list[Up] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.file = self.directory / "two.toml"
        self.file.write_text(self.text.format(a=A, b=B, ports=self.ports))
        self.journal = self.directory / "journal"
        commands = self.directory / "bin"
        commands.mkdir()
        for name in ("vllm", "mooncake_master"):
            (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S {STAND_IN} {name} "$@"\n')
            (commands / name).chmod(0o755)
        self.env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "STAND_IN_JOURNAL": str(self.journal),
            "http_proxy": "http://nowhere",
            "LD_X": "/before",
        }

    @property
    def plan(self) -> DeploymentPlan:
        return deployment_plan(load(self.file))

    def events(self, what: str) -> list[dict[str, Any]]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == what]

    def names(self, what: str) -> list[str]:
        """Of the processes, in the order it happened to them."""
        by_argv = {process.argv: process.name for process in self.plan.processes}
        return [by_argv[tuple(event["argv"])] for event in self.events(what)]

    def up(self, node: str, *flags: str) -> Up:
        one = Up(self, node, self.node_directory(node), ["up", str(self.file), "--node", node, *flags])
        self.started.append(one)
        return one

    def node_directory(self, node: str) -> Path:
        path = self.directory / node
        path.mkdir(exist_ok=True)
        return path

    def run(self, node: str, *words: str) -> subprocess.CompletedProcess[str]:
        where = self.node_directory(node)
        return subprocess.run(
            [*PD_CLUSTER, *words], cwd=where, env=self.env, text=True, capture_output=True, timeout=LIMIT_S, check=False
        )

    def status(self, node: str) -> dict[str, dict[str, Any]]:
        (share,) = json.loads(self.run(node, "status", str(self.file), "--json").stdout)
        return {process["name"]: process for process in share["processes"]}

    def afflict(self, how: str, port: int) -> None:
        (self.directory / f"{how}-{port}").touch()

    def left(self) -> list[int]:
        return [event["pid"] for event in self.events("begin") if is_alive(event["pid"])]

    def ask(self) -> Any:
        body = json.dumps({"model": "m", "prompt": "Who?", "max_tokens": 5}).encode()
        url = f"http://{A}:{self.ports[2]}/v1/completions"
        asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(asked, timeout=30) as answer:
            return json.load(answer)


class Up:
    """A `pd-cluster up` in its own process, its output in a file."""

    def __init__(self, nodes: Nodes, node: str, directory: Path, words: list[str]) -> None:
        self.node, self.directory = node, directory
        self.output = nodes.directory / f"output-{node}-{len(nodes.started)}"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [*PD_CLUSTER, *words], cwd=directory, env=nodes.env, stdout=file, stderr=subprocess.STDOUT
            )

    def text(self) -> str:
        return self.output.read_text()

    def wait_until(self, text: str) -> None:
        wait_for(lambda: text in self.text() or self.process.poll() is not None, f"{text!r} is never said", LIMIT_S)
        assert text in self.text(), self.text()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
