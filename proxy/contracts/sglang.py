"""Contract `sglang`: the same body to both at once, with a room to meet in (kv-contracts section 2.8).

The prefiller passes its first token on with the KV, so no limit is rewritten. It answers when the decoder has the KV:
its answer is read and dropped. A list of prompts is numbered by SGLang itself from the one room; several choices of a
prompt are not, and would meet in one room (sglang 24223, 30723), so they are divided.
"""

from __future__ import annotations

from proxy.contracts.pair import Endpoint, EngineRank, Meeting, PairContract
from proxy.openai_api import ApiCall, spliced

ROOM_BITS = 63  # rooms are in [0, 2**63 - 1]


class SglangContract(PairContract):
    name = "sglang"
    decodes_alone = False
    prefill_waits = True

    def splits(self, call: ApiCall) -> bool:
        """Always: a decoder of SGLang has no prefill of its own."""
        return True

    def takes_whole(self, call: ApiCall) -> bool:
        return call.num_choices == 1 or bool(call.indivisible)

    def meet(
        self, call: ApiCall, prefiller: Endpoint, decoder: Endpoint, rank: EngineRank | None, number: int
    ) -> Meeting:
        room = {
            "bootstrap_host": prefiller.url_host,
            "bootstrap_port": prefiller.port,
            "bootstrap_room": number & ((1 << ROOM_BITS) - 1),
        }
        body = spliced(call, room)  # a client's own are replaced: they would lead to another's KV
        return Meeting(body, body)
