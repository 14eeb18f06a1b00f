"""From a file to its processes: golden output for the repository's files, properties for made-up ones."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings

from engine_adapter.cluster.allocation import reserved
from engine_adapter.cluster.deployment import Deployment
from engine_adapter.cluster.deployment_plan import deployment_plan
from engine_adapter.cluster.deployment_rules import load, parse, wrong_with
from engine_adapter.cluster.plan_output import as_json
from engine_adapter.cluster.processes import DeploymentPlan, Process, expanded
from engine_adapter.cluster.shell_script import script
from tests.unit.cluster.deployments import FILES, NAMES, SMALL, made_up

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_plan_is_as_it_was(path: Path) -> None:
    """UPDATE_GOLDEN=1 writes them anew; read the difference before you commit it."""
    said = script(deployment_plan(load(path)), f"configs/deployments/{path.name}")
    golden = GOLDEN / f"{path.stem}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(said)
    assert said == golden.read_text()


def test_no_golden_file_is_left_over() -> None:
    assert sorted(path.stem for path in GOLDEN.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_bash_can_read_every_script(path: Path) -> None:
    plan = deployment_plan(load(path))
    for node in (None, *plan.nodes):
        text = script(plan, str(path), node)
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_json_says_the_same(path: Path) -> None:
    plan = deployment_plan(load(path))
    said = json.loads(as_json(plan))
    assert [tuple(it["argv"]) for it in said["processes"]] == [it.argv for it in plan.processes]
    of_node = json.loads(as_json(plan, plan.nodes[0]))
    assert {it["node"] for it in of_node["processes"]} == {plan.nodes[0]}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(made_up())
def test_nothing_is_used_twice_and_everybody_has_peers(deployment: Deployment) -> None:
    assume(not wrong_with(deployment))
    plan = deployment_plan(deployment)
    assert plan == deployment_plan(deployment)
    for node in plan.nodes:
        _no_port_twice(deployment, plan.of_node(node), node)
        devices = Counter(device for process in plan.of_node(node) for device in process.devices)
        assert not [device for device, times in devices.items() if times > 1]
    assert max(Counter(process.name for process in plan.processes).values()) == 1
    engines = [process for process in plan.processes if process.kind == "engine"]
    _ranks_are_complete(engines)
    _engine_ids_differ(engines)
    _proxy_lists_the_api_servers(plan, engines)


def _no_port_twice(deployment: Deployment, processes: tuple[Process, ...], node: str) -> None:
    ports = Counter(port for process in processes for port, _ in process.ports)
    assert not [port for port, times in ports.items() if times > 1]
    assert not [port for port in ports if not 0 < port < 65536 or reserved(deployment, node, port)]


def _ranks_are_complete(engines: list[Process]) -> None:
    for instance in {process.instance for process in engines}:
        share = [process for process in engines if process.instance == instance]
        ranks = sorted(rank for process in share for rank in process.dp_ranks)
        assert ranks == list(range(len(ranks)))
        assert len({_value(process, "--data-parallel-address") for process in share}) == 1
        assert {_value(process, "--data-parallel-size") for process in share} <= {None, str(len(ranks))}
        assert len({_value(process, "--data-parallel-rpc-port") for process in share}) == 1
        if len(ranks) > 1:
            assert _value(share[0], "--data-parallel-address") == share[0].node
            assert 0 in share[0].dp_ranks
        assert any(process.serves for process in share)


def _engine_ids_differ(engines: list[Process]) -> None:
    """On the wire: vLLM appends the data-parallel rank to what is configured."""
    wire = Counter((process.engine_id, rank) for process in engines for rank in process.dp_ranks)
    assert max(wire.values()) == 1
    owners = {(process.engine_id, process.instance) for process in engines}
    assert len(owners) == len({engine_id for engine_id, _ in owners})


def _proxy_lists_the_api_servers(plan: DeploymentPlan, engines: list[Process]) -> None:
    for role, flag in (("prefill", "prefiller"), ("decode", "decoder")):
        hosts, ports = (_values(plan.proxy, f"--{flag}-{what}") for what in ("hosts", "ports"))
        listed = [f"{host}:{port}" for host, port in zip(hosts, ports, strict=True)]
        assert listed == [process.serves for process in engines if process.role == role and process.serves]
    for process in engines:
        assert bool(process.serves) == ("--headless" not in process.argv)
    assert set(plan.proxy.after) == {process.name for process in engines if process.serves}


def _value(process: Process, flag: str) -> str | None:
    return process.argv[process.argv.index(flag) + 1] if flag in process.argv else None


def _values(process: Process, flag: str) -> list[str]:
    rest = process.argv[process.argv.index(flag) + 1 :]
    end = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    return list(rest[:end])


def test_every_kv_port_is_where_the_connector_looks_for_it() -> None:
    """MooncakeConnectorV1: kv_port + global rank * tp; all ranks are told the same kv_port."""
    plan = deployment_plan(load(next(path for path in FILES if path.stem == "deepseek-v3.1-2p1d-mooncake")))
    decoders = [process for process in plan.processes if process.role == "decode"]
    told = {json.loads(process.argv[-1])["kv_port"] for process in decoders}
    assert told == {36000}
    assert [process.ports[-1][0] for process in decoders] == list(range(36000, 36032))


def test_a_version_selects_names_and_keys() -> None:
    text = (
        SMALL.replace("MooncakeConnectorV1", "LLMDataDistCMgrConnector")
        .replace('version = "0.11.0"', 'version = "VERSION"')
        .replace('connector = { name = "LLM', 'connector = { module_path = true, name = "LLM')
    )
    names = {}
    for version in ("0.9.1", "0.10.1rc1", "0.11.0"):
        process = deployment_plan(parse(text.replace("VERSION", version), "f")).processes[0]
        names[version] = [name for name in process.env if name.endswith("LLMDD_RPC_PORT")]
        config = json.loads(process.argv[-1])
        assert config["kv_connector_module_path"] == "vllm_ascend.distributed.llmdatadist_c_mgr_connector"
        assert config["kv_parallel_size"] == 1
    new = ["VLLM_ASCEND_LLMDD_RPC_PORT"]
    assert names == {"0.9.1": ["VLLM_LLMDD_RPC_PORT"], "0.10.1rc1": new, "0.11.0": new}


def test_the_mooncake_modules_moved_in_0_14() -> None:
    text = SMALL.replace("connector = { name", "connector = { module_path = true, name")
    process = deployment_plan(parse(text.replace("0.11.0", "0.18.0"), "f")).processes[0]
    module = json.loads(process.argv[-1])["kv_connector_module_path"]
    assert module == "vllm_ascend.distributed.kv_transfer.kv_p2p.mooncake_connector"


def test_a_value_may_refer_to_the_environment_outside() -> None:
    assert expanded("/a:${P}", {"P": "/b"}) == "/a:/b"
    assert expanded("/a:${P}", {}) == "/a"
    assert expanded("${P}:/a", {"P": ""}) == "/a"
    assert expanded("/a:${P}:/c", {}) == "/a:/c"
    assert expanded("/a:${P}:/c", {"P": "/b"}) == "/a:/b:/c"
    assert expanded("x${P}y", {"P": "/b"}) == "x/by"


def test_quotes_in_a_file_stay_data() -> None:
    """Nothing a file says is a command to the shell."""
    evil = "'; touch /tmp/evil; echo '$(touch /tmp/evil)`x`\"${HOME}"
    text = SMALL.replace('path = "/m"', f"path = {json.dumps(evil)}") + f"\n[engine.env]\nX = {json.dumps(evil)}\n"
    text = text.replace('engine = { kind = "vllm-ascend", engine_version = "0.11.0" }', "") + (
        '[engine]\nkind = "vllm-ascend"\nengine_version = "0.11.0"\n'
    )
    plan = deployment_plan(parse(text, "f"))
    lines = script(plan, "f", "10.0.0.1").splitlines()
    exported = next(line for line in lines if line.startswith("export X="))
    shown = subprocess.run(
        ["bash", "-c", f'{exported}\nprintf %s "$X"'], env={"HOME": "/h"}, capture_output=True, text=True, timeout=60
    )
    assert shown.stdout == evil.replace("${HOME}", "/h")
    served = next(line for line in lines if line.startswith("exec vllm serve"))
    assert shlex.split(served.removesuffix(" \\"))[3] == evil


def test_a_node_may_have_an_ipv6_address() -> None:
    plan = deployment_plan(parse(SMALL.replace("10.0.0.", "fd00::"), "f"))
    assert plan.processes[0].serves == "[fd00::1]:13700"
    assert _value(plan.processes[0], "--host") == "::"
    assert _values(plan.proxy, "--prefiller-hosts") == ["fd00::1"]
    assert "ready decode-0 'http://[fd00::2]:13700/health'" in script(plan, "f", "fd00::1")


PUSHES = '{ name = "BatonConnector", extra = { contract = "layerwise" } }'


def test_an_engine_of_torch_has_its_sidecar_beside_it() -> None:
    text = SMALL.replace("vllm-ascend", "torch").replace("MooncakeConnectorV1", "BatonConnector").replace("tp = 2", "")
    text = text.replace('address = "10.0.0.1"', 'address = "10.0.0.1", hardware = "cpu"')
    process = deployment_plan(parse(text, "f")).processes[0]
    assert process.argv[:2] == ("pd-engine", "serve")
    assert _value(process, "--sidecar-listen") == "10.0.0.1:36000"
    assert _value(process, "--device") == "cpu"


def test_our_connector_of_vllm_is_told_to_push_and_so_is_the_proxy() -> None:
    text = SMALL.replace("tp = 2", "").replace('{ name = "MooncakeConnectorV1" }', PUSHES)
    plan = deployment_plan(parse(text, "f"))
    assert _value(plan.proxy, "--contract") == "layerwise"
    kv = json.loads(_value(plan.processes[0], "--kv-transfer-config"))
    assert kv["kv_connector_extra_config"]["contract"] == "layerwise"
    assert _value(deployment_plan(parse(text.replace("layerwise", "pull"), "f")).proxy, "--contract") == "pull"
