"""A mark is worth its price, and the last one always goes."""

from __future__ import annotations

from engine_adapter.mark_pace import MIN_MARK_BYTES, MarkPace


def test_small_layers_are_told_together() -> None:
    pace = MarkPace(MIN_MARK_BYTES // 4)
    assert [pace.is_due(2) for _ in range(4)] == [False, True, False, True]
    assert not pace.is_due(1)
    assert pace.is_due(1, last=True)
    assert not pace.is_due(3)  # what was told does not count again
