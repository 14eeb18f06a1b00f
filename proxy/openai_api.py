"""Bodies of the generating routes: what must hold before an engine is troubled, and what a choice needs to know.

Only what costs nothing is checked here; whatever needs the model (its name, its context length) is the engine's answer.
Numbers and truth values are taken as vLLM's reader of bodies (pydantic, lax) takes them: `"5"`, `5.0`, `"yes"`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import orjson

from proxy.errors import BadRequest
from proxy.image_parts import MARK, bytes_and_tokens
from proxy.long_body import LONG_BYTES, Body, LongBody, LongStrings, long_strings

BYTES_PER_TOKEN = 4  # the seeds' proxy divides the body's bytes by 4 as well (ascend-proxy.md 2.1, "Scores")
ROUTES = {
    b"/v1/completions": "completions",
    b"/v1/chat/completions": "chat",
    b"/v1/responses": "responses",
    b"/v1/messages": "messages",
}
LIMITS: dict[str, tuple[str, ...]] = {
    "completions": ("max_tokens",),
    "chat": ("max_completion_tokens", "max_tokens"),  # the first that is given counts
    "responses": ("max_output_tokens",),
    "messages": ("max_tokens",),
}
INT64_MAX = 2**63 - 1
MAX_JSON_VALUES = 1 << 22
"""A body of nothing but `{}` takes 30 times its bytes when it is read. So many are 300 MB, and no prompt has more."""
# What a leg that generates one forced token has no use for. None of it changes the prompt (tools, tool_choice,
# documents, chat_template_kwargs and the like do, and stay). A grammar or a list of allowed tokens that leaves only the
# end token has nothing to sample from when min_tokens forbids the end, and a grammar is compiled before the prefill
# starts; a stop string must not be what ends the request: KV is handed out only for one that ends by length.
_NOT_FOR_ONE_TOKEN = frozenset((
    "stream_options", "best_of", "stop", "stop_token_ids", "stop_sequences", "allowed_token_ids", "response_format",
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object",
    "structural_tag", "background",
))  # fmt: skip
_FORCED: dict[str, dict[str, Any]] = {
    route: {"stream": False, "min_tokens": 1, **dict.fromkeys(limits, 1)} for route, limits in LIMITS.items()
}
_FORCED["responses"]["store"] = False
del _FORCED["messages"]["min_tokens"]  # no field of that API: it has no way to force a token
_HAS_FORMAT = {"responses": "text", "messages": "output_config"}  # what else these hold may shape the prompt
_ONE = ("n", "max_completion_tokens", "max_output_tokens")
_REWRITTEN = _NOT_FOR_ONE_TOKEN | {*_ONE, *_HAS_FORMAT.values()}
# By these, whoever routes tells SGLang where KV comes from: a client must not.
BOOTSTRAP_FIELDS = frozenset(
    ("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key", "disagg_prefill_dp_rank")
)
_UNUSUAL = BOOTSTRAP_FIELDS | frozenset(
    (
        "n", "best_of", "seed", "use_beam_search", "prompt_embeds", "prompt_logprobs", "echo", "vllm_xargs",
        "kv_transfer_params", "previous_response_id", "background",
    )
)  # fmt: skip
_TRUE = frozenset(("1", "on", "t", "true", "y", "yes"))
_FALSE = frozenset(("0", "off", "f", "false", "n", "no"))
WRONG_TYPE = "Bad Request"  # vLLM's word for a body that its schema refuses; a wrong value is a BadRequestError


@dataclass(slots=True)
class ApiCall:
    """One client request: `body` is what it sent, byte for byte; `fields` the same, parsed and never changed.

    An empty `kv_transfer_params` is taken out of both."""

    route: str
    body: bytes
    outline: dict[str, Any]
    """`fields`, but with stand-ins for `long`: for keys, types and short values, and for what `written` sends."""
    stream: bool
    num_prompt_tokens: int
    """Exact for a list of token ids, else the body's bytes over BYTES_PER_TOKEN; images have a price of their own."""
    max_new_tokens: int | None
    num_prompts: int
    own_kv_transfer_params: bool = False
    num_choices: int = 1
    """Of each prompt."""
    indivisible: str = ""
    """Why one KV is not enough for it and it can't be divided either; empty where there is no such reason."""
    scores_prompt: bool = False
    """Whether the answer has logprobs of the prompt's tokens, which only who computes the prompt can give."""
    own_bootstrap: str = ""
    """A field of the client's that only who routes to SGLang may say; empty where it has none."""
    long: LongStrings | None = None
    """The body's long strings, where there are any; then the engine is the first that reads them."""
    _whole: dict[str, Any] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """Raises BadRequest where a long string turns out to be none."""
        if self.long is None:
            return self.outline
        if self._whole is None:
            self._whole = _parsed(self.body)
        return self._whole

    def written(self, outline: dict[str, Any]) -> Body:
        """As JSON: what was made of this call's `outline`."""
        return orjson.dumps(outline) if self.long is None else self.long.written(outline)


def check_values(body: bytes) -> None:
    """Raises BadRequest where a body would take far more room than it has bytes."""
    if len(body) >= 2 * MAX_JSON_VALUES and sum(map(body.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise BadRequest(f"The request body has more than {MAX_JSON_VALUES} JSON values.", error_type=WRONG_TYPE)


def _parsed(body: bytes) -> Any:
    check_values(body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.", error_type=WRONG_TYPE) from None


def _outlined(body: bytes) -> tuple[Any, LongStrings | None]:
    """The body parsed, its long strings left out where that is safe."""
    if (long := long_strings(body)) is not None:
        check_values(long.outline)
        with contextlib.suppress(orjson.JSONDecodeError):  # said below, with the place in the client's own text
            outline = orjson.loads(long.outline)
            if type(outline) is dict and _UNUSUAL.isdisjoint(outline):
                return outline, long
    return _parsed(body), None


def parse_call(route: str, body: bytes) -> ApiCall:
    """Raises BadRequest, which names the field."""
    fields, long = (_parsed(body), None) if len(body) < LONG_BYTES else _outlined(body)
    if type(fields) is not dict:
        raise BadRequest("The request body must be a JSON object.", error_type=WRONG_TYPE)
    get = fields.get
    model = get("model")
    if model is not None and type(model) is not str:
        raise _wrong_type("model", "must be a string")
    stream = get("stream")
    if stream is not None and type(stream) is not bool:
        stream = _truth(stream, "stream")
    least = 0 if route == "completions" and get("echo") is True else 1  # nothing but the prompt, for its logprobs
    limit = None
    for name in LIMITS[route]:
        given = get(name)
        if given is not None:
            given = _count(given, name, least)
            limit = given if limit is None else limit
    num_tokens = None
    num_prompts = 1
    if route == "completions":
        num_prompts, num_tokens = _prompts(get("prompt"), get("prompt_embeds"))
    elif route == "responses":
        if type(get("input")) not in (str, list):
            raise _wrong_type("input", "is required and must be a string or a list")
    elif type(get("messages")) is not list:
        raise _wrong_type("messages", "is required and must be a list")
    elif MARK in (body if long is None else long.outline):
        num_bytes = len(body) if long is None else len(body) - long.num_image_bytes()
        num_bytes, num_tokens = bytes_and_tokens(num_bytes, fields["messages"])
        num_tokens += num_bytes // BYTES_PER_TOKEN + 1
    call = ApiCall(
        route,
        body,
        fields,
        stream is True,
        num_tokens if num_tokens is not None else len(body) // BYTES_PER_TOKEN + 1,
        limit,
        num_prompts,
        long=long,
    )
    if not _UNUSUAL.isdisjoint(fields):
        _look_closer(call)
    return call


def _look_closer(call: ApiCall) -> None:
    """A call with fields that few have, which has no stand-ins: whether it can be divided, whose the logprobs of its
    prompt are, what else it must not say. Raises BadRequest."""
    get = call.fields.get
    call.own_bootstrap = min(BOOTSTRAP_FIELDS & call.fields.keys(), default="")
    if "kv_transfer_params" in call.outline:
        _take_out_if_empty(call)
    xargs = get("vllm_xargs")  # vLLM puts both into the same dictionary
    if type(xargs) is dict and "kv_transfer_params" in xargs:
        call.own_kv_transfer_params = True
    if call.route == "responses":
        if get("previous_response_id") is not None or get("background"):
            call.indivisible = "stored_response"
    elif call.route != "messages":
        call.num_choices = _count(get("n"), "n") or 1
        call.indivisible = _why_indivisible(call)
        _judge_scores(call)


def _take_out_if_empty(call: ApiCall) -> None:
    if call.outline["kv_transfer_params"] is None or call.outline["kv_transfer_params"] == {}:
        del call.outline["kv_transfer_params"]
        call.body = orjson.dumps(call.outline)  # parsers differ on which of two equal keys counts: let none be seen
    else:
        call.own_kv_transfer_params = True


def _why_indivisible(call: ApiCall) -> str:
    get = call.fields.get
    best_of, seed = get("best_of"), get("seed")
    if get("use_beam_search"):
        return "beam_search"
    if best_of is not None and best_of != 1:
        return "best_of"
    if call.num_choices > 1 and seed is not None and (type(seed) is not int or seed + call.num_choices > INT64_MAX):
        return "seed"  # the engine's to judge, and to count up
    if call.num_prompts > 1 and get("prompt") is not None and get("prompt_embeds") is not None:
        return "prompts_of_two_kinds"
    return ""


def _judge_scores(call: ApiCall) -> None:
    """In vLLM an echo asks for logprobs of the prompt: in a completion as many as `logprobs`, in a chat as many as
    `top_logprobs`, which has a default."""
    get = call.fields.get
    asked, echo = get("prompt_logprobs") is not None, bool(get("echo"))
    chat_echo = echo and call.route == "chat"
    call.scores_prompt = asked or chat_echo or (echo and get("logprobs") is not None)
    if call.scores_prompt and (call.stream or chat_echo):
        call.indivisible = call.indivisible or "prompt_logprobs"  # a stream is not taken apart for them


def _wrong_type(name: str, reason: str) -> BadRequest:
    return BadRequest(f"'{name}' {reason}.", name, error_type=WRONG_TYPE)


def _count(value: Any, name: str, least: int = 1) -> int | None:
    if value is None:
        return None
    number = value if type(value) is int else _integer(value, name)
    if number < least:
        raise BadRequest(f"'{name}' must be at least {least}, got {number}.", name)
    return number


def _integer(value: Any, name: str) -> int:
    if type(value) is bool:
        return int(value)
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) is str:
        try:
            return int(value.removesuffix(".0"))
        except ValueError:
            pass
    raise _wrong_type(name, "must be an integer")


def _truth(value: Any, name: str) -> bool:
    word = str(int(value)) if type(value) in (int, float) and value in (0, 1) else value
    if type(word) is str and word.lower() in _TRUE | _FALSE:
        return word.lower() in _TRUE
    raise _wrong_type(name, "must be true or false")


def _prompts(prompt: Any, embeds: Any) -> tuple[int, int | None]:
    """How many prompts a completion has, and how many tokens where token ids were given."""
    if type(prompt) is str:
        return 1, None
    if prompt is None and embeds is not None:
        return len(embeds) if isinstance(embeds, list) and embeds else 1, None
    if prompt is None or prompt == []:
        raise BadRequest("'prompt' is required and must not be empty.", "prompt")
    if type(prompt) is not list:
        raise _wrong_type("prompt", "must be a string or a list")
    first = prompt[0]
    if type(first) is int:
        return 1, len(prompt)
    if type(first) is list:
        return len(prompt), sum(len(one) for one in prompt if isinstance(one, list))
    if type(first) is not str:
        raise _wrong_type("prompt", "must hold strings, token ids or lists of token ids")
    return len(prompt), None


def one_token(
    call: ApiCall, kv_transfer_params: dict[str, Any] | None, *, every_choice: bool = False
) -> dict[str, Any]:
    """The call's outline for a leg that computes the prompt: one forced token, one choice (or `every_choice`, where
    each has KV of its own), not streamed.

    `min_tokens` keeps the end token from being that token: an engine hands KV out only if the request ends by length
    (ascend-proxy.md 2.4)."""
    fields = {**call.outline, **_FORCED[call.route]}
    if kv_transfer_params is not None:
        fields["kv_transfer_params"] = kv_transfer_params
    if not _REWRITTEN.isdisjoint(call.outline):
        for name in ("max_completion_tokens", "max_output_tokens") if every_choice else _ONE:
            if name in fields:
                fields[name] = 1
        for name in _NOT_FOR_ONE_TOKEN:
            fields.pop(name, None)
        holder = fields.get(_HAS_FORMAT.get(call.route, ""))
        if type(holder) is dict:
            fields[_HAS_FORMAT[call.route]] = {key: value for key, value in holder.items() if key != "format"}
    return fields


def without_prompt_scores(call: ApiCall) -> ApiCall:
    """The call for a decoder whose prompt was computed, and scored, elsewhere: it has no logits of the prompt, and some
    engines die of being asked (vllm-ascend 13363)."""
    fields = {key: value for key, value in call.fields.items() if key not in ("prompt_logprobs", "echo")}
    return ApiCall(
        call.route,
        orjson.dumps(fields),
        fields,
        call.stream,
        call.num_prompt_tokens,
        call.max_new_tokens,
        call.num_prompts,
        call.own_kv_transfer_params,
        call.num_choices,
    )


def one_token_body(call: ApiCall, kv_transfer_params: dict[str, Any] | None, *, every_choice: bool = False) -> Body:
    """`one_token` as JSON."""
    return call.written(one_token(call, kv_transfer_params, every_choice=every_choice))


def spliced(call: ApiCall, members: dict[str, Any]) -> Body:
    """The call's body with `members` added, without serialising the rest again.

    A key that is there already has to be replaced, which means serialising anew."""
    if not members.keys().isdisjoint(call.outline):
        return call.written({**call.outline, **members})
    body = call.body
    end = body.rfind(b"}")
    added = b"," * bool(call.outline) + orjson.dumps(members)[1:]
    return body[:end] + added if len(body) < LONG_BYTES else LongBody(memoryview(body)[:end], added)
