"""The proxy refuses a body in the words of the engine, which has vLLM's: whoever answers, a client reads the same."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from engine_adapter.torch_engine.api_errors import ApiError
from engine_adapter.torch_engine.openai_requests import ChatRequest, CompletionRequest, parse_body
from proxy.errors import BadRequest
from proxy.openai_api import parse_call

KINDS: dict[str, type[BaseModel]] = {"completions": CompletionRequest, "chat": ChatRequest}


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("completions", b"{"),
        ("completions", b"[]"),
        ("completions", b'{"model":"m"}'),
        ("completions", b'{"prompt":[]}'),
        ("completions", b'{"prompt":{"a":1}}'),
        ("completions", b'{"prompt":"a","max_tokens":0}'),
        ("completions", b'{"prompt":"a","max_tokens":"nine"}'),
        ("completions", b'{"prompt":"a","max_tokens":9.5}'),
        ("completions", b'{"prompt":"a","n":0}'),
        ("completions", b'{"prompt":"a","stream":"maybe"}'),
        ("completions", b'{"prompt":"a","model":7}'),
        ("chat", b'{"model":"m"}'),
        ("chat", b'{"messages":"hello"}'),
        ("chat", b'{"messages":[{"role":"user"}],"max_completion_tokens":0}'),
    ],
)
def test_status_type_and_param_are_the_engines(route: str, body: bytes) -> None:
    with pytest.raises(ApiError) as engines:
        parse_body(KINDS[route], body)
    with pytest.raises(BadRequest) as ours:
        parse_call(route, body)
    assert (ours.value.status, ours.value.error_type, ours.value.param) == (
        engines.value.status, engines.value.error_type, engines.value.param,
    )  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":"a","max_tokens":"9","n":"2","stream":0}',
        b'{"prompt":"a","max_tokens":9.0,"n":2.0,"stream":"no"}',
        b'{"prompt":["a","b"],"seed":5,"kv_transfer_params":{}}',
        b'{"prompt":"a","kv_transfer_params":null,"stream":1}',
    ],
)
def test_what_the_engine_takes_is_taken_for_the_same(body: bytes) -> None:
    engines, ours = parse_body(CompletionRequest, body), parse_call("completions", body)
    assert (ours.max_new_tokens or 16, ours.num_choices, ours.stream, ours.num_prompts) == (
        engines.max_tokens, engines.num_choices, engines.stream or False, len(engines.prompts()),
    )  # fmt: skip
