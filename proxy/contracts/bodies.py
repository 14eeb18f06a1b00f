"""Bodies that several contracts make in the same way."""

from __future__ import annotations

from typing import Any

import orjson

from proxy.openai_api import ApiCall


def one_token(call: ApiCall, kv_transfer_params: dict[str, Any] | None) -> bytes:
    """The request with one token to generate, forced (min_tokens=1) where KV is handed out only by length
    (ascend-proxy.md 2.4), not streamed."""
    fields = {**call.fields, "stream": False, "max_tokens": 1, "min_tokens": 1}
    if kv_transfer_params is not None:
        fields["kv_transfer_params"] = kv_transfer_params
    if call.route == "chat" or "max_completion_tokens" in fields:
        fields["max_completion_tokens"] = 1
    fields.pop("stream_options", None)
    fields.pop("best_of", None)
    return orjson.dumps(fields)
