from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine_adapter.torch_engine.batch_invariant import DECODE_MULTIPLE, ForwardKind
from engine_adapter.torch_engine.mixture_of_experts import InvariantExperts, InvariantRouter


@pytest.fixture(scope="module")
def block(model_dir: Callable[[str, str], Path]) -> Any:
    """A sparse block as transformers has it."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir("qwen3_moe", "tiny"), dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval().requires_grad_(False).model.layers[0].mlp


def rows(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, 128, generator=torch.Generator().manual_seed(num_rows))


@pytest.mark.parametrize("num_rows", [DECODE_MULTIPLE, 64, 256])
def test_the_answer_is_that_of_transformers(block: Any, num_rows: int) -> None:
    hidden = rows(num_rows)
    router = InvariantRouter(block.gate, ForwardKind(is_decode=num_rows <= 64))
    _, weights, experts = router(hidden)
    _, expected_weights, expected_experts = block.gate(hidden)
    assert torch.equal(experts, expected_experts)
    torch.testing.assert_close(weights, expected_weights)
    answer = InvariantExperts(block.experts, DECODE_MULTIPLE)(hidden, experts, weights)
    torch.testing.assert_close(answer, block.experts(hidden, experts, weights), rtol=1e-4, atol=1e-4)


def bits_differ(experts: Any, router: Any) -> bool:
    """Whether a row's answer depends on which rows it is computed with."""
    hidden = rows(256)
    _, weights, chosen = router(hidden)
    whole = experts(hidden, chosen, weights)
    return any(
        not torch.equal(experts(hidden[part], chosen[part], weights[part]), whole[part])
        for part in (slice(0, 1), slice(3, 10), slice(100, 177), slice(128, 256))
    )


def test_a_row_has_the_same_bits_in_any_company(block: Any) -> None:
    experts = InvariantExperts(block.experts, DECODE_MULTIPLE)
    assert not bits_differ(experts, block.gate)
    assert bits_differ(block.experts, block.gate), "if transformers keeps the bits too, these modules are not needed"


def test_nobody_routed_here(block: Any) -> None:
    experts = InvariantExperts(block.experts, DECODE_MULTIPLE)
    only_first = torch.zeros(4, 1, dtype=torch.int64)
    answer = experts(rows(4), only_first, torch.ones(4, 1))
    assert answer.abs().sum() > 0
    assert torch.equal(experts(rows(4), only_first, torch.zeros(4, 1)), torch.zeros(4, 128))
