"""Contract `layerwise`: vllm-ascend's MooncakeLayerwiseConnector (kv-contracts section 2.4, ascend-proxy.md 2.2).

The decoder goes first. When it has blocks for a prompt it posts to the metaserver where they are, under the id that
vLLM derives from X-Request-Id, once for each child; then one prefill is sent whose KV is pushed there layer by layer.
"""

from __future__ import annotations

from typing import Any

import orjson

from proxy.contracts.order import Order
from proxy.contracts.unanswered import UnansweredContract
from proxy.long_body import Body
from proxy.openai_api import ApiCall, one_token_body, spliced


class LayerwiseContract(UnansweredContract):
    name = "layerwise"
    order = Order.DECODE_FIRST
    decodes_alone = True

    def splits(self, call: ApiCall) -> bool:
        """Of `/v1/responses` the ids can't be foretold, nor those of several choices."""
        return call.max_new_tokens != 0 and call.route in _PREFIXES

    def takes_whole(self, call: ApiCall) -> bool:
        """A list of prompts is joined at the metaserver."""
        return call.num_choices == 1 and not call.indivisible

    def child_ids(self, call: ApiCall, request_id: str) -> tuple[str, ...]:
        """The ids under which the decoder will call, in the order of the prompts."""
        name = _PREFIXES[call.route] + request_id
        if call.route != "completions":
            return (name,)
        return tuple(f"{name}-{i}" for i in range(call.num_prompts))

    def ask_body(self, call: ApiCall, metaserver: str) -> Body:
        """The decoder's: the original, and where to call. Of a list it calls for every prompt, as they are joined."""
        params: dict[str, Any] = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": metaserver}
        if call.route == "completions" and call.num_prompts > 1:
            params["num_children"] = call.num_prompts
        return spliced(call, {"kv_transfer_params": params})

    def push_body(self, call: ApiCall, posted: dict[str, dict[str, Any]]) -> Body:
        """The prefiller's. `posted` has what each child posted, verbatim, in the order of the prompts."""
        first = next(iter(posted.values()))
        kv = first if len(posted) == 1 else {**first, "batch_kv_transfer_params": posted}
        return one_token_body(call, kv)

    def push_fault(self, prefill_answer: bytes) -> str:
        """Why a prefiller that has computed the prompt has not pushed it; "" if it has. A vLLM has no other way to say
        so than beside its answer, and the decoder would wait until its time is over."""
        if b'"push_failed"' not in prefill_answer:
            return ""
        try:
            params = orjson.loads(prefill_answer)["kv_transfer_params"]
            return str(params["baton"]["push_failed"])
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return ""


_PREFIXES = {"chat": "chatcmpl-", "completions": "cmpl-", "messages": "chatcmpl-"}
