"""KV that prefillers handed out and that no decoder is known to have yet.

| state | may become |
|---|---|
| held | consumed (the decoder's first event came), reclaiming, orphaned (left to the engine's own time-out) |
| reclaiming | reclaimed, orphaned |

The last three are ends: the entry leaves the ledger.
"""

from __future__ import annotations

import enum
from typing import Any


class KvState(enum.StrEnum):
    HELD = "held"
    RECLAIMING = "reclaiming"
    CONSUMED = "consumed"
    RECLAIMED = "reclaimed"
    ORPHANED = "orphaned"


LEGAL: dict[KvState, frozenset[KvState]] = {
    KvState.HELD: frozenset({KvState.CONSUMED, KvState.RECLAIMING, KvState.ORPHANED}),
    KvState.RECLAIMING: frozenset({KvState.RECLAIMED, KvState.ORPHANED}),
    KvState.CONSUMED: frozenset(),
    KvState.RECLAIMED: frozenset(),
    KvState.ORPHANED: frozenset(),
}


class KvEntry:
    """One hand-out. `kv` is opaque; `dispatched` says whether a decoder may have been sent it."""

    __slots__ = ("dispatched", "kv", "prefiller", "request_id", "since", "state")

    def __init__(self, request_id: str, prefiller: str, kv: dict[str, Any], since: float) -> None:
        self.request_id = request_id
        self.prefiller = prefiller
        self.kv = kv
        self.since = since
        self.dispatched = False
        self.state = KvState.HELD


class KvLedger:
    """`open` holds the entries of states held and reclaiming; `totals` counts every state ever entered."""

    def __init__(self) -> None:
        self.open: set[KvEntry] = set()
        self.totals = dict.fromkeys(KvState, 0)

    def hand_out(self, request_id: str, prefiller: str, kv: dict[str, Any], now: float) -> KvEntry:
        entry = KvEntry(request_id, prefiller, kv, now)
        self.open.add(entry)
        self.totals[KvState.HELD] += 1
        return entry

    def move(self, entry: KvEntry, state: KvState) -> None:
        """Raises ValueError for a transition the table above does not have."""
        if state not in LEGAL[entry.state]:
            raise ValueError(f"KV of {entry.request_id} cannot go from {entry.state.value} to {state.value}")
        entry.state = state
        self.totals[state] += 1
        if state is not KvState.RECLAIMING:
            self.open.discard(entry)

    def count(self, state: KvState) -> int:
        """Entries that are in `state` now (only held and reclaiming can be other than zero)."""
        return sum(entry.state is state for entry in self.open)
