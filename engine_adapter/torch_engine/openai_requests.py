"""The bodies of the OpenAI API, as vLLM accepts them, and what they ask of the engine. Pure.

Unknown fields are accepted, as vLLM does. Fields that vLLM knows and this engine can't honour are refused by name:
an answer that silently ignores them would be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from engine_adapter.torch_engine.api_errors import ApiError, from_validation_error

MAX_LOGPROBS = 20
"""vLLM's default for `--max-logprobs`."""
MAX_N = 128
"""OpenAI's limit."""
MAX_PROMPTS = 1024
MAX_STOP_STRINGS = 128
INT64_MAX = 2**63 - 1

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "prompt_embeds": (None,),
    "use_beam_search": (None, False),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "logits_processors": (None, []),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "cache_salt": (None,),
    "mm_processor_kwargs": (None, {}),
}
"""Fields that change the answer and that this engine does not have, with the values that ask for nothing."""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
Seed = Annotated[int, BeforeValidator(_no_bool), Field(ge=-INT64_MAX - 1, le=INT64_MAX)]


class StreamOptions(BaseModel):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class GenerationRequest(BaseModel):
    """What completions and chat have in common."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    frequency_penalty: Float | None = 0.0
    presence_penalty: Float | None = 0.0
    repetition_penalty: Float | None = None
    logit_bias: dict[str, Float] | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = 0
    n: Int | None = 1
    best_of: Int | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: bool | None = False
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: Int | None = None
    min_p: Float | None = None
    prompt_logprobs: Int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Int | None = None
    priority: Int | None = 0
    user: str | None = None
    response_format: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> GenerationRequest:
        check_generation(self)
        return self

    @property
    def num_choices(self) -> int:
        """Continuations of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """vLLM gives running usage only where the final one is asked for too."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def wanted_logprobs(self) -> int | None:
        """None: none; else how many of the likeliest tokens beside the sampled one."""
        raise NotImplementedError

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        return self.prompt_logprobs

    @property
    def wanted_max_tokens(self) -> int | None:
        """None: the rest of the context."""
        return self.max_tokens


class CompletionRequest(GenerationRequest):
    """`prompt` is a string, token ids, or a list of either."""

    prompt: Any = None
    max_tokens: Int | None = 16
    logprobs: Int | None = None
    echo: bool | None = False
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.logprobs is not None:
            check_logprobs("logprobs", self.logprobs)
        check_max_tokens("max_tokens", self.max_tokens, self.min_tokens, lowest=0 if self.echo else 1)
        self.prompts()
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.prompt_logprobs is None and self.echo else self.prompt_logprobs

    @property
    def echo_only(self) -> bool:
        return bool(self.echo) and self.max_tokens == 0

    @property
    def wanted_max_tokens(self) -> int | None:
        """vLLM generates, and doesn't show, one token for a request that only wants its prompt scored."""
        return 1 if self.echo_only else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt. Raises ApiError."""
        prompt = self.prompt
        if prompt is None or prompt in ("", []):
            raise ApiError("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list):
            if is_token_ids(prompt):
                return [prompt]
            if all(isinstance(item, str) and item for item in prompt) or all(
                isinstance(item, list) and item and is_token_ids(item) for item in prompt
            ):
                if len(prompt) > MAX_PROMPTS:
                    raise ApiError(f"prompt holds {len(prompt)} prompts, at most {MAX_PROMPTS} fit", param="prompt")
                return prompt
        raise ApiError(
            "prompt must be a string, a list of token ids of 0 or more, a list of non-empty strings or a list of "
            "non-empty lists of token ids",
            error_type="Bad Request",
            param="prompt",
        )


class ChatMessage(BaseModel):
    """Passed on to the template with all its fields, also unknown ones."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[Any] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Int | None = None
    logprobs: bool | None = False
    top_logprobs: Int | None = 0
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    echo: bool | None = False

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        check_chat(self)
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(BaseModel):
    """Either `prompt` or `messages`, as in vLLM."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise ApiError("give either `prompt` or `messages`", param="prompt")
        return self


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str | None = None
    tokens: list[Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]]


Body = TypeVar("Body", bound=BaseModel)


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """Read a request body. Raises ApiError (400), which names the field at fault."""
    try:
        fields = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(f"the body is not valid JSON: {error}", error_type="Bad Request") from None
    if not isinstance(fields, dict):
        raise ApiError(f"the body must be a JSON object, not {type(fields).__name__}", error_type="Bad Request")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise from_validation_error(error) from None


def check_generation(request: GenerationRequest) -> None:
    """Raises ApiError for a value out of range or a field that can't be honoured."""
    for field, (low, high) in RANGES.items():
        value = getattr(request, field)
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise ApiError(f"{field} must be in [{low}, {high}], got {value}.", param=field)
    if request.top_p is not None and not 0.0 < request.top_p <= 1.0:
        raise ApiError(f"top_p must be in (0, 1], got {request.top_p}.", param="top_p")
    if request.repetition_penalty is not None and not 0.0 < request.repetition_penalty < math.inf:
        raise ApiError(
            f"repetition_penalty must be greater than zero, got {request.repetition_penalty}.",
            param="repetition_penalty",
        )
    if request.best_of is not None and request.best_of != request.num_choices:
        raise ApiError(f"best_of must be equal to n={request.num_choices}, got {request.best_of}.", param="best_of")
    if len(request.stop_strings) > MAX_STOP_STRINGS:
        raise ApiError(f"stop may hold at most {MAX_STOP_STRINGS} strings", param="stop")
    if "" in request.stop_strings:
        raise ApiError("stop cannot contain an empty string.", param="stop")
    if request.stream_options is not None and not request.stream:
        raise ApiError("Stream options can only be defined when `stream=True`.", param="stream_options")
    if request.prompt_logprobs is not None:
        check_logprobs("prompt_logprobs", request.prompt_logprobs)
        if request.stream and request.prompt_logprobs > 0:
            raise ApiError("`prompt_logprobs` are not available when `stream=True`.", param="prompt_logprobs")
    for key in request.logit_bias or {}:
        if not key.isdigit():
            raise ApiError(f"logit_bias must map token ids to numbers, got the key {key[:40]!r}.", param="logit_bias")
    check_unsupported(request.model_extra or {}, request.response_format)


def is_token_ids(items: list[Any]) -> bool:
    return all(type(item) is int and item >= 0 for item in items)


RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "min_p": (0.0, 1.0),
    "top_k": (-1, INT64_MAX),
    "n": (1, MAX_N),
    "min_tokens": (0, INT64_MAX),
    "truncate_prompt_tokens": (-1, INT64_MAX),
}
"""Closed intervals; vLLM's, but for `n`, which is OpenAI's."""


def check_unsupported(extra: Mapping[str, Any], response_format: dict[str, Any] | None) -> None:
    for field, silent in UNSUPPORTED.items():
        if field in extra and extra[field] not in silent:
            raise ApiError(f"{field} is not supported by this engine.", param=field)
    if response_format is not None and response_format.get("type") != "text":
        raise ApiError("only response_format of type `text` is supported by this engine.", param="response_format")


def check_logprobs(field: str, value: int) -> None:
    if value < 0:
        raise ApiError(f"`{field}` must be a positive value.", param=field)
    if value > MAX_LOGPROBS:
        raise ApiError(f"Requested {field} of {value}, which is greater than max allowed: {MAX_LOGPROBS}", param=field)


def check_max_tokens(field: str, max_tokens: int | None, min_tokens: int | None, lowest: int = 1) -> None:
    if max_tokens is None:
        return
    if max_tokens < lowest:
        raise ApiError(f"{field} must be at least 1, got {max_tokens}.", param=field)
    if (min_tokens or 0) > max(1, max_tokens):
        raise ApiError(
            f"min_tokens must be less than or equal to {field}={max_tokens}, got {min_tokens}.", param="min_tokens"
        )


def check_chat(request: ChatRequest) -> None:
    check_max_tokens("max_tokens", request.max_tokens, None)
    check_max_tokens("max_completion_tokens", request.max_completion_tokens, None)
    check_max_tokens("max_tokens", request.wanted_max_tokens, request.min_tokens)
    if request.top_logprobs:
        check_logprobs("top_logprobs", request.top_logprobs)
        if not request.logprobs:
            raise ApiError("when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs")
    if request.echo:
        raise ApiError("echo is not supported by this engine in chat.", param="echo")
    if request.continue_final_message and request.add_generation_prompt:
        raise ApiError(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            param="continue_final_message",
        )
    if request.tool_choice not in (None, "none", "auto"):
        raise ApiError(
            "tool_choice must be `none` or `auto`: this engine can't force a tool call.", param="tool_choice"
        )
    if request.tool_choice == "auto" and not request.tools:
        raise ApiError("When using `tool_choice`, `tools` must be set.", param="tool_choice")
