"""Policy `random`: any, all alike. What every other has to beat."""

from __future__ import annotations

import random
from collections.abc import Sequence

from proxy.scheduling.candidate import CandidateT
from proxy.scheduling.policy import Ask, Policy


class RandomChoice(Policy):
    """No score: each candidate has the probability 1 / number of candidates."""

    name = "random"

    def __init__(self, role: str, seed: int | None = None) -> None:
        super().__init__(role, seed)
        self._random = random.Random(seed)

    def pick(self, candidates: Sequence[CandidateT], num_tokens: int, ask: Ask) -> CandidateT:
        return candidates[int(self._random.random() * len(candidates))]
