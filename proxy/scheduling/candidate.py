"""Which instances may be asked at all (the filter), and what a policy sees of each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

from proxy.health import Health
from proxy.load_ledger import InstanceLoad


class Candidate(Protocol):
    key: str
    enabled: bool
    health: Health
    load: InstanceLoad


CandidateT = TypeVar("CandidateT", bound=Candidate)


def candidates(fleet: Sequence[CandidateT], avoid: Collection[object], now: float) -> Sequence[CandidateT]:
    """The instances to choose from, by falling demands.

    Enabled, well and not in `avoid` (they failed this request already); then whichever of the enabled is the least bad:
    well but to be avoided, or else the one whose back-off ends first. Empty only if none is enabled.
    """
    fit = [one for one in fleet if one.enabled and (one.health.healthy or now >= one.health.retry_at)]
    if avoid:
        fit = [one for one in fit if one not in avoid] or fit
    if fit:
        return fit
    enabled = [one for one in fleet if one.enabled]
    untried = [one for one in enabled if one not in avoid] or enabled
    return [min(untried, key=lambda one: one.health.retry_at)] if untried else []
