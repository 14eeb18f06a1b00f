"""What a plan tells our own programs is what they take: the proxy, torch_engine, the vLLM connector."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings

from engine_adapter.cluster.deployment import Deployment
from engine_adapter.cluster.deployment_plan import deployment_plan
from engine_adapter.cluster.deployment_rules import load, parse, wrong_with
from engine_adapter.torch_engine.config import EngineConfig
from engine_adapter.torch_engine.flags import UsageParser, add_flags, read_flags
from engine_adapter.torch_engine.server_config import ServerConfig
from proxy.cli import read_config
from tests.unit.cluster.deployments import DIRECTORY, FILES, NAMES, SMALL, made_up
from tests.unit.engine_adapter.vllm_connector import fake_vllm

SETTINGS = DIRECTORY.parents[1] / "engine_adapter" / "vllm_connector" / "settings.py"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_proxy_takes_its_flags(path: Path) -> None:
    plan = deployment_plan(load(path))
    config = read_config(plan.proxy.argv[1:])
    for role, listed in (("prefill", config.prefillers), ("decode", config.decoders)):
        serving = [process.serves for process in plan.processes if process.role == role and process.serves]
        assert [str(address) for address in listed] == serving


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(made_up())
def test_the_proxy_takes_the_flags_of_any_deployment(deployment: Deployment) -> None:
    assume(not wrong_with(deployment))
    plan = deployment_plan(deployment)
    assert len(read_config(plan.proxy.argv[1:]).decoders) == sum(
        1 for process in plan.processes if process.role == "decode" and process.serves
    )


def test_a_layerwise_proxy_on_all_addresses_says_where_it_is() -> None:
    text = SMALL.replace("MooncakeConnectorV1", "MooncakeLayerwiseConnector")
    text = text.replace("port = 8000", 'port = 8000, host = "0.0.0.0"')
    config = read_config(deployment_plan(parse(text, "f")).proxy.argv[1:])
    assert (config.contract, config.advertise_url) == ("layerwise", "http://10.0.0.1:8000")


def test_torch_engine_takes_its_flags() -> None:
    text = SMALL.replace("vllm-ascend", "torch").replace("MooncakeConnectorV1", "BatonConnector").replace("tp = 2", "")
    parser = UsageParser()
    add_flags(parser, EngineConfig, "engine")
    add_flags(parser, ServerConfig, "server")
    for process in deployment_plan(parse(text, "f")).processes:
        if process.kind == "engine":
            given = parser.parse_args(process.argv[2:])
            server = read_flags(parser, ServerConfig, given)
            assert (server.sidecar_listen, server.port) == (f"{process.node}:36000", process.ports[0][0])


@pytest.fixture(scope="module")
def connector_settings() -> ModuleType:
    """By its path; the package it is in needs vLLM, which is faked where no other test has done so."""
    if "vllm" not in sys.modules:
        fake_vllm.install((0, 32))
    spec = importlib.util.spec_from_file_location("connector_settings", SETTINGS)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["connector_settings"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", [it for it in FILES if it.stem.endswith("-baton")], ids=lambda path: path.stem)
def test_our_connector_takes_its_settings(path: Path, connector_settings: ModuleType) -> None:
    sockets: set[tuple[str, object]] = set()
    engines = [process for process in deployment_plan(load(path)).processes if process.kind == "engine"]
    for process in engines:
        config: dict[str, Any] = json.loads(process.argv[process.argv.index("--kv-transfer-config") + 1])
        ours = config
        if config["kv_connector"] == "MultiConnector":
            ours = config["kv_connector_extra_config"]["connectors"][0]
        read = connector_settings.settings_from(ours["kv_role"], ours["kv_connector_extra_config"])
        assert read.listen.rpartition(":")[0] == process.node
        sockets.add((process.node, connector_settings.socket_of(read, process.engine_id, 0, 0)))
    assert len(sockets) == len(engines)


def test_the_documents_example_is_a_deployment() -> None:
    text = (DIRECTORY.parents[1] / "docs" / "deployments.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    parse(example, "docs/deployments.md")
