"""The filter: who may be asked at all."""

from __future__ import annotations

from proxy.scheduling.candidate import candidates
from tests.unit.proxy.scheduling.fleet import Stub, fleet


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
