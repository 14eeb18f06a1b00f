from __future__ import annotations

import itertools

import pytest

from proxy.kv_ledger import LEGAL, KvLedger, KvState

PATHS = {
    KvState.HELD: [],
    KvState.RECLAIMING: [KvState.RECLAIMING],
    KvState.CONSUMED: [KvState.CONSUMED],
    KvState.RECLAIMED: [KvState.RECLAIMING, KvState.RECLAIMED],
    KvState.ORPHANED: [KvState.ORPHANED],
}


@pytest.mark.parametrize(("start", "end"), list(itertools.product(KvState, KvState)))
def test_every_transition(start: KvState, end: KvState) -> None:
    ledger = KvLedger()
    entry = ledger.hand_out("r", "p:1", {"a": 1}, 0.0)
    for state in PATHS[start]:
        ledger.move(entry, state)
    if end in LEGAL[start]:
        ledger.move(entry, end)
        assert (entry in ledger.open) == (end is KvState.RECLAIMING)
        assert ledger.count(KvState.RECLAIMING) == (end is KvState.RECLAIMING)
    else:
        with pytest.raises(ValueError, match="cannot go"):
            ledger.move(entry, end)


def test_what_is_handed_out_is_accounted_for() -> None:
    ledger = KvLedger()
    entries = [ledger.hand_out(str(i), "p:1", {}, 0.0) for i in range(3)]
    assert ledger.count(KvState.HELD) == 3
    ledger.move(entries[0], KvState.CONSUMED)
    ledger.move(entries[1], KvState.RECLAIMING)
    ledger.move(entries[1], KvState.RECLAIMED)
    ledger.move(entries[2], KvState.ORPHANED)
    assert not ledger.open
    totals = ledger.totals
    assert totals[KvState.HELD] == totals[KvState.CONSUMED] + totals[KvState.RECLAIMED] + totals[KvState.ORPHANED]
