"""Our connector behind another proxy, and other connectors behind ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.deployment import free_port
from tests.vllm.servers import VLLM_VENV, Ask, Server, eventually, post, proxy_server, running, vllm_server
from tests.vllm.splits import Split, by_source, prompt, same_answers, used

pytestmark = pytest.mark.timeout(900)

VLLM_ROUTER = os.environ.get("VLLM_ROUTER") or shutil.which("vllm-router", path=f"{VLLM_VENV}/bin:{os.environ['PATH']}")
# vLLM's MooncakeConnector asks torch for the accelerator's index, which raises where there is none.
NO_ACCELERATOR = "import torch\ntorch.accelerator.current_device_index = lambda: 0\n"


def has_module(name: str) -> bool:
    return any(Path(VLLM_VENV).glob(f"lib/python3*/site-packages/{name}/__init__.py"))


@contextmanager
def pair(
    model: Path, directory: Path, connector: str, environments: tuple[dict[str, str], dict[str, str]], **more: Any
) -> Iterator[tuple[Server, Server]]:
    """A prefiller and a decoder of a connector of vLLM's own."""
    servers = [
        vllm_server(
            f"{connector}-{role}", model, directory, {"kv_connector": connector, "kv_role": role, **more}, **env
        )
        for role, env in zip(("kv_producer", "kv_consumer"), environments, strict=True)
    ]
    with running(*servers):
        # A decoder whose first step is a single token dies on some processors (kv-contracts, section 4).
        Ask("one ordinary prompt of several words").text(servers[1])
        yield servers[0], servers[1]


@pytest.mark.skipif(not VLLM_ROUTER, reason="vllm-router is not installed (VLLM_ROUTER names it)")
def test_our_connector_behind_vllm_router(split: Split, tmp_path: Path) -> None:
    assert VLLM_ROUTER
    port = free_port()
    argv = [
        VLLM_ROUTER, "--host", "127.0.0.1", "--port", str(port), "--vllm-pd-disaggregation", "--kv-connector", "nixl",
        "--policy", "round_robin", "--prefill", split.prefiller.url, "--decode", split.decoder.url,
        "--prometheus-port", str(free_port()),
    ]  # fmt: skip
    router = Server("vllm-router", argv, port, tmp_path / "router.log")
    before = by_source(split.decoder, "external_kv_transfer")
    with running(router):
        same_answers(router, split.unsplit, 9200)
    assert by_source(split.decoder, "external_kv_transfer") > before
    assert eventually(lambda: used(split.prefiller) == 0 and used(split.decoder) == 0)


@pytest.mark.skipif(not has_module("nixl"), reason="nixl is not installed beside vLLM")
def test_vllms_nixl_connector_behind_our_proxy(split: Split, model: Path, tmp_path: Path) -> None:
    environments = tuple(
        {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "UCX_TLS": "tcp,shm,self",
        }
        for _ in range(2)
    )
    more = {"kv_buffer_device": "cpu"}
    with pair(model, tmp_path, "NixlConnector", (environments[0], environments[1]), **more) as (prefiller, decoder):
        proxy = proxy_server([prefiller], [decoder], tmp_path)
        with running(proxy):
            same_answers(proxy, split.unsplit, 9300)
        assert by_source(decoder, "external_kv_transfer") > 0


@pytest.mark.skipif(not has_module("mooncake"), reason="mooncake-transfer-engine-non-cuda is not installed beside vLLM")
def test_vllms_mooncake_connector_behind_our_proxy(split: Split, model: Path, tmp_path: Path) -> None:
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(NO_ACCELERATOR)
    bootstrap = free_port()
    path = f"{shim}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {"VLLM_MOONCAKE_BOOTSTRAP_PORT": str(bootstrap), "PYTHONPATH": path}
    more = {"kv_connector_extra_config": {"mooncake_protocol": "tcp"}}
    with pair(model, tmp_path, "MooncakeConnector", (environment, environment), **more) as (prefiller, decoder):
        flags = ("--contract", "mooncake", "--prefiller-bootstrap-ports", str(bootstrap))
        proxy = proxy_server([prefiller], [decoder], tmp_path, *flags)
        with running(proxy):
            same_answers(proxy, split.unsplit, 9400)
        assert by_source(decoder, "external_kv_transfer") > 0


def test_engines_without_a_connector_are_served_by_recomputing(split: Split, tmp_path: Path) -> None:
    proxy = proxy_server([split.unsplit], [split.unsplit], tmp_path)
    with running(proxy):
        same_answers(proxy, split.unsplit, 9500)
        status, metrics = post(proxy, "/v1/completions", Ask(prompt(30, 9600)).body())
        assert status == 200, metrics
    assert eventually(lambda: used(split.unsplit) == 0)
