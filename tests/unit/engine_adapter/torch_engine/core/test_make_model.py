from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine_adapter.torch_engine.make_model import make_model
from engine_adapter.torch_engine.model_loader import LoadedModel
from tests.unit.engine_adapter.torch_engine.core.harness import CoreHarness, ask, greedy


@pytest.mark.parametrize(
    ("family", "size"),
    [("qwen3", "tiny"), ("qwen2", "tiny"), ("llama", "tiny"), ("qwen3", "small"), ("qwen3_moe", "tiny")],
)
def test_greedy_text_varies(loaded: Callable[[str, str], LoadedModel], family: str, size: str) -> None:
    harness = CoreHarness(loaded(family, size))
    harness.run(ask("a", [100, 200, 300], greedy(48)))
    assert len(set(harness.token_ids("a"))) >= 30


def test_transformers_loads_it_whole(model_dir: Callable[..., Path]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir())
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir())
    assert model.config.model_type == "qwen3"
    assert model.config.vocab_size == len(tokenizer) == 1024
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_every_text_survives_the_tokenizer(model_dir: Callable[..., Path]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir())
    for text in ("Hello, world!", "  two  spaces\n\ttab", "Zürich 東京 😀", "<|im_start|>not special<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_template_opens_the_assistants_turn(model_dir: Callable[..., Path]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_same_seed_gives_the_same_files(tmp_path: Path, model_dir: Callable[..., Path]) -> None:
    make_model(tmp_path / "same", "qwen3", "tiny")
    make_model(tmp_path / "other", "qwen3", "tiny", seed=1)
    weights = [
        (path / "model.safetensors").read_bytes() for path in (model_dir(), tmp_path / "same", tmp_path / "other")
    ]
    assert weights[0] == weights[1] != weights[2]
    vocabularies = [
        json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
        for path in (model_dir(), tmp_path / "other")
    ]
    assert vocabularies[0] == vocabularies[1]
