"""The script a plan prints, really run by bash with stand-ins on PATH that write down argv and environment."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_adapter.cluster.deployment_plan import deployment_plan
from engine_adapter.cluster.deployment_rules import parse
from engine_adapter.cluster.processes import DeploymentPlan
from engine_adapter.cluster.shell_script import script
from engine_adapter.cluster.shell_words import quoted
from tests.unit.cluster.deployments import FILES, NAMES, SMALL

RECORDER = """#!/bin/bash -p
{ printf '%s\\0' "${0##*/}" "$@" END_OF_ARGV; env -0; } > "$RECORDS/$BASHPID.part"
mv "$RECORDS/$BASHPID.part" "$RECORDS/$BASHPID"
"""
CURL = '#!/bin/bash\nprintf "%s\\n" "$*" >> "$RECORDS/../curl"\n'
THIRD_TIME_LUCKY = """#!/bin/bash
printf '%s\\n' "${!#}" >> "$RECORDS/../curl"
[ "$(wc -l < "$RECORDS/../curl")" -gt 2 ]
"""
RANKTABLE = '#!/bin/bash\nprintf "%s\\n" "$*" >> "$RECORDS/../ranktable"; : > "${!#}"\n'
IGNORED = {"PWD", "OLDPWD", "SHLVL", "_", "BASHPID"}

Record = tuple[tuple[str, ...], dict[str, str]]


class Sandbox:
    def __init__(self, place: Path) -> None:
        self.place = place
        for name in ("bin", "records", "run"):
            (place / name).mkdir()
        for tool in ("vllm", "pd-proxy", "pd-engine", "mooncake_master", "hccn_tool", "npu-smi", "ais_bench"):
            self.tool(tool, RECORDER)
        self.tool("curl", CURL)
        self.tool("pd-cluster", RANKTABLE)
        self.env = {
            "PATH": f"{place}/bin:/usr/bin:/bin",
            "RECORDS": str(place / "records"),
            "READY_INTERVAL_S": "0.1",
            "HOME": "/root",
            "LD_LIBRARY_PATH": "/outer/lib",
            "http_proxy": "http://outer:3128",
        }

    def tool(self, name: str, text: str) -> None:
        (self.place / "bin" / name).write_text(text)
        (self.place / "bin" / name).chmod(0o755)

    def run(self, text: str, *words: str) -> subprocess.CompletedProcess[str]:
        (self.place / "run" / "plan.sh").write_text(text)
        command = ["bash", "plan.sh", *words]
        return subprocess.run(
            command, cwd=self.place / "run", env=self.env, capture_output=True, text=True, timeout=120
        )

    def records(self) -> list[Record]:
        found = []
        for path in (self.place / "records").iterdir():
            said = path.read_text().split("\0")
            end = said.index("END_OF_ARGV")
            env = dict(line.partition("=")[::2] for line in said[end + 1 :] if line)
            found.append((tuple(said[:end]), {key: env[key] for key in env if key not in IGNORED}))
            path.unlink()
        return found


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.fixture
def master() -> Iterator[None]:
    """What a script waits for before engines that use the Mooncake store."""
    with socket.create_server(("127.0.10.1", 50088)):
        yield


def plan_of(path: Path, place: Path) -> tuple[DeploymentPlan, str]:
    """With addresses and directories that a test may use."""
    text = path.read_text().replace("192.168.10.", "127.0.10.").replace("/vllm-workspace", f"{place}/vllm-workspace")
    return deployment_plan(parse(text.replace("/path_to_jemalloc/libjemalloc.so", ""), str(path))), text


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_script_starts_what_the_plan_says(path: Path, sandbox: Sandbox, master: None) -> None:
    plan, _ = plan_of(path, sandbox.place)
    if any(file.text is None for process in plan.processes for file in process.files):
        (sandbox.place / "vllm-workspace/vllm-ascend/examples/disaggregated_prefill_v1").mkdir(parents=True)
    for node in plan.nodes:
        done = sandbox.run(script(plan, str(path)), node)
        assert (done.returncode, done.stderr) == (0, "")
        wanted = [
            (it.argv, {key: value for key, value in it.environment(sandbox.env).items() if key not in IGNORED})
            for it in plan.of_node(node)
        ]
        assert sorted(sandbox.records(), key=str) == sorted(wanted, key=str)
        for process in plan.of_node(node):
            assert (sandbox.place / "run" / f"{process.name}.log").exists()
            for file in process.files:
                there = sandbox.place / "run" / file.path
                assert there.read_text() == (file.text or "")


def test_a_rank_table_is_made_once_and_only_where_there_is_none(sandbox: Sandbox) -> None:
    path = next(it for it in FILES if it.stem == "qwen3-30b-1p2d-llmdatadist")
    plan, _ = plan_of(path, sandbox.place)
    for _ in range(2):
        assert sandbox.run(script(plan, "some/FILE.toml", "192.0.0.2")).returncode == 0
    made = (sandbox.place / "ranktable").read_text().splitlines()
    assert made == ["ranktable some/FILE.toml --ranktable-path ./ranktable.json"]


def test_the_proxy_waits_for_every_api_server(sandbox: Sandbox) -> None:
    sandbox.tool("curl", THIRD_TIME_LUCKY)
    plan = deployment_plan(parse(SMALL, "f"))
    done = sandbox.run(script(plan, "f", "10.0.0.1"))
    assert done.returncode == 0
    asked = (sandbox.place / "curl").read_text().splitlines()
    prefill, decode = "http://10.0.0.1:13700/health", "http://10.0.0.2:13700/health"
    assert asked == [prefill, prefill, prefill, decode]
    assert "waiting for prefill-0" in done.stderr
    assert "pd-proxy" in [argv[0] for argv, _ in sandbox.records()]


def test_checks_requests_and_benchmarks_run(sandbox: Sandbox) -> None:
    path = next(it for it in FILES if it.stem == "deepseek-v3.1-2p1d-mooncake")
    plan, _ = plan_of(path, sandbox.place)
    text = script(plan, str(path))
    sandbox.run(text, "192.0.0.1", "check")
    checked = {" ".join(argv) for argv, _ in sandbox.records()}
    for i in range(16):
        assert {f"hccn_tool -i {i} -{what} -g" for what in ("lldp", "link", "net_health", "vnic", "tls")} <= checked
    assert {f"npu-smi info -t spod-info -i {i} -c {c}" for i in range(8) for c in (0, 1)} <= checked
    assert sandbox.run(text, "request").returncode == 0
    assert (sandbox.place / "curl").read_text() == (
        "http://192.0.0.1:1999/v1/completions -H Content-Type: application/json -d "
        '{"model": "ds_r1", "prompt": "Who are you?", "max_tokens": 100, "temperature": 0}\n'
    )
    assert sandbox.run(text, "bench").returncode == 0
    ((argv, env),) = sandbox.records()
    assert plan.bench is not None
    assert argv == plan.bench.argv
    assert argv[:3] == ("ais_bench", "--models", "vllm_api_stream_chat")
    assert "http_proxy" not in env


def test_peers_are_pinged_whose_devices_are_known(sandbox: Sandbox) -> None:
    ips = ", ".join(f'"10.1.0.{i}"' for i in range(8))
    text = SMALL.replace('{ address = "10.0.0.2" }', f'{{ address = "10.0.0.2", device_ips = [{ips}] }}')
    sandbox.run(script(deployment_plan(parse(text, "f")), "f"), "10.0.0.1", "check")
    checked = {" ".join(argv) for argv, _ in sandbox.records()}
    assert "hccn_tool -i 7 -ping -g address 10.1.0.7" in checked


@pytest.mark.parametrize("words", [["nowhere"], []])
def test_a_wrong_word_is_answered_by_the_right_ones(sandbox: Sandbox, words: list[str]) -> None:
    done = sandbox.run(script(deployment_plan(parse(SMALL, "f")), "f"), *words)
    assert done.returncode == 2
    assert "10.0.0.1 10.0.0.2" in done.stderr
    assert not sandbox.records()


def test_an_empty_search_path_gets_no_empty_entry() -> None:
    """An empty entry of LD_LIBRARY_PATH is the current directory."""
    for value in ("/a:${P}", "${P}:/a", "/a:${P}:/c", "x${P}y", "a b:${P}", '"$(x)`":${P}'):
        for outer in ("", "/o"):
            command = f'X={quoted(value)}; printf %s "$X"'
            words = ["bash", "-c", command]
            shown = subprocess.run(words, env={"P": outer}, capture_output=True, text=True, timeout=60)
            wanted = {
                "/a:${P}": "/a", "${P}:/a": "/a", "/a:${P}:/c": "/a:/c", "x${P}y": "xy", "a b:${P}": "a b",
                '"$(x)`":${P}': '"$(x)`"',
            }[value] if not outer else value.replace("${P}", outer)  # fmt: skip
            assert shown.stdout == wanted
