"""Contract `pull`: prefill first, then the decoder pulls the KV that the prefiller's answer names.

Spoken by our connector, vLLM's NixlConnector, vllm-ascend's MooncakeConnectorV1 and LLMDataDist (kv-contracts
sections 2.1, 2.3, 2.5). The prefiller's `kv_transfer_params` are opaque and copied verbatim.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from proxy.contracts.order import Order
from proxy.openai_api import ApiCall, spliced

# A name in quotes and a colon cannot stand inside a JSON string: what is found is a member.
_PROMPT_TOKENS = re.compile(rb'"usage":\s?\{[^{}]*?"prompt_tokens":\s?(\d+)')
_CACHED_TOKENS = re.compile(rb'"prompt_tokens_details":\s?\{[^{}]*?"cached_tokens":\s?(\d+)')

_ASK_FOR_REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
# One token, forced (min_tokens=1): an engine hands KV out only if the request ends by length (ascend-proxy.md 2.4).
_ONE_TOKEN = {"stream": False, "max_tokens": 1, "min_tokens": 1}


def usage_of(prefill_answer: bytes) -> tuple[int | None, int | None]:
    """How many tokens the prompt has and how many of them the prefiller had cached; None where it does not say."""
    prompt, cached = _PROMPT_TOKENS.search(prefill_answer), _CACHED_TOKENS.search(prefill_answer)
    return int(prompt[1]) if prompt else None, int(cached[1]) if cached else None


class PullContract:
    name = "pull"
    order = Order.PREFILL_FIRST

    def splits(self, call: ApiCall) -> bool:
        """A list of prompts would get one child's KV and strand the others' (kv-contracts section 2). Without a token
        to generate there is nothing to decode."""
        return call.num_prompts == 1 and call.max_new_tokens != 0

    def prefill_body(self, call: ApiCall) -> bytes:
        fields = {**call.fields, **_ONE_TOKEN, "kv_transfer_params": _ASK_FOR_REMOTE_DECODE}
        if call.route == "chat" or "max_completion_tokens" in fields:
            fields["max_completion_tokens"] = 1
        if "n" in fields:
            fields["n"] = 1
        fields.pop("stream_options", None)
        fields.pop("best_of", None)
        return orjson.dumps(fields)

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

    def decode_body(self, call: ApiCall, kv: dict[str, Any] | None) -> bytes:
        return call.body if kv is None else spliced(call.body, call.fields, "kv_transfer_params", kv)

    def may_reclaim(self, kv: dict[str, Any], dispatched: bool) -> bool:
        """Our engine drops a lease once, however often it is told to. A stock engine takes a second request with the
        same parameters for a reader, and would read blocks that were freed meanwhile (kv-contracts section 2.1)."""
        return not dispatched or "baton" in kv

    def reclaim_body(self, call: ApiCall, kv: dict[str, Any]) -> bytes:
        fields = {**call.fields, **_ONE_TOKEN, "kv_transfer_params": {**kv, "release_only": True}}
        if "max_completion_tokens" in fields:
            fields["max_completion_tokens"] = 1
        if "n" in fields:
            fields["n"] = 1
        fields.pop("stream_options", None)
        fields.pop("best_of", None)
        return orjson.dumps(fields)
