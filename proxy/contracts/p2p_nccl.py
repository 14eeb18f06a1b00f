"""Contract `p2p-nccl`: vLLM's P2pNcclConnector, 0.11 to 0.23 (kv-contracts section 2.7).

The request id, the same on both legs, names the KV sockets of both; there are no kv_transfer_params. Prefill ends
first: a decoder's worker waits for the KV inside its step, with every request of its batch. Children (several prompts
or choices) get ids the engines derive alike on both legs, so such a request is sent as it is. KV is pushed into the
decoder, which drops it with the request, and has no way to be told of one that never comes: that is counted.
"""

from __future__ import annotations

from proxy.contracts.pair import Endpoint, EngineRank, Meeting, PairContract
from proxy.openai_api import ApiCall, one_token_body


class P2pNcclContract(PairContract):
    name = "p2p-nccl"
    overlaps = False
    decodes_alone = False

    def splits(self, call: ApiCall) -> bool:
        """Always: the decoder's connector takes every request for a remote one and fails at an id without addresses."""
        return True

    def meet(
        self, call: ApiCall, prefiller: Endpoint, decoder: Endpoint, rank: EngineRank | None, number: int
    ) -> Meeting:
        body = one_token_body(call, None, every_choice=True)
        request_id = f"___prefill_addr_{prefiller}___decode_addr_{decoder}_{number:032x}"
        return Meeting(body, call.body, request_id=request_id, kv={"pushed_to": str(decoder)})
