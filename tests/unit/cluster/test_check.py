"""`pd-cluster check` against stand-ins for hccn_tool, npu-smi and what else a node answers with."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from engine_adapter.cluster import cli, node_probes
from engine_adapter.cluster.deployment_plan import deployment_plan
from engine_adapter.cluster.deployment_rules import load
from tests.unit.cluster.deployments import DIRECTORY

TOOLS = Path(__file__).with_name("npu_tools")
A, B = "10.255.1.1", "10.255.1.2"
FILE = """
name = "checked"
node = [
  {{ address = "{a}", nic = "lo", hardware = "{hardware}", devices = 2{ips_a} }},
  {{ address = "{b}", nic = "lo", hardware = "{hardware}", devices = 2 }},
]
model = {{ path = "/m" }}
engine = {{ kind = "vllm-ascend", engine_version = "0.11.0" }}
connector = {{ name = "MooncakeConnectorV1" }}
proxy = {{ node = "{a}", port = 3999 }}
ports = {{ http = 3100, kv = 3200 }}
instance = [{{ role = "prefill", nodes = ["{a}"] }}, {{ role = "decode", nodes = ["{b}"] }}]
"""
Found = dict[tuple[str, str], dict[str, Any]]


class Check:
    """The command over two nodes behind a stand-in for ssh, all well until a fault is planted."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory, self._monkeypatch, self._capsys = directory, monkeypatch, capsys
        self.tools = directory / "bin"
        shutil.copytree(TOOLS, self.tools)
        (directory / "hccn.conf").write_text("address_0=1\n")
        (directory / "ascend").mkdir()
        (directory / "ascend" / "version.cfg").write_text("Version=8.2.RC1\n")
        monkeypatch.setenv("PATH", f"{self.tools}:/usr/bin:/bin")
        monkeypatch.setenv("FAULTS", str(directory))
        self.file = directory / "d.toml"
        self.write()

    def write(self, hardware: str = "A3", ips_a: str = "") -> None:
        self.file.write_text(FILE.format(a=A, b=B, hardware=hardware, ips_a=ips_a))

    def plant(self, name: str, text: str, status: int = 0) -> None:
        (self.directory / name).write_text(text)
        (self.directory / f"{name}.status").write_text(str(status))

    def run(self, *words: str) -> tuple[int, str, str]:
        shell = ("--remote-shell", str(self.tools / "remote_shell"))
        self._monkeypatch.setattr(sys, "argv", ["pd-cluster", "check", str(self.file), *shell, *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err

    def findings(self, *words: str) -> tuple[int, Found]:
        rc, out, err = self.run("--json", *words)
        assert err == ""
        return rc, {(it["node"], it["check"]): it for it in json.loads(out)}

    def asked(self) -> str:
        return (self.directory / "journal").read_text()


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    return Check(tmp_path, monkeypatch, capsys)


def test_all_is_well(check: Check) -> None:
    rc, found = check.findings()
    assert rc == 0, [it for it in found.values() if it["status"] == "failed"]
    assert {it["status"] for it in found.values()} == {"ok"}
    of_a = {name for node, name in found if node == A}
    assert of_a >= {"lldp", "link", "net_health", "netdetect", "gateway", "vnic", "tls", "hccn.conf", "spod-info"}
    assert of_a >= {f"ping {B}", "vllm-ascend", "torch of torch-npu", "CANN", "Mooncake", "shared memory", "nic"}
    assert {name for node, name in found if node == "all"} >= {"tls", "super pod", "vllm", "CANN", "Mooncake"}
    for device in (0, 1):  # hccs on A3; the other node's addresses are those it said itself
        assert f"{A} hccn_tool -i {device} -hccs_ping -g address 172.16.2.1" in check.asked()
    check.write("A2")
    rc, found = check.findings()
    assert rc == 0, [it for it in found.values() if it["status"] == "failed"]
    assert (A, "ip") in found and (A, "spod-info") not in found
    assert f"{B} hccn_tool -i 1 -ping -g address 172.16.1.0" in check.asked()


FAULTS = [
    (f"{A}-lldp-1", "nothing seen", "lldp", "warning", "device 1: nothing seen", "LLDP"),
    (f"{A}-link-0", "link status: DOWN", "link", "failed", "device 0: link status: DOWN", "cable"),
    (f"{A}-net_health-1", "net health status: Fault", "net_health", "failed", "device 1: net health", "VLAN"),
    (f"{A}-netdetect-0", "netdetect address:", "netdetect", "warning", "device 0: netdetect", "-netdetect -s"),
    (f"{A}-gateway-0", "no gateway", "gateway", "warning", "device 0: no gateway", "-gateway -s"),
    (f"{A}-vnic-1", "command failed", "vnic", "failed", "device 1: command failed", "-ip -s"),
    (f"{A}-tls-1", "tls switch[1]", "tls", "failed", "0 on device 0, 1 on device 1", "-tls -s enable 0"),
    (f"{A}-hccs_ping-1", "3 received, 100.00% packet loss", f"ping {B}", "failed", "device 1 to 172.16.2.0", "VLAN"),
    (f"{A}-hccn.conf", "", "hccn.conf", "failed", "absent or empty", "docker run -v"),
    (f"{A}-spod-1", "not supported", "spod-info", "failed", "device 1: not supported", 'hardware = "A2"'),
    (f"{A}-df", "shm 65536 0 65536 0% /dev/shm", "shared memory", "failed", "0.1 GiB", "--shm-size=1g"),
    (f"{A}-ip", "1: lo inet 10.9.9.9/8", "nic", "failed", "lo has 10.9.9.9, not", "--net=host"),
    (f"{A}-versions", "vllm 0.11.0\nvllm-ascend 0.9.1\n", "vllm-ascend", "failed", "0.9.1, the file has", "0.11.0"),
    (f"{A}-versions", "vllm 0.9.1\nvllm-ascend 0.11.0\n", "vllm of vllm-ascend", "failed", "vllm 0.9.1", "vllm"),
    (f"{A}-versions", "torch 2.5\ntorch-npu 2.7\n", "torch of torch-npu", "failed", "torch 2.5", "torch"),
    (f"{A}-versions", "torch 2.5\n", "torch-npu", "failed", "not installed", "install torch-npu"),
    (f"{A}-versions", "torch 2.5\n", "Mooncake", "failed", "not installed", "install Mooncake"),
    (f"{A}-unreachable", "", "reach", "failed", "Connection refused", f"--node {A}` there"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "text", "name", "status", "said", "remedy"), FAULTS)
def test_each_fault_is_named_with_its_remedy(
    check: Check, file: str, text: str, name: str, status: str, said: str, remedy: str
) -> None:
    check.plant(file, text)
    rc, found = check.findings()
    assert found[A, name]["status"] == status
    assert said in found[A, name]["said"] and remedy in found[A, name]["remedy"]
    assert rc == (1 if status == "failed" else 0)
    assert found[B, "link"]["status"] == "ok"


ALIKE = [
    ("tls", "-tls-0 -tls-1", "dev_id:0, tls switch[1]", "0 on 10.255.1.1, 1 on 10.255.1.2"),
    ("super pod", "-spod-0 -spod-1", "SDID : 1\nSuper Pod ID : 8", "7 on 10.255.1.1, 8 on 10.255.1.2"),
    ("torch", "-versions", "torch 2.7.2\ntorch-npu 2.7.1", "2.7.1 on 10.255.1.1, 2.7.2 on 10.255.1.2"),
]


@pytest.mark.parametrize(("name", "files", "text", "said"), ALIKE)
def test_nodes_that_are_unlike(check: Check, name: str, files: str, text: str, said: str) -> None:
    for file in files.split():
        check.plant(B + file, text)
    rc, found = check.findings()
    assert rc == 1
    assert (found["all", name]["status"], found["all", name]["said"]) == ("failed", said)


def test_a_tool_that_fails_or_hangs_is_a_failure_and_costs_its_time_once(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_probes, "HEAD", node_probes.HEAD.replace(f"-k 1 {node_probes.PROBE_TIMEOUT_S}", "-k 1 1"))
    check.plant(f"{A}-lldp-0", "no such device", status=255)
    (check.directory / f"{A}-link-1.hangs").touch()
    rc, found = check.findings()
    assert rc == 1
    assert found[A, "lldp"]["status"] == "failed"
    assert found[A, "lldp"]["said"] == "device 0: no such device (status 255)"
    assert (found[A, "link"]["status"], found[A, "link"]["said"]) == ("failed", "device 1: no answer in time")


def test_the_files_addresses_are_held_against_the_devices(check: Check) -> None:
    check.write("A2", ', device_ips = ["172.16.1.0", "172.16.1.9"]')
    rc, found = check.findings()
    assert rc == 1
    assert found[A, "ip"]["said"] == "device 1: 172.16.1.1, the file has 172.16.1.9"
    assert "address_0 is 1, the file has 172.16.1.0" in found[A, "hccn.conf"]["said"]


def test_ports_that_are_taken(check: Check) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 3200))
        other.listen()
        rc, found = check.findings()
    assert rc == 1
    assert found[A, "ports"]["said"] == "listened on already: 3200 (prefill-0's KV)"
    check.file.write_text(check.file.read_text().replace("kv = 3200", "kv = 40000"))
    rc, found = check.findings()
    assert rc == 0
    low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    if int(low) <= 40000 <= int(high):
        assert "ip_local_reserved_ports=40000" in found[A, "ephemeral ports"]["remedy"]


@pytest.mark.parametrize(("port", "whose"), [(15500, "Mooncake"), (20100, "ADXL")])
def test_ports_of_mooncake_and_adxl_are_refused(check: Check, port: int, whose: str) -> None:
    text = check.file.read_text().replace("port = 3999", f"port = {port}")
    check.file.write_text(text)
    rc, out, err = check.run()
    assert (rc, out) == (2, "")
    assert f"proxy.port = {port}" in err and whose in err


def test_without_the_tools_it_says_so_and_checks_the_rest(check: Check) -> None:
    for tool in ("hccn_tool", "npu-smi", "python3", "ip"):
        (check.tools / tool).unlink()
    here = [path for path in ("python3", "ip") if shutil.which(path)]
    rc, found = check.findings()
    for tool in ("hccn_tool", "npu-smi"):
        assert found[A, tool]["status"] == "unknown" and "mount" in found[A, tool]["remedy"]
    assert not [name for _, name in found if name in ("link", "tls") or name.startswith("ping")]
    assert found[A, "shared memory"]["status"] == "ok"
    assert found[A, "ports"]["status"] == "ok"
    assert rc == 0 or here


def test_of_one_node_the_table_says_what_is_not_known(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE", A)
    monkeypatch.setenv("HCCN_CONF_PATH", str(check.directory / "hccn.conf"))
    monkeypatch.setenv("ASCEND_HOME_PATH", str(check.directory / "ascend"))
    rc, out, _ = check.run("--node", A)
    assert rc == 0
    lines = out.splitlines()
    assert re.split(r"\s{2,}", lines[0]) == ["node", "check", "found"]
    (ping,) = [line for line in lines if f"ping {B}" in line]
    assert "the addresses of its devices are not known -> say node.device_ips" in ping
    assert re.fullmatch(r"\d+ ok, 1 unknown", lines[-1])
    assert B not in check.asked()


@pytest.mark.parametrize("name", ["qwen2.5-vl-1p1d", "deepseek-v3.1-2p1d-mooncake"])
def test_it_asks_all_that_the_plans_own_lines_ask(name: str) -> None:
    deployment = load(DIRECTORY / f"{name}.toml")
    for node, checks in zip(deployment.node, deployment_plan(deployment).checks, strict=True):
        asked = node_probes.facts_script(node) + node_probes.ping_script(node, {"other": ["x.x.x.x"]})
        for option in re.findall(r"hccn_tool -i \$i -(\w+)", "\n".join(checks.lines)):
            assert all(f'"$HCCN" -i {device} -{option} -g' in asked for device in range(node.devices))
        assert ("spod-info" in "\n".join(checks.lines)) <= ("npu-smi info -t spod-info -i 7 -c 1" in asked)
        assert "hccn.conf" in asked


def test_a_node_that_is_not_there(check: Check) -> None:
    rc, _, err = check.run("--node", "10.255.1.3")
    assert rc == 2
    assert "has no such node; did you mean" in err
    assert not os.path.exists(check.directory / "journal")
