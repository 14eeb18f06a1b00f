"""Contract `mooncake`: vLLM's own MooncakeConnector, 0.18 and later (kv-contracts section 2.2).

The proxy mints a transfer id and sends both legs at once; the prefiller writes into the decoder's blocks when both are
there. The decoder is told which engine (a data-parallel rank) of the prefiller has the KV, so the proxy chooses it.
"""

from __future__ import annotations

import uuid
from typing import Any

from proxy.contracts.pair import Endpoint, EngineRank, Meeting, PairContract
from proxy.long_body import Body
from proxy.openai_api import ApiCall, one_token_body, spliced


class MooncakeContract(PairContract):
    name = "mooncake"
    ranked = True

    def splits(self, call: ApiCall) -> bool:
        """Without a token to generate there is nothing to decode."""
        return call.max_new_tokens != 0

    def takes_whole(self, call: ApiCall) -> bool:
        """A transfer id is met once: a second child under it would wait until the engines' time-out."""
        return call.num_prompts == 1 and call.num_choices == 1 and not call.indivisible

    def meet(
        self, call: ApiCall, prefiller: Endpoint, decoder: Endpoint, rank: EngineRank | None, number: int
    ) -> Meeting:
        assert rank is not None
        transfer_id = str(uuid.UUID(int=number, version=4))
        asked = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
        kv = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": transfer_id,
            "remote_engine_id": rank.engine_id,
            "remote_bootstrap_addr": f"http://{prefiller}",
        }
        return Meeting(
            one_token_body(call, asked),
            spliced(call, {"kv_transfer_params": kv}),
            b"X-data-parallel-rank: %d\r\n" % rank.rank,
            kv=kv,
        )

    def may_reclaim(self, kv: dict[str, Any], dispatched: bool) -> bool:
        """The prefiller writes only what it still holds under the id, so asking for it twice does no harm."""
        return True

    def reclaim_body(self, call: ApiCall, kv: dict[str, Any]) -> Body:
        """A decoder that takes the KV for one token: the prefiller frees its blocks when they are read."""
        return one_token_body(call, kv)
