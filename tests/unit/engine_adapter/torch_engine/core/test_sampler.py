"""What a request's sampling parameters do to its logits, against vLLM's definitions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from engine_adapter.torch_engine.sampler import SamplingState, sample, token_logprobs
from engine_adapter.torch_engine.sequence import SamplingParams

VOCAB_SIZE = 12
EOS = 11


def state(prompt: tuple[int, ...] = (), seed: int = 0, **params: Any) -> SamplingState:
    return SamplingState(
        SamplingParams(max_tokens=100, **params),
        prompt,
        eos_token_ids=frozenset({EOS}),
        vocab_size=VOCAB_SIZE,
        seed=seed,
        device=torch.device("cpu"),
    )


def logits(*values: float) -> torch.Tensor:
    row = torch.full((VOCAB_SIZE,), -20.0)
    row[: len(values)] = torch.tensor(values)
    return row


def draws(row: torch.Tensor, num_draws: int = 4000, **params: Any) -> Counter[int]:
    request = state(**params)
    return Counter(request.sample(row) for _ in range(num_draws))


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals() -> None:
    rows = torch.stack([logits(1, 3, 3), logits(0, 1, 2)])
    assert sample(rows, [state(temperature=0.0), state(temperature=0.0)]) == [1, 2]


def test_logits_are_left_as_they_are() -> None:
    row = logits(1, 2, 3)
    before = row.clone()
    state(temperature=0.7, top_p=0.5, top_k=2, min_p=0.1, presence_penalty=1.0, logit_bias={1: 5.0}).sample(row)
    assert torch.equal(row, before)


def test_temperature_gives_the_distribution_it_should() -> None:
    row = logits(1.0, 0.0)
    share = draws(row, temperature=0.5)[0] / 4000
    assert share == pytest.approx((row / 0.5).softmax(-1)[0].item(), abs=0.03)


def test_top_k_keeps_k() -> None:
    assert set(draws(logits(1, 1.1, 1.2, 1.3), top_k=2)) == {2, 3}
    assert len(draws(logits(1, 1.1, 1.2, 1.3), top_k=-1)) >= 4
    assert len(draws(logits(1, 1.1, 1.2, 1.3), top_k=1000)) >= 4


def test_top_p_keeps_the_fewest_that_reach_p() -> None:
    row = torch.tensor([0.5, 0.3, 0.15, 0.05, *[1e-9] * 8]).log()
    assert set(draws(row, top_p=0.79)) == {0, 1}
    assert set(draws(row, top_p=0.5)) == {0}
    assert set(draws(row, top_p=1e-6)) == {0}


def test_min_p_is_relative_to_the_likeliest() -> None:
    row = torch.tensor([0.5, 0.3, 0.15, 0.05, *[1e-9] * 8]).log()
    assert set(draws(row, min_p=0.25)) == {0, 1, 2}


def test_a_seed_gives_the_same_tokens_whoever_shares_the_batch() -> None:
    rows = torch.randn(50, VOCAB_SIZE)
    alone = [sample(row[None], [request])[0] for request in [state(seed=1, temperature=2.0)] for row in rows]
    shared = state(seed=99, temperature=2.0)
    seeded = SamplingState(
        SamplingParams(max_tokens=1, temperature=2.0, seed=1),
        (),
        eos_token_ids=frozenset(),
        vocab_size=VOCAB_SIZE,
        seed=5,
        device=torch.device("cpu"),
    )
    together = [sample(torch.stack([-row, row]), [shared, seeded])[1] for row in rows]
    assert alone == together
    assert alone != [sample(row[None], [request])[0] for request in [state(seed=2, temperature=2.0)] for row in rows]


def test_a_row_beside_random_ones_stays_greedy() -> None:
    rows = torch.stack([logits(0, 5), logits(0, 0, 5)])
    assert sample(rows, [state(temperature=1.0), state(temperature=0.0)])[1] == 2


def test_presence_and_frequency_penalties_count_output_only() -> None:
    request = state(prompt=(0,), temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5)
    row = logits(2.0, 1.9, 0.0)
    assert request.sample(row) == 0
    request.accept(0)  # 2.0 - 1.0 - 0.5
    assert request.sample(row) == 1
    request.accept(1)
    request.accept(1)  # 1.9 - 1.0 - 1.0
    assert request.sample(row) == 0


def test_repetition_penalty_counts_prompt_and_output_and_pushes_negative_logits_down() -> None:
    request = state(prompt=(0,), temperature=0.0, repetition_penalty=2.0)
    assert request.sample(logits(3.0, 2.0)) == 1
    request.accept(1)
    assert request.sample(logits(3.0, 2.0, 1.6)) == 2
    assert state(prompt=(0,), temperature=0.0, repetition_penalty=2.0).sample(logits(-2.0, -3.0)) == 1


def test_min_tokens_masks_eos_and_stop_ids_until_reached() -> None:
    request = state(temperature=0.0, min_tokens=1, stop_token_ids=(1,))
    row = logits(0.0, 5.0, 1.0)
    row[EOS] = 6.0
    assert request.sample(row) == 2
    request.accept(2)
    assert request.sample(row) == EOS


def test_logit_bias_is_added() -> None:
    assert state(temperature=0.0, logit_bias={3: 100.0, 0: -100.0}).sample(logits(5.0, 1.0)) == 3


def test_a_temperature_near_zero_does_not_overflow() -> None:
    assert draws(logits(1.0, 0.0), num_draws=50, temperature=0.0001)[0] == 50


def test_logprobs_and_ranks() -> None:
    rows = torch.stack([logits(1.0, 3.0, 2.0), logits(0.0, 1.0)])
    first, second = token_logprobs(rows, [2, 1], 2)
    expected = rows.log_softmax(-1)
    assert (first.token_id, first.rank) == (2, 2)
    assert first.logprob == pytest.approx(expected[0, 2].item())
    assert [token_id for token_id, _ in first.top] == [1, 2]
    assert (second.rank, len(second.top)) == (1, 2)
    assert token_logprobs(rows, [0, 0], 0)[0].top == []
