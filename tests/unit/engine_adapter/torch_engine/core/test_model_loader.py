from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_adapter.model_fingerprint import model_fingerprint
from engine_adapter.torch_engine.config import EngineStartError
from engine_adapter.torch_engine.model_loader import load_model, read_eos_token_ids
from tests.unit.engine_adapter.torch_engine.core.harness import CPU


@pytest.fixture
def copy(model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(model_dir(), tmp_path / "copy")


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_shape_and_eos(model_dir: Callable[..., Path]) -> None:
    model = load_model(model_dir(), "auto", CPU)
    shape = model.shape
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 4, 2, 32)
    assert shape.dtype is torch.float32
    assert model.max_position_embeddings == 4096
    assert model.eos_token_ids == {0, 2}


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match=r"no config\.json") as caught:
        load_model(tmp_path, "auto", CPU)
    assert "make-model" in caught.value.remedy


def test_a_family_it_does_not_run(copy: Path) -> None:
    edit_config(copy, model_type="gpt2")
    with pytest.raises(EngineStartError, match="gpt2"):
        load_model(copy, "auto", CPU)


def test_sliding_windows_are_refused(copy: Path) -> None:
    edit_config(copy, layer_types=["full_attention", "sliding_attention"] * 2, use_sliding_window=True)
    with pytest.raises(EngineStartError, match="sliding_attention"):
        load_model(copy, "auto", CPU)


def test_weights_that_are_missing_or_torn(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EngineStartError, match="can't load the weights"):
        load_model(copy, "auto", CPU)
    weights.unlink()
    with pytest.raises(EngineStartError, match=r"no \*\.safetensors"):
        load_model(copy, "auto", CPU)


def test_eos_falls_back_to_the_config_and_the_tokenizer(copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    edit_config(copy, eos_token_id=7)
    assert read_eos_token_ids(copy) == {2, 7}
    (copy / "tokenizer_config.json").unlink()
    assert read_eos_token_ids(copy) == {7}


def test_the_fingerprint_is_of_what_is_computed(copy: Path, model_dir: Callable[..., Path]) -> None:
    original = model_fingerprint(model_dir())
    assert model_fingerprint(copy) == original
    edit_config(copy, transformers_version="0.0", dtype="bfloat16")
    assert model_fingerprint(copy) == original
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = model_fingerprint(copy)
    assert changed != original
    edit_config(copy, rms_norm_eps=1e-5)
    assert model_fingerprint(copy) not in (original, changed)
