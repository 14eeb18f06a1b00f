"""Contract `pull`: prefill first, then the decoder pulls the KV that the prefiller's answer names.

Spoken by our connector, vLLM's NixlConnector, vllm-ascend's MooncakeConnectorV1 and LLMDataDist (kv-contracts
sections 2.1, 2.3, 2.5). The prefiller's `kv_transfer_params` are opaque and copied verbatim.
"""

from __future__ import annotations

from typing import Any

import orjson

from proxy.contracts.order import Order
from proxy.long_body import Body
from proxy.openai_api import ApiCall, one_token_body, spliced

_ASK_FOR_REMOTE_DECODE: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class PullContract:
    name = "pull"
    order = Order.PREFILL_FIRST
    decodes_alone = True

    def splits(self, call: ApiCall) -> bool:
        """Without a token to generate there is nothing to decode."""
        return call.max_new_tokens != 0

    def takes_whole(self, call: ApiCall) -> bool:
        """Of several prompts or choices a prefiller hands out one's KV and strands the others' until they expire
        (kv-contracts section 2), and a stock decoder would read one KV several times."""
        return call.num_prompts == 1 and call.num_choices == 1 and not call.indivisible

    def prefill_body(self, call: ApiCall) -> Body:
        return one_token_body(call, _ASK_FOR_REMOTE_DECODE)

    def kv_of(self, prefill_answer: bytes) -> dict[str, Any] | None:
        try:
            answer = orjson.loads(prefill_answer)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"the prefill answer is not JSON: {error}") from None
        if type(answer) is not dict:
            raise ValueError("the prefill answer is not a JSON object")
        params = answer.get("kv_transfer_params")
        if params is not None and type(params) is not dict:
            raise ValueError("the prefill answer's kv_transfer_params is not an object")
        return params or None

    def decode_body(self, call: ApiCall, kv: dict[str, Any] | None) -> Body:
        return call.body if kv is None else spliced(call, {"kv_transfer_params": kv})

    def may_reclaim(self, kv: dict[str, Any], dispatched: bool) -> bool:
        """Our engine drops a lease once, however often it is told to. A stock engine takes a second request with the
        same parameters for a reader, and would read blocks that were freed meanwhile (kv-contracts section 2.1)."""
        return not dispatched or "baton" in kv

    def reclaim_body(self, call: ApiCall, kv: dict[str, Any]) -> Body:
        return one_token_body(call, {**kv, "release_only": True})
