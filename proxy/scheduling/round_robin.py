"""Policy `round_robin`: in turn."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.scheduling.candidate import Candidate, CandidateT
from proxy.scheduling.policy import Ask, Policy


class RoundRobin(Policy):
    """score [picks] = the number of the pick at which it was last chosen; lower is better.

    No index is kept, so instances may come, go and return without anybody being passed over.
    """

    name = "round_robin"

    def pick(self, candidates: Sequence[CandidateT], num_tokens: int, ask: Ask) -> CandidateT:
        return min(candidates, key=_last_pick)


def _last_pick(one: Candidate) -> int:
    return one.load.last_pick
