"""Policy `ascend`: the choice of the vllm-ascend example proxies, to compare with."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.load_ledger import Hold, InstanceLoad
from proxy.scheduling.candidate import Candidate, CandidateT
from proxy.scheduling.policy import Ask, Policy

# ascend-proxy.md 2.1, "Scores", in millionths, so that sums of it go back to exactly zero.
PREFILL_MILLIONTHS_A_BYTE = 8_625  # 0.0345 for four bytes
PREFILL_MILLIONTHS = 120_074_500


class Ascend(Policy):
    """Of a request whose body has L bytes [bytes], with numbers of no unit that the examples call scores:

    prefill load p = (L / 4) * 0.0345 + 120.0745; decode load d = L
    score of a prefiller = active_tokens + 0.3 * active_kv_cache; score of a decoder = active_tokens

    `active_kv_cache` is the sum of p over requests from the pick until the decoder's first event; a prefiller's
    `active_tokens` is never counted up there, so it is 0. A decoder's is the sum of d until the answer has ended. The
    lowest wins, among equals the first in order of start-up. Speed, and what is still to come, do not enter.
    """

    name = "ascend"
    holds = True

    def pick(self, candidates: Sequence[CandidateT], num_tokens: int, ask: Ask) -> CandidateT:
        return min(candidates, key=_held)  # the factor 0.3 of all alike does not change which is the lowest

    def hold(self, load: InstanceLoad, ask: Ask) -> Hold:
        if self.role == "decode":
            return Hold(load, ask.body_bytes)
        return Hold(load, prefill_millionths(ask.body_bytes))


def prefill_millionths(body_bytes: int) -> int:
    return body_bytes * PREFILL_MILLIONTHS_A_BYTE + PREFILL_MILLIONTHS


def _held(one: Candidate) -> int:
    return one.load.policy_load + one.load.others_policy_load
