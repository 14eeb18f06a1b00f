"""Flags of the prefix store that can have no effect are refused, with what to do."""

from __future__ import annotations

from typing import Any

import pytest

from engine_adapter.torch_engine.config import EngineStartError
from engine_adapter.torch_engine.kv_link import _check_store, _command
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
