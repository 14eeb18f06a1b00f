"""Policy `least_load`: send the request where it will wait the shortest."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.scheduling.candidate import Candidate, CandidateT

# Scores this close count as equal and the least recently picked wins: estimates are not better than that, and idle
# instances should take turns.
TOLERANCE = 1.25


class LeastLoad:
    """score [s] = (work open on the instance [tokens] + this request's own [tokens]) / speed shown [tokens/s]

    For prefill: the seconds until this prompt would be done, were the open prompts done first. For decode: the
    seconds a step over all open streams and their KV would take with this one added. Lower is better. An instance
    whose speed nobody has measured is taken to be as fast as the mean of its fleet.
    """

    name = "least_load"

    def pick(self, candidates: Sequence[CandidateT], num_tokens: int) -> CandidateT:
        if len(candidates) == 1:
            return candidates[0]
        scores = [(one.load.num_tokens + num_tokens) / one.load.speed for one in candidates]
        bound = min(scores) * TOLERANCE
        close = [one for one, score in zip(candidates, scores, strict=True) if score <= bound]
        return close[0] if len(close) == 1 else min(close, key=_last_pick)


def _last_pick(one: Candidate) -> int:
    return one.load.last_pick
