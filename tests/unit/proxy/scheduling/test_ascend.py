from __future__ import annotations

import pytest

from proxy.load_ledger import InstanceLoad
from proxy.scheduling.ascend import Ascend, prefill_millionths
from tests.unit.proxy.scheduling.fleet import StubAsk, fleet


@pytest.mark.parametrize("body_bytes", [0, 1, 17, 400, 14_000, 1 << 20])
def test_the_prefill_load_is_that_of_the_examples(body_bytes: int) -> None:
    assert prefill_millionths(body_bytes) / 1e6 == pytest.approx((body_bytes / 4) * 0.0345 + 120.0745, abs=1e-6)


def test_the_decode_load_is_the_size_of_the_body() -> None:
    load = InstanceLoad()
    Ascend("decode").hold(load, StubAsk(body_bytes=123))
    assert load.policy_load == 123


def test_the_lowest_wins_and_among_equals_the_first() -> None:
    policy, (a, b, c) = Ascend("prefill"), fleet(3)
    ask = StubAsk(body_bytes=400)
    picks = []
    for _ in range(4):
        picks.append(policy.pick([a, b, c], 0, ask))
        policy.hold(picks[-1].load, ask)
    assert picks == [a, b, c, a]


def test_two_short_prompts_weigh_more_than_a_long_one_until_14_kilobytes() -> None:
    policy, (a, b) = Ascend("prefill"), fleet(2)
    policy.hold(a.load, StubAsk(body_bytes=13_000))
    policy.hold(b.load, StubAsk(body_bytes=10))
    policy.hold(b.load, StubAsk(body_bytes=10))
    assert policy.pick([a, b], 0, StubAsk()) is a
    policy.hold(a.load, StubAsk(body_bytes=5_000))
    assert policy.pick([a, b], 0, StubAsk()) is b


def test_speed_and_open_tokens_do_not_enter() -> None:
    policy, (a, b) = Ascend("decode"), fleet(2)
    a.load.reserve(10**6)
    a.load.observe(1, 10.0)
    assert policy.pick([a, b], 0, StubAsk()) is a
