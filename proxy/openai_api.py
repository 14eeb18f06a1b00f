"""OpenAI request bodies: what must hold before an engine is troubled, and what a choice needs to know of them.

Only what costs nothing is checked here; whatever needs the model (its name, its context length) is the engine's answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from proxy.errors import BadRequest

BYTES_PER_TOKEN = 4  # the seeds' proxy divides the body's bytes by 4 as well (ascend-proxy.md 2.1, "Scores")
ROUTES = {b"/v1/completions": "completions", b"/v1/chat/completions": "chat"}


@dataclass(slots=True)
class ApiCall:
    """One client request: `body` is what it sent, byte for byte; `fields` the same, parsed and never changed."""

    route: str
    body: bytes
    fields: dict[str, Any]
    stream: bool
    num_prompt_tokens: int
    """Exact for a list of token ids, else the body's bytes over BYTES_PER_TOKEN."""
    max_new_tokens: int | None
    num_prompts: int
    own_kv_transfer_params: bool


def parse_call(route: str, body: bytes) -> ApiCall:
    """Raises BadRequest, which names the field."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.") from None
    if type(fields) is not dict:
        raise BadRequest("The request body must be a JSON object.")
    get = fields.get
    model = get("model")
    if model is not None and type(model) is not str:
        raise BadRequest("'model' must be a string.", "model")
    stream = get("stream")
    if stream is not None and type(stream) is not bool:
        raise BadRequest("'stream' must be true or false.", "stream")
    limit = _count(get("max_completion_tokens"), "max_completion_tokens")
    least = 0 if route == "completions" and get("echo") is True else 1  # nothing but the prompt, for its logprobs
    plain = _count(get("max_tokens"), "max_tokens", least)
    _count(get("n"), "n")
    if route == "chat":
        messages = get("messages")
        if type(messages) is not list:
            raise BadRequest("'messages' is required and must be a list.", "messages")
        num_prompts, num_tokens = 1, None
    else:
        num_prompts, num_tokens = _prompts(get("prompt"), get("prompt_embeds"))
    own = get("kv_transfer_params") is not None
    return ApiCall(
        route,
        body,
        fields,
        stream is True,
        num_tokens if num_tokens is not None else len(body) // BYTES_PER_TOKEN + 1,
        limit if limit is not None else plain,
        num_prompts,
        own,
    )


def _count(value: Any, name: str, least: int = 1) -> int | None:
    if value is None:
        return None
    if type(value) is not int:
        raise BadRequest(f"'{name}' must be an integer.", name)
    if value < least:
        raise BadRequest(f"'{name}' must be at least {least}, got {value}.", name)
    return value


def _prompts(prompt: Any, embeds: Any) -> tuple[int, int | None]:
    """How many prompts a completion has, and how many tokens where token ids were given."""
    if type(prompt) is str:
        return 1, None
    if prompt is None and embeds is not None:
        return len(embeds) if isinstance(embeds, list) else 1, None
    if type(prompt) is not list:
        raise BadRequest("'prompt' is required and must be a string or a list.", "prompt")
    if not prompt:
        raise BadRequest("'prompt' must not be empty.", "prompt")
    first = prompt[0]
    if type(first) is int:
        return 1, len(prompt)
    if type(first) is list:
        return len(prompt), sum(len(one) for one in prompt if isinstance(one, list))
    if type(first) is not str:
        raise BadRequest("'prompt' must hold strings, token ids or lists of token ids.", "prompt")
    return len(prompt), None


def spliced(body: bytes, fields: dict[str, Any], key: str, value: Any) -> bytes:
    """`body` with a member added, without serialising the rest again.

    `fields` is `body` parsed, `key` needs no escaping. A key that is there already has to be replaced, which means
    serialising anew.
    """
    if key in fields:
        return orjson.dumps({**fields, key: value})
    end = body.rfind(b"}")
    comma = b"," if fields else b""
    return b'%b%b"%b":%b}' % (body[:end], comma, key.encode(), orjson.dumps(value))
