"""Policy `least_load`: send the request where it will wait the shortest."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.load_ledger import InstanceLoad
from proxy.scheduling.candidate import Candidate, CandidateT
from proxy.scheduling.cost import fixed_tokens
from proxy.scheduling.policy import Ask, Policy

# Scores this close count as equal and the least recently picked wins: estimates are not better than that, and idle
# instances should take turns. From bench/policy_simulator.py: at high load 1.25 costs 9 % of p99 TTFT for prefill (12
# seeds), and 1.15 costs 2 ms of p99 TPOT for decode (6 seeds).
TOLERANCE = 1.05


class LeastLoad(Policy):
    """score [s] = (work open on the instance [tokens] + the request's own [tokens]) / speed [tokens/s]
                 + fixed [tokens] / even speed [tokens/s]

    For prefill: the seconds until this prompt would be done, were the open prompts done first; nothing is fixed. For
    decode: the seconds a step over all open streams and their KV would take with this one added; a step's own cost is
    fixed, or a busy decoder would pass for a fast one. Lower is better. Speed is what `InstanceLoad.observe` has seen;
    an instance nobody has measured is taken to be as fast as the mean of its fleet. The fixed part is all there is to
    a light load, and weighs the same whatever an instance is given: what small differences in speed make of it never
    evens out, so it is counted at the even speed, which is without them.
    """

    name = "least_load"

    def __init__(self, role: str, seed: int | None = None) -> None:
        super().__init__(role, seed)
        self._fixed_tokens = fixed_tokens(role)
        self._scores: list[float] = []

    def pick(self, candidates: Sequence[CandidateT], num_tokens: int, ask: Ask) -> CandidateT:
        if len(candidates) == 1:
            return candidates[0]
        fixed = self._fixed_tokens
        self._scores = scores = [
            (load.num_tokens + load.others_tokens + num_tokens) / load.speed + fixed / load.even_speed
            for one in candidates
            for load in (one.load,)
        ]
        bound = min(scores) * TOLERANCE
        close = [one for one, score in zip(candidates, scores, strict=True) if score <= bound]
        return close[0] if len(close) == 1 else min(close, key=_last_pick)

    def waits(self, candidates: Sequence[CandidateT], num_tokens: int) -> list[float]:
        return self._scores

    def score(self, load: InstanceLoad, num_tokens: int) -> float:
        """Of one instance, for the policies that compare a few."""
        work = load.num_tokens + load.others_tokens + num_tokens
        return work / load.speed + self._fixed_tokens / load.even_speed


def _last_pick(one: Candidate) -> int:
    return one.load.last_pick
