"""/v1/responses and /v1/messages as a mock engine answers them: all at once, whole or as named events."""

from __future__ import annotations

from typing import Any

import orjson

from bench.mock_answers import CREATED, Script, answer_id, whole_answer

Json = dict[str, Any]
PATHS = {"/v1/responses": "responses", "/v1/messages": "messages"}
LIMITS = {"responses": "max_output_tokens", "messages": "max_tokens"}


def whole(api: str, script: Script, name: str, model: str, num_cached: int, **more: Any) -> bytes:
    made = (
        _response(script, name, model, num_cached) if api == "responses" else _message(script, name, model, num_cached)
    )
    return orjson.dumps({**made, **more})


def _response(script: Script, name: str, model: str, num_cached: int) -> Json:
    said = [{"type": "output_text", "text": script.text(), "annotations": []}]
    return {
        "id": f"resp_{name}", "object": "response", "created_at": CREATED, "model": model, "status": "incomplete",
        "output": [{"type": "message", "id": "msg_0", "role": "assistant", "content": said}],
        "usage": {
            "input_tokens": script.num_prompt_tokens, "input_tokens_details": {"cached_tokens": num_cached},
            "output_tokens": script.num_tokens, "total_tokens": script.num_prompt_tokens + script.num_tokens,
        },
    }  # fmt: skip


def _message(script: Script, name: str, model: str, num_cached: int) -> Json:
    return {
        "id": f"chatcmpl-{name}", "type": "message", "role": "assistant", "model": model,
        "content": [{"type": "text", "text": script.text()}], "stop_reason": "max_tokens", "stop_sequence": None,
        "usage": {
            "input_tokens": script.num_prompt_tokens - num_cached, "output_tokens": script.num_tokens,
            "cache_read_input_tokens": num_cached,
        },
    }  # fmt: skip


def events(api: str, script: Script, name: str, model: str, num_cached: int = 0) -> list[bytes]:
    """The whole stream. What stands before the first text is said before anything is computed."""
    tokens = [script.token(at) for at in range(script.num_tokens)]
    if api == "responses":
        final = _response(script, name, model, num_cached)
        told = [
            ("response.created", {"response": {**final, "output": []}}),
            ("response.in_progress", {"response": {**final, "output": []}}),
            *(("response.output_text.delta", {"delta": token}) for token in tokens),
            ("response.completed", {"response": final}),
        ]
    else:
        final = _message(script, name, model, num_cached)
        told = [
            ("message_start", {"message": {**final, "content": []}}),
            ("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}),
            *(("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": one}}) for one in tokens),
            ("content_block_stop", {"index": 0}),
            ("message_delta", {"delta": {"stop_reason": "max_tokens"}, "usage": final["usage"]}),
            ("message_stop", {}),
        ]
    return [named_event(kind, fields) for kind, fields in told]


def opening(api: str, script: Script, name: str, model: str) -> list[bytes]:
    return events(api, script, name, model)[:2]


def error_event(api: str, message: str) -> bytes:
    if api == "messages":
        return named_event("error", {"error": {"type": "api_error", "message": message}})
    return named_event("error", {"code": "500", "message": message, "param": None})


def prefill_answer(path: str, script: Script, chat: bool, request_id: str, model: str, num_cached: int) -> bytes:
    """What a prefiller answers whose KV goes another way than by its answer."""
    if api := PATHS.get(path):
        return whole(api, script, request_id, model, num_cached)
    return whole_answer(script, chat, answer_id(chat, request_id), model, num_cached_tokens=num_cached)


def named_event(kind: str, fields: Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))
