from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.openai_api import parse_call
from proxy.scheduling import Prefix
from proxy.scheduling.prefix_affinity import CHUNK_BYTES, MAX_BYTES, PrefixAffinity, prefix_of
from tests.unit.proxy.scheduling.fleet import StubAsk, fleet


def ask(*keys: int) -> StubAsk:
    return StubAsk(prefix=Prefix(keys, 250.0))


def prefix(route: str = "completions", **fields: Any) -> Prefix:
    return prefix_of(parse_call(route, orjson.dumps(fields)))


def test_a_prefix_goes_where_it_was() -> None:
    policy, (a, b) = PrefixAffinity("prefill"), fleet(2)
    b.load.last_pick = 5
    assert policy.pick([a, b], 1000, ask(1, 2, 3)) is a
    a.load.last_pick = 6  # it would be b's turn
    assert policy.pick([a, b], 1250, ask(1, 2, 3, 4)) is a
    assert policy.pick([a, b], 1250, ask(9)) is b


@pytest.mark.parametrize(("queued_tokens", "stays"), [(700, True), (800, False)])
def test_load_says_no_beyond_the_time_the_prefix_saves(queued_tokens: int, stays: bool) -> None:
    policy, (a, b) = PrefixAffinity("prefill"), fleet(2)
    assert policy.pick([a, b], 1000, ask(1, 2, 3)) is a  # three chunks of 250 tokens are 750 saved
    a.load.reserve(queued_tokens)
    assert (policy.pick([a, b], 1000, ask(1, 2, 3, 4)) is a) is stays


def test_a_slow_owner_has_to_be_ahead_in_seconds_not_in_tokens() -> None:
    policy, (a, b) = PrefixAffinity("prefill"), fleet(2)
    assert policy.pick([a, b], 1000, ask(1, 2, 3)) is a
    a.load.observe(500, 1.0)
    b.load.observe(5000, 1.0)
    assert policy.pick([a, b], 1000, ask(1, 2, 3)) is b  # 250 tokens there take longer than 1000 here


def test_the_owner_moves_with_the_prefix() -> None:
    policy, (a, b) = PrefixAffinity("prefill"), fleet(2)
    assert policy.pick([a, b], 100, ask(1)) is a
    assert policy.pick([b], 100, ask(1)) is b  # a is out
    a.load.last_pick, b.load.last_pick = 1, 2
    assert policy.pick([a, b], 100, ask(1)) is b


def test_the_longest_beginning_of_those_offered_decides() -> None:
    policy, (a, b, c) = PrefixAffinity("prefill"), fleet(3)
    policy.pick([a], 100, ask(1, 2, 3))
    policy.pick([b], 100, ask(1, 8))
    a.load.last_pick = b.load.last_pick = 9
    assert policy.pick([a, b, c], 1000, ask(1, 2, 3, 4)) is a
    policy.pick([b], 100, ask(1, 8))
    assert policy.pick([b, c], 1000, ask(1, 2, 3, 4)) is b  # the common first chunk was there last


def test_what_it_remembers_is_bounded_and_forgets_the_ends_first() -> None:
    policy, (a,) = PrefixAffinity("prefill", max_remembered=10), fleet(1)
    for conversation in range(100):
        policy.pick([a], 100, ask(*(conversation << 8 | chunk for chunk in range(6))))
        assert len(policy._sent_to) <= 10
    assert set(policy._sent_to) == {99 << 8 | chunk for chunk in range(6)} | {98 << 8 | chunk for chunk in range(4)}


def test_equal_beginnings_have_equal_keys() -> None:
    text = "All happy families are alike. " * 400
    long, other = prefix(model="m", prompt=text), prefix(model="m", prompt=text[:5000] + "!" + text[5001:])
    assert len(long.keys) == len(text) // CHUNK_BYTES == 11
    assert long.keys[:4] == other.keys[:4] and not set(long.keys[4:]) & set(other.keys[4:])
    assert long.chunk_tokens == pytest.approx(CHUNK_BYTES / 4, rel=0.05)
    assert prefix(model="m", prompt=text, max_tokens=5, stream=True).keys == long.keys
    for different in ({"model": "lora"}, {"model": "m", "cache_salt": "x"}, {"model": "m", "tools": [{}]}):
        assert not set(prefix(prompt=text, **different).keys) & set(long.keys)


def test_a_conversation_that_goes_on_keeps_its_beginning() -> None:
    first = [{"role": "system", "content": "x" * 3000}, {"role": "user", "content": "y" * 3000}]
    then = [*first, {"role": "assistant", "content": "z" * 3000}]
    keys = prefix("chat", messages=first).keys
    assert len(keys) == 5 and prefix("chat", messages=then).keys[:5] == keys


def test_token_ids_count_as_what_they_are() -> None:
    ids = list(range(100_000, 102_000))
    found = prefix(prompt=ids)
    assert found.keys == prefix(prompt=[*ids, 5]).keys[: len(found.keys)]
    assert found.chunk_tokens * len(found.keys) == pytest.approx(2000, rel=0.1)


@pytest.mark.parametrize("fields", [{"prompt": "short"}, {"prompt_embeds": "AAAA"}, {"prompt": ["a", "b"]}])
def test_what_has_no_long_beginning_has_no_keys(fields: dict[str, Any]) -> None:
    assert prefix(**fields).keys == ()


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("completions", {"prompt": "x" * 2 * MAX_BYTES}),
        ("completions", {"prompt": "ü" * 2 * MAX_BYTES}),
        ("completions", {"prompt": list(range(MAX_BYTES))}),
        ("chat", {"messages": [{"role": "user", "content": "x" * 2 * MAX_BYTES}]}),
        ("chat", {"messages": [{"role": "user", "content": "x" * 10_000}] * 60}),
    ],
)
def test_a_very_long_prompt_is_hashed_only_so_far(route: str, fields: dict[str, Any]) -> None:
    assert len(prefix(route, **fields).keys) == MAX_BYTES // CHUNK_BYTES


def test_other_apis_have_their_prompt_under_other_names() -> None:
    text = "x" * 3 * CHUNK_BYTES
    of = [
        prefix_of(parse_call(route, orjson.dumps(fields)))
        for route, fields in (
            ("responses", {"input": text}),
            ("responses", {"input": [{"role": "user", "content": text}]}),
            ("messages", {"messages": [{"role": "user", "content": text}]}),
            ("messages", {"messages": [], "system": text}),
        )
    ]
    assert all(len(one.keys) >= 3 for one in of) and len({one.keys for one in of}) == len(of)
