"""Flags of the prefix store that can have no effect are refused, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine_adapter.memory.choice import choose
from engine_adapter.memory.contract import Place
from engine_adapter.torch_engine.config import EngineConfig, EngineStartError
from engine_adapter.torch_engine.kv_link import _check_store, _command
from engine_adapter.torch_engine.kv_memory import choose_kv_memory
from engine_adapter.torch_engine.server_config import ServerConfig


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"store_dir": "/kv"}, "--store-dir is for --sidecar auto: give --sidecar auto"),
        (
            {"sidecar": "/s.sock", "store_memory_bytes": 1},
            "--store-memory-bytes is for --sidecar auto: give it to the pd-sidecar at /s.sock",
        ),
        (
            {"sidecar": "auto", "store_dir_bytes": 5},
            "--store-dir-bytes is the size of --store-dir: give that too, or neither",
        ),
        (
            {"sidecar": "auto", "store_mooncake_segment_bytes": 0},
            "--store-mooncake-segment-bytes is for --store-mooncake: give that too, or neither",
        ),
    ],
)
def test_flags_without_effect_are_refused(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(EngineStartError) as refused:
        _check_store(ServerConfig(**fields))
    assert str(refused.value) == line


def test_the_sidecar_is_told_what_the_engine_was_told() -> None:
    config = ServerConfig(
        sidecar="auto", store_dir="/kv", store_dir_bytes=5, store_memory_bytes=7, store_mooncake="m:1"
    )
    _check_store(config)
    assert _command(config).argv("/s")[-8:] == [
        "--store-memory-bytes", "7", "--store-dir", "/kv", "--store-dir-bytes", "5", "--store-mooncake", "m:1",
    ]  # fmt: skip
    assert _command(ServerConfig(sidecar="auto")).more == ()


def test_a_store_that_could_not_reach_the_blocks_is_refused() -> None:
    config = ServerConfig(sidecar="auto", store_memory_bytes=7)
    _check_store(config, choose("shm", Place("cpu", own_sidecar=True)))
    for choice in (choose("staging", Place("cpu", own_sidecar=True)), choose("auto", Place("cuda", own_sidecar=True))):
        with pytest.raises(EngineStartError, match="--kv-memory staging the sidecar does not reach them: give --kv-m"):
            _check_store(config, choice)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kv_memory": "staging"}, "--kv-memory staging is for an engine with a sidecar: give --sidecar auto too"),
        ({"kv_memory": "device_ipc", "sidecar": "auto"}, "device_ipc: the KV lies in host memory"),
        ({"kv_memory": "in_process", "sidecar": "/s.sock"}, "leave sidecar at auto"),
        ({"kv_memory": "in_process", "sidecar": "auto", "sidecar_transport": "mooncake"}, "use tcp or auto"),
    ],
)
def test_memory_that_cannot_be_had_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(EngineStartError, match=says):
        choose_kv_memory(ServerConfig(**fields), EngineConfig(model=Path()))


def test_expandable_segments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    config, engine = ServerConfig(sidecar="auto", kv_memory="device_ipc"), EngineConfig(model=Path(), device="cuda")
    with pytest.raises(EngineStartError, match="set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"):
        choose_kv_memory(config, engine)
    chosen = choose_kv_memory(
        config.model_copy(update={"kv_memory": "auto"}), EngineConfig(model=Path(), device="cuda")
    )
    assert chosen is not None and chosen.provider.name == "staging"
