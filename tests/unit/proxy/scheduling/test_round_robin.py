from __future__ import annotations

from proxy.scheduling.round_robin import RoundRobin
from tests.unit.proxy.scheduling.fleet import Chooser, NothingMayBeAsked, StubAsk, fleet


def test_in_turn_also_when_one_is_away_for_a_while() -> None:
    a, b, c = some = fleet(3)
    chooser = Chooser(RoundRobin("prefill"))
    assert [chooser.choose(some, 1, StubAsk()) for _ in range(5)] == [a, b, c, a, b]
    assert [chooser.choose([a, b], 1, StubAsk()) for _ in range(3)] == [a, b, a]
    assert [chooser.choose(some, 1, StubAsk()) for _ in range(4)] == [c, b, a, c]


def test_it_asks_for_nothing() -> None:
    some = fleet(3)
    assert RoundRobin("decode").pick(some, 1, NothingMayBeAsked()) is some[0]
