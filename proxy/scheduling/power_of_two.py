"""Policy `power_of_two`: the better of two drawn at random."""

from __future__ import annotations

import random
from collections.abc import Sequence

from proxy.scheduling.candidate import CandidateT
from proxy.scheduling.least_load import LeastLoad
from proxy.scheduling.policy import Ask, Policy


class PowerOfTwo(Policy):
    """score [s] = that of `least_load`, of two different candidates; lower is better, at a tie the first drawn.

    Several proxies that do not see each other's loads do not herd onto one instance with it (Mitzenmacher, "The Power
    of Two Choices in Randomized Load Balancing", 2001).
    """

    name = "power_of_two"

    def __init__(self, role: str, seed: int | None = None) -> None:
        super().__init__(role, seed)
        self._score = LeastLoad(role).score
        self._random = random.Random(seed)

    def pick(self, candidates: Sequence[CandidateT], num_tokens: int, ask: Ask) -> CandidateT:
        num = len(candidates)
        if num == 1:
            return candidates[0]
        first = int(self._random.random() * num)
        second = (first + 1 + int(self._random.random() * (num - 1))) % num
        one, other = candidates[first], candidates[second]
        return one if self._score(one.load, num_tokens) <= self._score(other.load, num_tokens) else other
