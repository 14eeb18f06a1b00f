from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.errors import BadRequest
from proxy.openai_api import ApiCall, one_token, parse_call, spliced, without_prompt_scores


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
        ("completions", b'{"prompt":"x","stream":"maybe"}', "stream"),
        ("completions", b'{"prompt":"x","stream":2}', "stream"),
        ("completions", b'{"prompt":"x","max_tokens":0}', "max_tokens"),
        ("completions", b'{"prompt":"x","max_tokens":-1}', "max_tokens"),
        ("completions", b'{"prompt":"x","max_tokens":"five"}', "max_tokens"),
        ("completions", b'{"prompt":"x","max_tokens":5.5}', "max_tokens"),
        ("completions", b'{"prompt":"x","n":0}', "n"),
        ("completions", b'{"model":"m"}', "prompt"),
        ("completions", b'{"prompt":[]}', "prompt"),
        ("completions", b'{"prompt":[{}]}', "prompt"),
        ("completions", b'{"prompt":7}', "prompt"),
        ("chat", b'{"model":"m"}', "messages"),
        ("chat", b'{"messages":"hi"}', "messages"),
        ("chat", b'{"messages":[],"max_completion_tokens":0}', "max_completion_tokens"),
        ("responses", b'{"model":"m"}', "input"),
        ("responses", b'{"input":"x","max_output_tokens":0}', "max_output_tokens"),
        ("messages", b'{"model":"m"}', "messages"),
        ("messages", b'{"messages":[],"max_tokens":"many"}', "max_tokens"),
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
    made = spliced(ApiCall("chat", body, fields, False, 1, None, 1), {"kv": {"x": [1]}})
    assert isinstance(made, bytes)
    assert orjson.loads(made) == {**fields, "kv": {"x": [1]}}
    assert made.startswith(body[: body.rfind(b"}")])


def test_splicing_replaces_a_key_that_is_there() -> None:
    body = b'{"kv":null,"a":1}'
    made = spliced(ApiCall("chat", body, orjson.loads(body), False, 1, None, 1), {"kv": 2})
    assert isinstance(made, bytes) and orjson.loads(made) == {"kv": 2, "a": 1}


def test_a_prompt_may_be_asked_for_alone() -> None:
    assert call(echo=True, max_tokens=0).max_new_tokens == 0
    with pytest.raises(BadRequest, match="max_tokens"):
        call(max_tokens=0)
    with pytest.raises(BadRequest, match="max_tokens"):
        call(echo=True, max_tokens=-1)


@pytest.mark.parametrize(("value", "number"), [(5, 5), (5.0, 5), ("5", 5), ("5.0", 5), (" 5 ", 5), (True, 1)])
def test_numbers_are_taken_as_vllm_takes_them(value: Any, number: int) -> None:
    assert (call(max_tokens=value).max_new_tokens, call(n=value).num_choices) == (number, number)


@pytest.mark.parametrize(
    ("value", "truth"), [(1, True), (0, False), (1.0, True), (0.0, False), ("yes", True), ("Off", False), ("t", True)]
)
def test_truth_is_taken_as_vllm_takes_it(value: Any, truth: bool) -> None:
    one = call(stream=value)
    assert one.stream is truth and orjson.loads(one.body)["stream"] == value


def test_a_number_beyond_64_bits_is_the_engines_to_judge() -> None:
    one = parse_call("completions", b'{"prompt":"x","max_tokens":1000000000000000000000000000000}')
    assert one.max_new_tokens is not None and one.max_new_tokens > 10**29 and b"000000000000}" in one.body


@pytest.mark.parametrize("value", [b"{},", b"[[[[]]]],", b"1,"])
def test_a_body_that_takes_far_more_room_than_it_has_bytes_is_refused(value: bytes) -> None:
    """15 MB of the first took 449 MB, and half a second of everybody's time."""
    many = value * (5_000_000 // (value.count(b"[") + 1))
    with pytest.raises(BadRequest, match="more than 4194304 JSON values"):
        parse_call("completions", b'{"prompt":"x","y":[%b0]}' % many)
    assert parse_call("completions", b'{"prompt":"%b"}' % (b"a" * len(many))).num_prompts == 1


@pytest.mark.parametrize("empty", [None, {}])
def test_empty_kv_transfer_params_are_taken_out(empty: Any) -> None:
    one = call(kv_transfer_params=empty, a=1)
    assert not one.own_kv_transfer_params
    assert "kv_transfer_params" not in one.fields and b"kv_transfer_params" not in one.body


def test_an_earlier_one_of_two_kv_transfer_params_is_taken_out_too() -> None:
    one = parse_call("completions", b'{"prompt":"x","kv_transfer_params":{"do_remote_prefill":true},'
                     b'"kv_transfer_params":{}}')  # fmt: skip
    assert b"kv_transfer_params" not in one.body


@pytest.mark.parametrize("value", [{"do_remote_prefill": True}, [], "x", 0, False])
def test_a_clients_kv_transfer_params_are_told_apart(value: Any) -> None:
    assert call(kv_transfer_params=value).own_kv_transfer_params
    assert call(vllm_xargs={"kv_transfer_params": value}).own_kv_transfer_params


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_beam_search": True, "n": 4}, "beam_search"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 1, "n": 1}, ""),
        ({"n": 2, "seed": 2**63 - 1}, "seed"),
        ({"n": 2, "seed": "7"}, "seed"),
        ({"n": 2, "seed": 7}, ""),
        ({"prompt": ["a", "b"], "prompt_embeds": ["c"]}, "prompts_of_two_kinds"),
        ({"prompt_logprobs": 1}, ""),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"echo": True, "stream": True}, ""),
    ],
)
def test_what_one_engine_has_to_compute_alone(fields: dict[str, Any], reason: str) -> None:
    assert call(**fields).indivisible == reason


@pytest.mark.parametrize(
    ("fields", "scores"),
    [
        ({"prompt_logprobs": 0}, True),
        ({"echo": True, "logprobs": 0}, True),
        ({"echo": True}, False),
        ({"logprobs": 5}, False),
    ],
)
def test_whether_the_prompt_is_scored(fields: dict[str, Any], scores: bool) -> None:
    assert call(**fields).scores_prompt is scores


def test_a_stored_response_stays_with_one_engine() -> None:
    one = parse_call("responses", b'{"input":"x","previous_response_id":"resp_1"}')
    assert one.indivisible == "stored_response"
    assert parse_call("responses", b'{"input":"x","max_output_tokens":9}').max_new_tokens == 9


def one_of(route: str, **fields: Any) -> dict[str, Any]:
    return one_token(parse_call(route, orjson.dumps(fields)), {"ask": 1})


@pytest.mark.parametrize(
    ("route", "fields", "limits"),
    [
        ("completions", {"prompt": "x", "max_tokens": 9}, {"max_tokens": 1}),
        ("chat", {"messages": [], "max_tokens": 9}, {"max_tokens": 1, "max_completion_tokens": 1}),
        ("responses", {"input": "x", "max_output_tokens": 9}, {"max_output_tokens": 1}),
        ("messages", {"messages": [], "max_tokens": 9}, {"max_tokens": 1}),
    ],
)
def test_one_token_by_every_name(route: str, fields: dict[str, Any], limits: dict[str, int]) -> None:
    made = one_of(route, **fields, stream=True)
    assert {key: value for key, value in made.items() if key.startswith("max_")} == limits
    assert (made["stream"], made["kv_transfer_params"]) == (False, {"ask": 1})
    assert made.get("min_tokens") == (None if route == "messages" else 1), "Anthropic's API has no such field"


def test_what_shapes_the_prompt_stays_and_what_only_shapes_the_answer_goes() -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,A"}}, {"type": "video_url"}]
    kept: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required", "documents": [{"a": 1}],
        "chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low", "add_generation_prompt": True,
        "mm_processor_kwargs": {"fps": 2}, "temperature": 0.1, "logit_bias": {"5": 1}, "unknown": [1], "priority": 3,
    }  # fmt: skip
    dropped = {
        "response_format": {"type": "json_object"}, "structured_outputs": {"choice": [""]}, "guided_json": {},
        "stop": ["a"], "stop_token_ids": [1], "allowed_token_ids": [2], "stream_options": {}, "best_of": 1,
    }  # fmt: skip
    made = one_of("chat", **kept, **dropped)
    assert {key: made.get(key) for key in kept} == kept
    assert not dropped.keys() & made.keys()


def test_a_decoder_is_not_asked_for_logprobs_of_a_prompt_it_did_not_compute() -> None:
    made = without_prompt_scores(call(prompt_logprobs=1, echo=True, logprobs=2, seed=1))
    assert orjson.loads(made.body) == made.fields == {"model": "m", "prompt": "hello", "logprobs": 2, "seed": 1}


def test_what_a_format_stands_beside_stays() -> None:
    made = one_of("messages", messages=[], output_config={"effort": "low", "format": {"type": "json_schema"}})
    assert made["output_config"] == {"effort": "low"}
    made = one_of("responses", input="x", text={"format": {"type": "json_schema"}, "verbosity": "low"}, store=True)
    assert made["text"] == {"verbosity": "low"} and made["store"] is False
