from __future__ import annotations

import pytest

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
