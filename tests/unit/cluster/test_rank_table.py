"""`pd-cluster ranktable`, with stand-ins for hccn_tool, npu-smi and ssh on PATH; nodes are loopback addresses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine_adapter.cluster import cli
from engine_adapter.cluster.deployment_plan import deployment_plan
from engine_adapter.cluster.deployment_rules import load, parse
from engine_adapter.cluster.rank_table import Entry, table
from tests.ports import free_port
from tests.unit.cluster.deployments import DIRECTORY, SMALL

HCCN_TOOL = """#!/bin/bash
case "$3" in
  -ip) [ "$KIND" = A2 ] && echo "ipaddr:10.$NODE.0.$2" && echo "netmask:255.255.255.0" ;;
  -vnic) [ "$KIND" = A3 ] && echo "vnic link status: UP" && echo "vnic ipaddr:10.$NODE.1.$2" ;;
esac
"""
NPU_SMI = """#!/bin/bash
if [ "$2" = -l ]; then
  echo "  Total Count                    : 8"
  echo "  NPU ID                         : 0"
  [ "$KIND" = A3 ] && chips=2 || chips=1
  echo "  Chip Count                     : $chips"
else
  echo "  SDID                           : $((NODE * 1000 + $5 * 2 + $7))"
  echo "  Super Pod ID                   : $NODE"
fi
"""
SSH = '#!/bin/bash\necho "$3" >> "$SSH_LOG"\nexport NODE="${3##*.}"\nexec bash -c "$4"\n'


class Tools:
    """A directory of stand-ins, and the environment to run in."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.place, self.monkeypatch, self.capsys = place, monkeypatch, capsys
        (place / "bin").mkdir()
        for name, text in (("hccn_tool", HCCN_TOOL), ("npu-smi", NPU_SMI), ("ssh", SSH)):
            (place / "bin" / name).write_text(text)
            (place / "bin" / name).chmod(0o755)

    def env(self, **more: str) -> dict[str, str]:
        path = f"{self.place}/bin:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "KIND": "A2", "NODE": "1", "SSH_LOG": f"{self.place}/ssh", **more}

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "engine_adapter.cluster.cli", "ranktable", *words]
        return subprocess.Popen(
            command, env=self.env(**env), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *words: str, **env: str) -> tuple[int, str, str]:
        """In this process: a node of its own is only needed where there are several."""
        for name, value in self.env(**env).items():
            self.monkeypatch.setenv(name, value)
        self.monkeypatch.setattr(sys, "argv", ["pd-cluster", "ranktable", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self.capsys.readouterr()
        return int(ended.value.code or 0), out, err


ROOT = DIRECTORY.parents[1]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tools:
    return Tools(tmp_path, monkeypatch, capsys)


def generated(tools: Tools, ids: list[str], kind: str = "A2", num_prefill: int = 2) -> list[dict[str, Any]]:
    """gen_ranktable.sh's call on every node at once; the table of each."""
    port = free_port()
    ips = [f"127.0.0.{i}" for i in range(1, len(ids) + 1)]
    started = []
    for i, ip in enumerate(ips):
        path = str(tools.place / f"table{i}.json")
        words = ["--ips", *ips, "--npus-per-node", "2", "--network-card-name", "lo", "--local-host", ip]
        words += ["--prefill-device-cnt", str(num_prefill), "--decode-device-cnt", str(2 * len(ips) - num_prefill)]
        words += ["--port", str(port), "--ranktable-path", path, "--timeout-s", "50"]
        if ids[i]:
            words += ["--local-device-ids", ids[i]]
        started.append((tools.start(*words, KIND=kind, NODE=str(i + 1)), path))
    said = [process.communicate(timeout=120) for process, _ in started]
    assert [(process.returncode, err) for (process, _), (_, err) in zip(started, said, strict=True)] == [
        (0, "") for _ in ips
    ]
    return [json.loads(Path(path).read_text()) for _, path in started]


def test_seed_002_with_local_device_ids(tools: Tools) -> None:
    """The original fails on --local-device-ids: the ids stay text."""
    tables = generated(tools, ["0,1", "6,7", "6,7"])
    assert tables[0] == tables[1] == tables[2]
    assert tables[0] == {
        "version": "1.2",
        "server_count": "3",
        "prefill_device_list": [
            {"server_id": "127.0.0.1", "device_id": "0", "device_ip": "10.1.0.0", "cluster_id": "1"},
            {"server_id": "127.0.0.1", "device_id": "1", "device_ip": "10.1.0.1", "cluster_id": "2"},
        ],
        "decode_device_list": [
            {"server_id": "127.0.0.2", "device_id": "6", "device_ip": "10.2.0.6", "cluster_id": "3"},
            {"server_id": "127.0.0.2", "device_id": "7", "device_ip": "10.2.0.7", "cluster_id": "4"},
            {"server_id": "127.0.0.3", "device_id": "6", "device_ip": "10.3.0.6", "cluster_id": "5"},
            {"server_id": "127.0.0.3", "device_id": "7", "device_ip": "10.3.0.7", "cluster_id": "6"},
        ],
        "status": "completed",
    }


def test_a3_also_says_where_a_chip_is_in_the_super_pod(tools: Tools) -> None:
    first, _ = generated(tools, ["", "14,15"], "A3")
    assert first["prefill_device_list"][1] == {
        "server_id": "127.0.0.1", "device_id": "1", "device_ip": "10.1.1.1",
        "super_pod_id": "1", "super_device_id": "1001", "cluster_id": "2",
    }  # fmt: skip
    assert first["decode_device_list"][1]["super_device_id"] == "2015"


def write(tools: Tools, text: str) -> str:
    path = tools.place / "file.toml"
    path.write_text(text)
    return str(path)


LLMDATADIST = SMALL.replace("MooncakeConnectorV1", "LLMDataDistCMgrConnector").replace("10.0.0.", "127.0.0.")
ONE_NODE = LLMDATADIST.replace(', { address = "127.0.0.2" }', "").replace("127.0.0.2", "127.0.0.1")


def test_from_a_file_without_torchrun(tools: Tools) -> None:
    """The other nodes' tools are run over ssh; prefillers come first, whatever the order of the file."""
    text = LLMDATADIST.replace("127.0.0.2", "203.0.113.2").replace('[[instance]]\nrole = "prefill"', "#1", 1)
    text = text.replace('#1\nnodes = ["127.0.0.1"]\n', "") + '\n[[instance]]\nrole = "prefill"\nnodes = ["127.0.0.1"]\n'
    out = tools.place / "sub" / "table.json"
    rc, said, err = tools.run(
        write(tools, text), "--ranktable-path", str(out), "--remote-shell", "ssh -o BatchMode=yes"
    )
    assert (rc, err) == (0, "")
    assert said == f"{out}: written\n"
    made = json.loads(out.read_text())
    listed = [(it["server_id"], it["device_ip"]) for it in made["prefill_device_list"] + made["decode_device_list"]]
    assert listed == [
        ("127.0.0.1", "10.1.0.0"), ("127.0.0.1", "10.1.0.1"), ("203.0.113.2", "10.2.0.0"), ("203.0.113.2", "10.2.0.1"),
    ]  # fmt: skip
    assert (tools.place / "ssh").read_text() == "203.0.113.2\n"


def test_a_table_that_is_there_stays(tools: Tools) -> None:
    path = tools.place / "table.json"
    path.write_text("mine")
    file = write(tools, ONE_NODE)
    assert tools.run(file, "--ranktable-path", str(path))[0] == 0
    assert path.read_text() == "mine"
    assert tools.run(file, "--ranktable-path", str(path), GEN_RANKTABLE="1")[0] == 0
    assert json.loads(path.read_text())["status"] == "completed"


NODES = ["--prefill-device-cnt", "1", "--decode-device-cnt", "1", "--ips"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ips", "127.0.0.1"], "--prefill-device-cnt is needed"),
        (["--ips", "127.0.0.1", "--prefill-device-cnt", "1", "--decode-device-cnt", "9"], "more than the 8 devices"),
        (
            ["--ips", "203.0.113.1", "--prefill-device-cnt", "1", "--decode-device-cnt", "1"],
            "none of --ips 203.0.113.1 is",
        ),
        (
            [
                "--ips",
                "127.0.0.1",
                "--prefill-device-cnt",
                "1",
                "--decode-device-cnt",
                "1",
                "--local-device-ids",
                "0;1",
            ],
            "--local-device-ids 0;1: give numbers with commas between them, such as 0,1",
        ),
        (
            ["--ips", "127.0.0.1", "--prefill-device-cnt", "1", "--decode-device-cnt", "1", "--local-device-ids", "8"],
            "--local-device-ids 8: give each of this node's 0 to 7 once at most",
        ),
        (
            [*NODES, "127.0.0.1", "203.0.113.1", "--local-host", "127.0.0.1", "--port", "PORT", "--timeout-s", "0.5"],
            "nothing came from 203.0.113.1 within 0.5 s; run the same command on every node at once",
        ),
        ([], "give FILE, or --ips of all nodes, one of the two"),
        (["f.toml", "--local-device-ids", "0,1"], "--local-device-ids goes with --ips; f.toml says it"),
    ],
)
def test_a_wrong_call_is_answered(tools: Tools, words: list[str], said: str) -> None:
    path = tools.place / "table.json"
    words = [str(free_port()) if word == "PORT" else word for word in words]
    rc, _, err = tools.run(*words, "--ranktable-path", str(path))
    assert rc in (1, 2)
    assert said in err and err.count("\n") == 1
    assert not path.exists()


def test_a_device_without_an_address_is_named(tools: Tools) -> None:
    rc, _, err = tools.run(write(tools, ONE_NODE), KIND="none")
    assert rc == 1
    assert "hccn_tool on 127.0.0.1 says no ipaddr of device 0 (it says: nothing)" in err


def test_absent_tools_are_named(tools: Tools) -> None:
    (tools.place / "bin" / "hccn_tool").unlink()
    rc, _, err = tools.run(write(tools, ONE_NODE))
    assert rc == 1
    assert "hccn_tool is not on 127.0.0.1: mount it into the container" in err


def test_a_plan_has_the_table_where_the_file_says_the_addresses() -> None:
    ips = ", ".join(f'"10.9.0.{i}"' for i in range(8))
    text = LLMDATADIST.replace('"127.0.0.1" }', f'"127.0.0.1", device_ips = [{ips}] }}')
    text = text.replace('"127.0.0.2" }', f'"127.0.0.2", device_ips = [{ips}] }}')
    (file,) = deployment_plan(parse(text, "f")).processes[0].files
    made = json.loads(file.text or "")
    assert [it["device_ip"] for it in made["prefill_device_list"]] == ["10.9.0.0", "10.9.0.1"]


def test_seed_001_has_an_entry_for_each_of_its_chips() -> None:
    """gen_ranktable.sh's arguments in the seed: four nodes of eight, 16 chips prefill and 16 decode."""
    said = json.loads((Path(__file__).parent / "seeds" / "deepseek-r1-2p2d-llmdatadist.json").read_text())["ranktable"]
    ips = said[said.index("--ips") + 1 : said.index("--npus-per-node")]
    plan = deployment_plan(load(DIRECTORY / "deepseek-r1-2p2d-llmdatadist.toml"))
    order = {role: [it.node for it in plan.processes if it.role == role] for role in ("prefill", "decode")}
    assert order["prefill"] + order["decode"] == ips
    for role, flag in (("prefill", "--prefill-device-cnt"), ("decode", "--decode-device-cnt")):
        assert sum(len(it.devices) for it in plan.processes if it.role == role) == int(said[said.index(flag) + 1])


def test_devices_that_are_left_over_are_left_out() -> None:
    made = table([Entry("a", 0, "i"), Entry("a", 1, "j"), Entry("b", 0, "k")], 1, 1, 2)
    assert [len(made[f"{role}_device_list"]) for role in ("prefill", "decode")] == [1, 1]
    assert made["server_count"] == "2"
