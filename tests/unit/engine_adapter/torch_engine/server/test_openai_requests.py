from __future__ import annotations

from typing import Any

import orjson
import pytest

from engine_adapter.torch_engine.api_errors import ApiError
from engine_adapter.torch_engine.openai_requests import (
    MAX_LOGPROBS,
    MAX_N,
    MAX_PROMPTS,
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse_body,
)

MESSAGES = [{"role": "user", "content": "hi"}]
REFUSED_BY_BOTH: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": MAX_N + 1}, "n"),
    ({"best_of": 3, "n": 2}, "best_of"),
    ({"seed": 2**63}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": 3}, "stop"),
    ({"stop": ["x"] * 129}, "stop"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids.0"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stream": "perhaps"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"kv_transfer_params": []}, "kv_transfer_params"),
    ({"model": 3}, "model"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"cache_salt": "x"}, "cache_salt"),
    ({"guided_regex": "a+"}, "guided_regex"),
]
REFUSED_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["x"] * (MAX_PROMPTS + 1)}, "prompt"),
    ({"logprobs": MAX_LOGPROBS + 1}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"suffix": "x"}, "suffix"),
]
REFUSED_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": MAX_LOGPROBS + 1}, "top_logprobs"),
    ({"tool_choice": "required", "tools": [{}]}, "tool_choice"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"echo": True}, "echo"),
]


def refusal(kind: Any, fields: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_body(kind, orjson.dumps(fields))
    return caught.value


@pytest.mark.parametrize(("fields", "param"), REFUSED_BY_BOTH + REFUSED_COMPLETIONS, ids=str)
def test_a_completion_refused_names_its_field(fields: dict[str, Any], param: str) -> None:
    error = refusal(CompletionRequest, {"prompt": "x"} | fields)
    assert (error.status, error.param) == (400, param)
    assert param.replace("_", " ") in error.message.lower().replace("_", " ")


@pytest.mark.parametrize(("fields", "param"), REFUSED_BY_BOTH + REFUSED_CHATS, ids=str)
def test_a_chat_refused_names_its_field(fields: dict[str, Any], param: str) -> None:
    error = refusal(ChatRequest, {"messages": MESSAGES} | fields)
    assert (error.status, error.param) == (400, param)
    assert param.replace("_", " ") in error.message.lower().replace("_", " ")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"3", b'"x"', b"null", b"\xff"])
def test_what_is_no_json_object_is_a_400(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(CompletionRequest, raw)
    assert caught.value.status == 400


def test_a_missing_field_is_named() -> None:
    error = refusal(ChatRequest, {})
    assert error.param == "messages"
    assert error.message == "1 validation error: messages: Field required"


def test_a_long_wrong_value_is_not_repeated() -> None:
    assert len(refusal(CompletionRequest, {"prompt": "x", "max_tokens": "9" * 10_000 + "x"}).message) < 300


def test_null_means_default_and_unknown_fields_pass() -> None:
    nulls = dict.fromkeys(
        ("temperature", "top_p", "n", "seed", "stop", "stop_token_ids", "logit_bias", "min_tokens", "stream",
         "stream_options", "logprobs", "echo", "kv_transfer_params", "user", *UNSUPPORTED)
    )  # fmt: skip
    body = parse_body(CompletionRequest, orjson.dumps({"prompt": "x", "an_unknown_field": {"a": 1}} | nulls))
    assert (body.max_tokens, body.num_choices, body.stop_strings) == (16, 1, [])


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_every_form_of_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert parse_body(CompletionRequest, orjson.dumps({"prompt": prompt})).prompts() == prompts


def test_limits_themselves_are_accepted() -> None:
    at_limits = {"temperature": 2, "top_p": 1, "min_p": 1, "presence_penalty": -2, "n": MAX_N, "top_k": -1}
    parse_body(ChatRequest, orjson.dumps({"messages": MESSAGES, "logprobs": True, "top_logprobs": 20} | at_limits))
    parse_body(CompletionRequest, orjson.dumps({"prompt": "x", "logprobs": 20, "stop": ["x"] * 128} | at_limits))


def test_echo_may_generate_nothing() -> None:
    body = parse_body(CompletionRequest, b'{"prompt": "x", "echo": true, "max_tokens": 0}')
    assert (body.echo_only, body.wanted_max_tokens) == (True, 1)


def test_max_completion_tokens_goes_first() -> None:
    body = parse_body(ChatRequest, orjson.dumps({"messages": MESSAGES, "max_tokens": 9, "max_completion_tokens": 3}))
    assert body.wanted_max_tokens == 3


@pytest.mark.parametrize("fields", [{}, {"prompt": "x", "messages": MESSAGES}])
def test_tokenize_takes_a_prompt_or_messages(fields: dict[str, Any]) -> None:
    assert refusal(TokenizeRequest, fields).status == 400


@pytest.mark.parametrize("tokens", [None, "x", [1.5], [-1], [True]])
def test_detokenize_takes_token_ids(tokens: Any) -> None:
    assert refusal(DetokenizeRequest, {"tokens": tokens}).status == 400
