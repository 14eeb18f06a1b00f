"""The filter, the cost, and what every policy must do."""

from __future__ import annotations

from dataclasses import dataclass, field

import orjson
import pytest

from proxy.health import Health
from proxy.load_ledger import InstanceLoad
from proxy.openai_api import parse_call
from proxy.scheduling import POLICIES
from proxy.scheduling.candidate import candidates
from proxy.scheduling.cost import cost_of
from proxy.scheduling.least_load import LeastLoad


@dataclass(eq=False)
class Stub:
    enabled: bool = True
    health: Health = field(default_factory=lambda: Health(1))
    load: InstanceLoad = field(default_factory=InstanceLoad)


def fleet(num: int) -> list[Stub]:
    return [Stub() for _ in range(num)]


def out(one: Stub, until: float) -> None:
    one.health.failed(until - 1.0, "x")
    assert one.health.retry_at == until


def test_the_filter_wants_enabled_well_and_untried() -> None:
    a, b, c, d = fleet(4)
    a.enabled = False
    out(b, 100.0)
    assert candidates([a, b, c, d], {d}, 0.0) == [c]


def test_the_filter_falls_back_to_the_least_bad() -> None:
    a, b = fleet(2)
    assert candidates([a, b], {a, b}, 0.0) == [a, b]  # all failed this request once: again, rather than nobody
    out(a, 50.0)
    out(b, 40.0)
    assert candidates([a, b], set(), 0.0) == [b]
    assert candidates([a, b], {b}, 0.0) == [a]
    assert candidates([a, b], set(), 45.0) == [b]  # its back-off is over: the half-open trial
    a.enabled = b.enabled = False
    assert candidates([a, b], set(), 0.0) == []


def test_costs_grow_with_what_is_asked() -> None:
    def cost(**fields: object):  # type: ignore[no-untyped-def]
        return cost_of(parse_call("completions", orjson.dumps({"prompt": [1] * 100, **fields})))

    assert cost().prefill_tokens == 100 + 64
    assert cost(max_tokens=16).decode_tokens < cost().decode_tokens < cost(max_tokens=900).decode_tokens
    assert cost(max_tokens=10**9) == cost(max_tokens=1024)
    assert cost(n=4).decode_tokens > 3 * cost().decode_tokens - 300


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_picks_one_of_the_candidates_and_changes_nothing(name: str) -> None:
    policy = POLICIES[name]()
    assert policy.name == name
    for num in (1, 2, 7):
        some = fleet(num)
        some[0].load.reserve(50)
        for _ in range(20):
            assert policy.pick(some, 100) in some
        assert [one.load.num_tokens for one in some] == [50] + [0] * (num - 1)


def test_least_load_goes_where_it_waits_the_shortest() -> None:
    a, b = fleet(2)
    a.load.reserve(1000)
    assert LeastLoad().pick([a, b], 100) is b
    a.load.observe(50_000, 1.0)  # ten times as fast: its queue is shorter in seconds
    assert LeastLoad().pick([a, b], 1000) is a


def test_least_load_takes_turns_among_the_idle() -> None:
    some = fleet(3)
    picks = []
    for turn in range(1, 7):
        one = LeastLoad().pick(some, 100)
        one.load.last_pick = turn
        picks.append(some.index(one))
    assert picks == [0, 1, 2, 0, 1, 2]


def test_least_load_spreads_what_is_held() -> None:
    some = fleet(4)
    for turn in range(100):
        one = LeastLoad().pick(some, 64)
        one.load.last_pick = turn + 1
        one.load.reserve(64)
    assert {one.load.num_requests for one in some} <= set(range(20, 31))
