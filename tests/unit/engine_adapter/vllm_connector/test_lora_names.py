"""An adapter is named by its files, as long as they are what the engine can have loaded."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine_adapter.vllm_connector.lora_names import LoraNames


def adapter(path: Path, weights: bytes = b"weights", name: str = "a", number: int = 1, **more: Any) -> Any:
    path.mkdir(exist_ok=True)
    (path / "adapter_model.safetensors").write_bytes(weights)
    return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=str(path), **more)


def test_no_adapter_has_the_empty_name() -> None:
    assert LoraNames().of(None) == ()


def test_the_same_files_elsewhere_have_the_same_name(tmp_path: Path) -> None:
    here, there = adapter(tmp_path / "here"), adapter(tmp_path / "there", number=2)
    assert LoraNames().of(here) == LoraNames().of(there) is not None


def test_other_weights_or_another_name_are_another_adapter(tmp_path: Path) -> None:
    names = [
        LoraNames().of(adapter(tmp_path / "a")),
        LoraNames().of(adapter(tmp_path / "b", b"other__")),
        LoraNames().of(adapter(tmp_path / "c", name="b")),
    ]
    assert None not in names and len(set(names)) == 3


def test_what_may_not_be_what_was_loaded_has_no_name(tmp_path: Path) -> None:
    names, request = LoraNames(), adapter(tmp_path / "a")
    assert names.of(request)
    adapter(tmp_path / "a", b"trained on")
    os.utime(tmp_path / "a" / "adapter_model.safetensors", ns=(1, 1))
    assert names.of(request) is None
    assert LoraNames().of(adapter(tmp_path / "b", load_inplace=True)) is None
    assert LoraNames().of(SimpleNamespace(lora_name="a", lora_int_id=1, lora_path="org/adapter")) is None
