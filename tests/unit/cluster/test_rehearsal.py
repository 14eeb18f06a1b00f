"""What a rehearsal makes of a plan."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.mock_engine import parser as mock_parser
from engine_adapter.cluster import rehearsal_up
from engine_adapter.cluster.deployment_plan import deployment_plan
from engine_adapter.cluster.deployment_rules import load, parse
from engine_adapter.cluster.errors import ClusterError
from engine_adapter.cluster.rehearsal import Engines, Stage, aliases, instances, left_out, places, rehearsal
from proxy.cli import read_config
from tests.unit.cluster.deployments import DIRECTORY, FILES, NAMES, SMALL

MOCK = (sys.executable, "-m", "bench.mock_engine")


def stage(engines: Engines, moved: dict[tuple[str, int], int] | None = None) -> Stage:
    return Stage(engines, "/tiny", MOCK, {"PATH": "/bin"}, moved or {}, "nixl")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_file_has_a_rehearsal_whose_proxy_and_engines_agree(path: Path) -> None:
    plan = deployment_plan(load(path))
    share = rehearsal(plan, "m", stage("mock"))
    engines, proxy = share.processes
    told = mock_parser().parse_args(engines.argv[len(MOCK) :])
    config = read_config(proxy.argv[1:])
    for role, listed, stood in (
        ("prefill", config.prefillers, told.prefill_at),
        ("decode", config.decoders, told.decode_at),
    ):
        assert [str(address) for address in listed] == stood
        planned = [process for process in instances(plan) if process.role == role]
        assert [it.rpartition(":")[2] for it in stood] == [it.serves.rpartition(":")[2] for it in planned]
    assert config.contract == told.contract
    assert len(set(told.prefill_at + told.decode_at)) == len(instances(plan))
    assert share.elsewhere == {} and share.files == ()
    torch = rehearsal(plan, "m", stage("torch"))
    assert len(torch.processes) == len(instances(plan)) + 1
    assert read_config(torch.processes[-1].argv[1:]).contract == "pull"


def test_a_taken_port_is_another_one_everywhere() -> None:
    plan = deployment_plan(parse(SMALL, "f"))
    alias = aliases(plan)["10.0.0.2"]
    for engines in ("mock", "torch"):
        share = rehearsal(plan, "m", stage(engines, {(alias, 13700): 17001}))  # type: ignore[arg-type]
        assert str(read_config(share.processes[-1].argv[1:]).decoders[0]) == f"{alias}:17001"
        assert f"{alias}:13700" not in " ".join(share.processes[-2].argv)
    wanted = {(host, port) for _, host, port in places(plan, "torch")}
    assert (alias, 13700) in wanted and (alias, 36000) in wanted


def test_stores_and_headless_engines_are_left_out() -> None:
    plan = deployment_plan(load(DIRECTORY / "deepseek-r1-2p2d-llmdatadist.toml"))
    assert left_out(plan) == ["prefill-0-node1", "decode-0-node1"]
    plan = deployment_plan(load(DIRECTORY / "qwq-32b-ucm-mooncake.toml"))
    assert left_out(plan) == ["mooncake_master"]


def test_bootstrap_ports_are_the_mock_engines_own() -> None:
    text = SMALL.replace('kind = "vllm-ascend", engine_version = "0.11.0"', 'kind = "vllm", engine_version = "0.23.0"')
    text = text.replace("MooncakeConnectorV1", "MooncakeConnector")
    text = text.replace('address = "10.0.0.1"', 'address = "10.0.0.1", hardware = "gpu"')
    text = text.replace('address = "10.0.0.2"', 'address = "10.0.0.2", hardware = "gpu"')
    share = rehearsal(deployment_plan(parse(text, "f")), "m", stage("mock"))
    proxy = share.processes[-1].argv
    assert proxy[proxy.index("--prefiller-bootstrap-ports") + 1] == proxy[proxy.index("--prefiller-ports") + 1]
    assert share.processes[0].argv[-2:] == ("--num-ranks", "1")


def test_layerwise_decoders_may_call_from_any_loopback_address_beside_whom_the_file_allows() -> None:
    text = SMALL.replace("MooncakeConnectorV1", "MooncakeLayerwiseConnector")
    for args, expected in ((", args = { metaserver-allow = '10.1.0.0/16' }", {"10.1.0.0/16"}), ("", set())):
        given = text.replace("port = 8000", f"port = 8000{args}")
        share = rehearsal(deployment_plan(parse(given, "f")), "m", stage("mock"))
        allowed = read_config(share.processes[-1].argv[1:]).metaserver_allow
        assert set(allowed) == {"127.0.0.0/8", *expected}


def test_mock_engines_are_in_a_checkout_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = deployment_plan(load(DIRECTORY / "deepseek-v3.1-2p1d-layerwise.toml"))
    assert rehearsal_up._engines(plan, "auto") == "mock"
    assert rehearsal_up._engines(deployment_plan(parse(SMALL, "f")), "auto") == "torch"
    monkeypatch.setattr(rehearsal_up, "CHECKOUT", tmp_path)
    with pytest.raises(ClusterError, match=r"rehearse from a checkout, or give --engine torch"):
        rehearsal_up._engines(plan, "auto")
    assert rehearsal_up._engines(plan, "torch") == "torch"


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("qwen2.5-vl-1p1d", "qwen2_5_vl"),
        ("qwen3-30b-1p2d-llmdatadist", "qwen3_moe"),
        ("qwq-32b-ucm-mooncake", "qwen3"),
    ],
)
def test_the_tiny_model_is_of_the_deployments_kind(name: str, family: str) -> None:
    """So that its own request, with an image, is answered in the rehearsal, too."""
    assert rehearsal_up.model_of(load(DIRECTORY / f"{name}.toml")).family == family
