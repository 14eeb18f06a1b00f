from __future__ import annotations

import random
from collections import Counter

import pytest

from proxy.load_ledger import settle_speeds
from proxy.scheduling.cost import DECODE_STEP_TOKENS
from proxy.scheduling.least_load import LeastLoad
from tests.unit.proxy.scheduling.fleet import NothingMayBeAsked, fleet

ASK = NothingMayBeAsked()


@pytest.mark.parametrize(("role", "fixed"), [("prefill", 0), ("decode", DECODE_STEP_TOKENS)])
def test_the_score_is_seconds_of_work(role: str, fixed: int) -> None:
    (one,) = fleet(1)
    one.load.reserve(3000)
    one.load.observe(20_000, 2.0)
    assert LeastLoad(role).score(one.load, 1000) == pytest.approx((fixed + 4000) / 10_000)


def test_a_decoder_that_is_busy_does_not_pass_for_a_fast_one() -> None:
    """Two decoders of one speed, one with twice the work, whose steps take hardly longer for it."""
    a, b = fleet(2)
    for one, open_tokens in ((a, 20_000), (b, 40_000)):
        one.load.reserve(open_tokens)
        one.load.observe(DECODE_STEP_TOKENS + open_tokens, 0.02 + open_tokens * 2e-7)
    assert LeastLoad("decode").pick([b, a], 1000, ASK) is a


def test_least_load_goes_where_it_waits_the_shortest() -> None:
    a, b = fleet(2)
    a.load.reserve(1000)
    assert LeastLoad("prefill").pick([a, b], 100, ASK) is b
    a.load.observe(50_000, 1.0)  # ten times as fast: its queue is shorter in seconds
    assert LeastLoad("prefill").pick([a, b], 1000, ASK) is a


def test_least_load_takes_turns_among_the_idle() -> None:
    some = fleet(3)
    picks = []
    for turn in range(1, 7):
        one = LeastLoad("prefill").pick(some, 100, ASK)
        one.load.last_pick = turn
        picks.append(some.index(one))
    assert picks == [0, 1, 2, 0, 1, 2]


def test_least_load_spreads_what_is_held() -> None:
    some = fleet(4)
    for turn in range(100):
        one = LeastLoad("prefill").pick(some, 64, ASK)
        one.load.last_pick = turn + 1
        one.load.reserve(64)
    assert {one.load.num_requests for one in some} <= set(range(20, 31))


def shares(slowness: list[float], noise: float, max_open: int = 6) -> list[int]:
    """Of 450 streams of 600 tokens of KV, `max_open` at once: how many each of so many decoders gets, whose steps take
    20 ms times its slowness, measured with a random error of the fraction `noise`."""
    rng, some, policy = random.Random(5), fleet(len(slowness)), LeastLoad("decode")
    taken: Counter[int] = Counter()
    under_way = []
    for turn in range(450):
        if turn % 4 == 0:
            settle_speeds((one.load for one in some), drift=0.03)  # as the proxy's tick does
        one = policy.pick(some, 600, ASK)
        one.load.last_pick = turn + 1
        where = some.index(one)
        taken[where] += 1
        under_way.append((one, where, one.load.reserve(600)))
        if len(under_way) == max_open:
            one, where, held = under_way.pop(0)
            seconds = 0.02 * slowness[where] * rng.uniform(1 - noise, 1 + noise)
            one.load.observe(DECODE_STEP_TOKENS + one.load.num_tokens, seconds)
            held.release()
    return [taken[number] for number in range(len(some))]


@pytest.mark.parametrize(
    ("slowness", "noise"),
    [([1.0] * 4, 0.5), ([1.0, 0.85, 1.05, 1.2], 0.2), ([0.8, 1.0, 1.0, 1.0], 0.1)],
    ids=["noise", "noise that lasts", "one that looks fast"],
)
def test_a_light_load_is_spread_over_equal_decoders_whatever_they_were_measured_at(
    slowness: list[float], noise: float
) -> None:
    taken = shares(slowness, noise)
    assert max(taken) <= 2 * min(taken), taken


@pytest.mark.parametrize("max_open", [6, 60, 200])
def test_a_decoder_that_takes_twice_as_long_gets_less(max_open: int) -> None:
    taken = shares([1.0, 1.0, 1.0, 2.0], 0.1, max_open)
    assert taken[3] * 1.5 < min(taken[:3]), taken
    assert max(taken[:3]) <= 1.5 * min(taken[:3]), taken
