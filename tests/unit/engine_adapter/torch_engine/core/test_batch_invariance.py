"""float32 on CPU, bit for bit: a token's logits, keys and values depend on its own sequence only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine_adapter.torch_engine.batch_invariant import (
    MAX_DECODE_ROWS,
    BatchInvariantLinear,
    ForwardKind,
    UncutActivation,
    rows_are_invariant,
)
from engine_adapter.torch_engine.model_loader import LoadedModel, load_model
from tests.unit.engine_adapter.torch_engine.core.harness import (
    CPU,
    CoreHarness,
    ask,
    greedy,
    linked_pair,
    prefill_remotely,
    random_prompt,
)

needs_bfloat16_matmul = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 matmul for this CPU"
)
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 32, 70, 129, 300)
Load = Callable[[str, str], LoadedModel]


def prompts(vocab_size: int) -> dict[str, list[int]]:
    return {f"p{length}": random_prompt(length, vocab_size=vocab_size) for length in PROMPT_LENGTHS}


def run_alone(model: LoadedModel, asked: dict[str, list[int]], max_tokens: int = 8, **options: Any) -> CoreHarness:
    """Each prompt by itself, nothing cached: the reference."""
    harness = CoreHarness(model, enable_prefix_caching=False, **options)
    for request_id, prompt in asked.items():
        harness.run(ask(request_id, prompt, greedy(max_tokens)))
    return harness


def assert_same_bits(left: CoreHarness, right: CoreHarness) -> None:
    assert left.runner.logits.keys() == right.runner.logits.keys()
    for key, row in left.runner.logits.items():
        assert torch.equal(row, right.runner.logits[key]), f"logits of {key}"
    assert left.kv_of.keys() == right.kv_of.keys()
    for request_id, rows in left.kv_of.items():
        assert torch.equal(rows, right.kv_of[request_id]), f"keys and values of {request_id}"


@pytest.mark.parametrize(("family", "num_threads"), [("qwen3", 2), ("qwen3", 3), ("qwen3_moe", 2)])
def test_any_number_of_threads(loaded: Load, family: str, num_threads: int) -> None:
    """A prefiller and a decoder may have different numbers of cores."""
    tiny = loaded(family, "tiny")
    asked = {f"p{length}": random_prompt(length) for length in (5, 130)}
    one = run_alone(tiny, asked, max_tokens=3)
    torch.set_num_threads(num_threads)
    assert_same_bits(one, run_alone(tiny, asked, max_tokens=3))


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "qwen3_moe", "qwen2_5_vl"])
def test_alone_or_beside_others(loaded: Load, family: str) -> None:
    model = loaded(family, "tiny")
    asked = prompts(model.vocab_size)
    mixed = CoreHarness(model)
    for request_id, prompt in asked.items():
        mixed.core.add(ask(request_id, prompt))
        mixed.step()  # so that decodes of some run beside prefills of others, in growing batches
    mixed.run()
    assert max(mixed.runner.decode_sizes) > 6
    assert_same_bits(run_alone(model, asked), mixed)


def test_alone_or_beside_others_at_larger_shapes(loaded: Load) -> None:
    """Shapes and threads at which matmul kernels were seen to change their order of summation."""
    torch.set_num_threads(2)
    model = loaded("qwen3", "small")
    asked = {f"p{length}": random_prompt(length, vocab_size=model.vocab_size) for length in (1, 5, 17, 40, 64, 100)}
    asked |= {f"q{index}": random_prompt(3, index) for index in range(14)}
    mixed = CoreHarness(model)
    mixed.run(*(ask(request_id, prompt, greedy(3)) for request_id, prompt in asked.items()))
    assert max(mixed.runner.decode_sizes) == 20
    assert_same_bits(run_alone(model, asked, max_tokens=3), mixed)


def test_more_sequences_than_one_decode_forward_has_rows(tiny: LoadedModel) -> None:
    asked = {f"p{index}": random_prompt(4, index) for index in range(MAX_DECODE_ROWS + 3)}
    mixed = CoreHarness(tiny, max_num_seqs=MAX_DECODE_ROWS + 3)
    mixed.run(*(ask(request_id, prompt, greedy(2)) for request_id, prompt in asked.items()))
    assert max(mixed.runner.decode_sizes) == MAX_DECODE_ROWS + 3
    assert_same_bits(run_alone(tiny, asked, max_tokens=2), mixed)


@pytest.mark.parametrize("max_num_batched_tokens", [1, 7, 64, 100])
def test_chunked_or_whole(tiny: LoadedModel, max_num_batched_tokens: int) -> None:
    asked = {f"p{length}": random_prompt(length) for length in (17, 100, 150)}
    chunked = CoreHarness(tiny, max_num_batched_tokens=max_num_batched_tokens)
    chunked.run(*(ask(request_id, prompt) for request_id, prompt in asked.items()))
    assert_same_bits(run_alone(tiny, asked), chunked)


@pytest.mark.parametrize(
    ("family", "num_shared"), [("qwen3", 16), ("qwen3", 33), ("qwen3", 150), ("qwen3_moe", 33), ("qwen3_moe", 150)]
)
def test_prefix_hit_or_not(loaded: Load, family: str, num_shared: int) -> None:
    """With experts: the shared tokens were prefilled beside others, which were routed otherwise."""
    tiny = loaded(family, "tiny")
    shared = random_prompt(num_shared)
    asked = {f"p{length}": shared + random_prompt(length, 1) for length in (1, 20, 100)}
    warm = CoreHarness(tiny)
    warm.run(ask("first", [*shared, 5, 6, 7]))
    first = run_alone(tiny, {"first": [*shared, 5, 6, 7]})
    assert_same_bits(first, warm)
    for request_id, prompt in asked.items():
        warm.run(ask(request_id, prompt))
        assert warm.last(request_id).num_cached_tokens >= num_shared // 16 * 16 > 0
    cold = run_alone(tiny, {"first": [*shared, 5, 6, 7], **asked})
    assert_same_bits(cold, warm)


def test_generated_text_is_no_prefix_of_a_prompt(tiny: LoadedModel) -> None:
    """Its keys and values were decoded; a prefill would have given other bits, so it isn't found in the cache."""
    harness = CoreHarness(tiny)
    harness.run(ask("first", random_prompt(20), greedy(30)))
    prompt = random_prompt(20) + harness.token_ids("first")
    harness.run(ask("second", prompt))
    assert harness.last("second").num_cached_tokens == 16
    alone = run_alone(tiny, {"second": prompt})
    assert torch.equal(harness.kv_of["second"], alone.kv_of["second"])
    assert torch.equal(harness.runner.logits["second", 49], alone.runner.logits["second", 49])


def test_preempted_or_not(tiny: LoadedModel) -> None:
    asked = {f"p{index}": random_prompt(40, index) for index in range(4)}
    tight = CoreHarness(tiny, num_blocks=14)
    tight.run(*(ask(request_id, prompt, greedy(40)) for request_id, prompt in asked.items()))
    assert tight.scheduler.num_preemptions > 0
    assert_same_bits(run_alone(tiny, asked, max_tokens=40), tight)
    tight.assert_idle()


@pytest.mark.parametrize("length", [1, 2, 16, 17, 32, 100, 300])
def test_prefilled_here_or_elsewhere(tiny: LoadedModel, length: int) -> None:
    producer, consumer = linked_pair(tiny, {"num_blocks": 64, "max_num_batched_tokens": 50})
    prompt = random_prompt(length)
    params = prefill_remotely(producer, "p", prompt)
    consumer.core.add(ask("d", prompt, kv_transfer_params=params))
    consumer.step()
    consumer.transfer.finish_pulls()
    consumer.run()
    assert_same_bits(run_alone(tiny, {"d": prompt}), consumer)
    assert consumer.core.counters.num_prompt_tokens_local_compute == 1
    assert consumer.core.counters.num_prompt_tokens_external_kv_transfer == length - 1
    producer.step()
    producer.assert_idle()
    consumer.assert_idle()


def test_the_comparison_can_fail(tiny: LoadedModel) -> None:
    producer, consumer = linked_pair(tiny)
    prompt = random_prompt(100)
    consumer.core.add(ask("d", prompt, kv_transfer_params=prefill_remotely(producer, "p", prompt)))
    consumer.step()
    consumer.transfer.finish_pulls(flip_byte=True)
    consumer.run()
    alone = run_alone(tiny, {"d": prompt})
    assert not torch.equal(alone.runner.logits["d", 99], consumer.runner.logits["d", 99])
    assert alone.token_ids("d") != consumer.token_ids("d")


def test_probe_notices_a_linear_that_depends_on_its_batch() -> None:
    class BatchMean(nn.Module):
        in_features = 8

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows - rows.mean(dim=-2, keepdim=True)

    kind = ForwardKind()
    assert not rows_are_invariant(BatchMean(), kind)
    assert rows_are_invariant(BatchInvariantLinear(nn.Linear(100, 60), kind), kind)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16_matmul)])
def test_linear_computes_what_nn_linear_does(bias: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(64, 48, bias=bias, dtype=dtype).requires_grad_(False)
    kind = ForwardKind()
    swapped = BatchInvariantLinear(linear, kind)
    for kind.is_decode, num_rows in ((False, 5), (True, 8), (True, 24)):
        rows = torch.randn(1, num_rows, 64, dtype=dtype)
        torch.testing.assert_close(swapped(rows), linear(rows), rtol=2e-2, atol=2e-2)


def test_activation_is_applied_to_pieces_too_small_to_be_cut() -> None:
    sizes = []

    class Spy(nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            sizes.append(rows.numel())
            return nn.functional.silu(rows)

    rows = torch.randn(1, 7, 11008)
    assert torch.equal(UncutActivation(Spy())(rows), torch.stack([nn.functional.silu(row) for row in rows[0]])[None])
    assert max(sizes) <= 32768


def test_bfloat16_runs_on_any_cpu(model_dir: Callable[[str, str], Path]) -> None:
    model = load_model(model_dir("qwen3", "tiny"), "bfloat16", CPU, 2048)
    harness = run_alone(model, {"p17": random_prompt(17)}, max_tokens=4)
    assert len(harness.token_ids("p17")) == 4
