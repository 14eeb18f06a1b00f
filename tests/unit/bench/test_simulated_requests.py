from __future__ import annotations

from itertools import pairwise

import pytest

from bench.simulated_requests import CHUNK_TOKENS, PROMPT_TOKENS_MAX, Request, requests_of


def made(seed: int = 1, count: int = 3000) -> list[Request]:
    return requests_of(seed, count, lambda tokens: tokens / 10_000)


def test_they_are_the_same_for_a_seed() -> None:
    one, other, another = made(1), made(1), made(2)
    assert [(a.arrived, a.prompt_tokens, a.output_tokens) for a in one] == [
        (b.arrived, b.prompt_tokens, b.output_tokens) for b in other
    ]
    assert [a.prompt_tokens for a in one] != [b.prompt_tokens for b in another]


def test_they_bring_the_load_asked_for() -> None:
    requests = made(count=12_000)
    assert len(requests) == 12_000
    work_s = sum(one.prompt_tokens for one in requests) / 10_000
    assert requests[-1].arrived == pytest.approx(work_s, rel=0.02)
    first_half = sum(one.prompt_tokens for one in requests if one.arrived < work_s / 2) / 10_000
    assert first_half == pytest.approx(work_s / 2, rel=0.1)


def test_they_have_long_tails() -> None:
    for values in (sorted(one.prompt_tokens for one in made()), sorted(one.output_tokens for one in made())):
        assert values[-30] > 6 * values[len(values) // 2]
    assert max(one.prompt_tokens for one in made()) <= PROMPT_TOKENS_MAX


def test_turns_of_a_conversation_begin_alike() -> None:
    conversations: dict[bytes, list[Request]] = {}
    for one in made():
        conversations.setdefault(one.session_key, []).append(one)
        assert len(one.prefix.keys) == one.prompt_tokens // CHUNK_TOKENS
    several = [sorted(turns, key=lambda one: one.prompt_tokens) for turns in conversations.values() if len(turns) > 1]
    assert len(several) > 100
    for turns in several:
        for shorter, longer in pairwise(turns):
            assert longer.prefix.keys[: len(shorter.prefix.keys)] == shorter.prefix.keys
