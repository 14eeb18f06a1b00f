"""Policy `least_load`: send the request where it will wait the shortest."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.load_ledger import InstanceLoad
from proxy.scheduling.candidate import Candidate, CandidateT
from proxy.scheduling.cost import fixed_tokens
from proxy.scheduling.policy import Ask, Policy

# Scores this close count as equal and the least recently picked wins: estimates are not better than that, and idle
# instances should take turns. From bench/policy_simulator.py: at high load a prefill tolerance of 1.25 costs 9 % of
# p99 TTFT (12 seeds), a decode tolerance of 1.25 costs 4 ms of p99 TPOT. Decode's is wider than the simulator asks for:
# speeds that real engines show differ by that much for no lasting reason, and a step's fixed cost would send all of a
# light load to one decoder.
PREFILL_TOLERANCE = 1.05
DECODE_TOLERANCE = 1.15


class LeastLoad(Policy):
    """score [s] = (fixed [tokens] + work open on the instance [tokens] + the request's own [tokens]) / speed [tokens/s]

    For prefill: the seconds until this prompt would be done, were the open prompts done first; nothing is fixed. For
    decode: the seconds a step over all open streams and their KV would take with this one added; a step's own cost is
    fixed, or a busy decoder would pass for a fast one. Lower is better. Speed is what `InstanceLoad.observe` has seen;
    an instance nobody has measured is taken to be as fast as the mean of its fleet.
    """

    name = "least_load"

    def __init__(self, role: str, seed: int | None = None) -> None:
        super().__init__(role, seed)
        self._fixed_tokens = fixed_tokens(role)
        self._tolerance = DECODE_TOLERANCE if role == "decode" else PREFILL_TOLERANCE
        self._scores: list[float] = []

    def pick(self, candidates: Sequence[CandidateT], num_tokens: int, ask: Ask) -> CandidateT:
        if len(candidates) == 1:
            return candidates[0]
        own = num_tokens + self._fixed_tokens
        self._scores = scores = [
            (one.load.num_tokens + one.load.others_tokens + own) / one.load.speed for one in candidates
        ]
        bound = min(scores) * self._tolerance
        close = [one for one, score in zip(candidates, scores, strict=True) if score <= bound]
        return close[0] if len(close) == 1 else min(close, key=_last_pick)

    def waits(self, candidates: Sequence[CandidateT], num_tokens: int) -> list[float]:
        return self._scores

    def score(self, load: InstanceLoad, num_tokens: int) -> float:
        """Of one instance, for the policies that compare a few."""
        return (load.num_tokens + load.others_tokens + num_tokens + self._fixed_tokens) / load.speed


def _last_pick(one: Candidate) -> int:
    return one.load.last_pick
