from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.errors import BadRequest
from proxy.openai_api import parse_call, spliced


def call(route: str = "completions", **fields: Any):  # type: ignore[no-untyped-def]
    return parse_call(route, orjson.dumps({"model": "m", "prompt": "hello", **fields}))


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("completions", b"{", None),
        ("completions", b"", None),
        ("completions", b"\xff\xfe", None),
        ("completions", b"[1]", None),
        ("completions", b'"x"', None),
        ("completions", b"NaN", None),
        ("completions", b'{"model":1,"prompt":"x"}', "model"),
        ("completions", b'{"prompt":"x","stream":"yes"}', "stream"),
        ("completions", b'{"prompt":"x","stream":1}', "stream"),
        ("completions", b'{"prompt":"x","max_tokens":0}', "max_tokens"),
        ("completions", b'{"prompt":"x","max_tokens":-1}', "max_tokens"),
        ("completions", b'{"prompt":"x","max_tokens":"5"}', "max_tokens"),
        ("completions", b'{"prompt":"x","max_tokens":true}', "max_tokens"),
        ("completions", b'{"prompt":"x","n":0}', "n"),
        ("completions", b'{"model":"m"}', "prompt"),
        ("completions", b'{"prompt":[]}', "prompt"),
        ("completions", b'{"prompt":[{}]}', "prompt"),
        ("completions", b'{"prompt":7}', "prompt"),
        ("chat", b'{"model":"m"}', "messages"),
        ("chat", b'{"messages":"hi"}', "messages"),
        ("chat", b'{"messages":[],"max_completion_tokens":0}', "max_completion_tokens"),
    ],
)
def test_what_an_engine_is_not_troubled_with(route: str, body: bytes, param: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_call(route, body)
    assert (caught.value.status, caught.value.param) == (400, param)
    if param:
        assert param in caught.value.message


def test_nulls_are_absent() -> None:
    one = call(stream=None, max_tokens=None, n=None, kv_transfer_params=None)
    assert (one.stream, one.max_new_tokens, one.own_kv_transfer_params) == (False, None, False)


@pytest.mark.parametrize(
    ("prompt", "num_prompts", "num_tokens"),
    [([1, 2, 3], 1, 3), ([[1, 2], [3]], 2, 3), (["a"], 1, None), (["a", "b"], 2, None), ("x" * 4000, 1, None)],
)
def test_prompts_are_counted(prompt: Any, num_prompts: int, num_tokens: int | None) -> None:
    one = call(prompt=prompt)
    assert one.num_prompts == num_prompts
    assert one.num_prompt_tokens == (num_tokens if num_tokens is not None else len(one.body) // 4 + 1)


def test_chat_takes_the_newer_limit_first() -> None:
    assert call("chat", messages=[], max_tokens=5, max_completion_tokens=7).max_new_tokens == 7


@pytest.mark.parametrize(
    "body", [b"{}", b" { } \n", b'{"a":1}', b'{"a":{"b":"}"}}\r\n ', b'{ "a" : [1, 2.50] , "b":"\\u00e9" }']
)
def test_splicing_keeps_the_original_bytes(body: bytes) -> None:
    fields = orjson.loads(body)
    made = spliced(body, fields, "kv", {"x": [1]})
    assert orjson.loads(made) == {**fields, "kv": {"x": [1]}}
    assert made.startswith(body[: body.rfind(b"}")])


def test_splicing_replaces_a_key_that_is_there() -> None:
    body = b'{"kv":null,"a":1}'
    assert orjson.loads(spliced(body, orjson.loads(body), "kv", 2)) == {"kv": 2, "a": 1}


def test_a_prompt_may_be_asked_for_alone() -> None:
    assert call(echo=True, max_tokens=0).max_new_tokens == 0
    with pytest.raises(BadRequest, match="max_tokens"):
        call(max_tokens=0)
    with pytest.raises(BadRequest, match="max_tokens"):
        call(echo=True, max_tokens=-1)
