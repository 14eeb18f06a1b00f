"""Greedy float32 text of the engine equals transformers' own `generate` with its stock attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from engine_adapter.torch_engine.model_loader import LoadedModel
from tests.unit.engine_adapter.torch_engine.core.harness import CoreHarness, ask, greedy, random_prompt

PROMPT_LENGTHS = (1, 2, 15, 16, 17, 64, 129, 500, 1500)
NUM_TOKENS = 16


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "qwen3_moe", "qwen2_5_vl"])
def test_greedy_text(
    model_dir: Callable[[str, str], Path], loaded: Callable[[str, str], LoadedModel], family: str
) -> None:
    kind: Any = AutoModelForImageTextToText if family == "qwen2_5_vl" else AutoModelForCausalLM
    reference = kind.from_pretrained(model_dir(family, "tiny"), dtype=torch.float32).eval()
    assert reference.config._attn_implementation == "sdpa"
    harness = CoreHarness(loaded(family, "tiny"))
    for length in PROMPT_LENGTHS:
        prompt = random_prompt(length, 3)
        token_ids = torch.tensor([prompt])
        expected = reference.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        harness.run(ask(f"p{length}", prompt, greedy(NUM_TOKENS)))
        assert harness.token_ids(f"p{length}") == expected[0, length:].tolist(), f"prompt of {length} tokens"
    harness.assert_idle()


def test_logits_are_close(model_dir: Callable[[str, str], Path], tiny: LoadedModel) -> None:
    reference: Any = AutoModelForCausalLM.from_pretrained(model_dir("qwen3", "tiny"), dtype=torch.float32).eval()
    prompt = random_prompt(200, 4)
    harness = CoreHarness(tiny)
    harness.run(ask("a", prompt, greedy(1)))
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(harness.runner.logits["a", 199], expected, rtol=1e-4, atol=1e-4)
