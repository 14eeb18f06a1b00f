"""Long strings are left out of what is parsed and written, wherever they stand, and are there in what is sent."""

from __future__ import annotations

import json
import time
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.long_body import LONG_BYTES, LONG_STRING_BYTES, MAX_STEPS, Body, LongBody, long_strings
from proxy.openai_api import ApiCall, one_token, one_token_body, parse_call, spliced

LONG = "x" * LONG_BYTES
KV = {"do_remote_decode": True}


def joined(body: Body) -> bytes:
    return body if isinstance(body, bytes) else b"".join(body.pieces)


def image(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}]}]


awkward = st.text(st.sampled_from(list('"\\{}[],: a\n\u00e9\U0001f600')), max_size=12)
texts = awkward | awkward.map(lambda end: LONG + end) | awkward.map(lambda begin: begin + LONG)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(awkward, inner, max_size=3),
    max_leaves=6,
)


def longest(value: Any) -> int:
    """Bytes between the quotes of the longest string in it, as JSON."""
    if isinstance(value, dict):
        return max((max(longest(key), longest(inner)) for key, inner in value.items()), default=0)
    if isinstance(value, list):
        return max(map(longest, value), default=0)
    return len(orjson.dumps(value)) - 2 if isinstance(value, str) else 0


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(awkward, values, max_size=5), st.booleans())
def test_what_is_written_is_what_was_sent(fields: dict[str, Any], spaced: bool) -> None:
    body = json.dumps(fields, indent=1, ensure_ascii=False).encode() if spaced else orjson.dumps(fields)
    found = long_strings(body)
    assert (found is not None) is (longest(fields) >= LONG_STRING_BYTES and len(body) >= LONG_BYTES)
    if found is None:
        return
    assert len(found.outline) < LONG_STRING_BYTES
    outline = orjson.loads(found.outline)
    assert orjson.loads(joined(found.written(outline))) == fields
    assert orjson.loads(joined(found.written({**outline, "b": [False, outline]}))) == {**fields, "b": [False, fields]}


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize("more", [{}, {"stream": True, "max_tokens": 9, "stop": ["\n"]}, {"x": [1, {"y": 2}], "n": 1}])
def test_a_long_body_is_rewritten_as_a_short_one_is(route: str, more: dict[str, Any]) -> None:
    prompt = {"messages": image(LONG)} if route == "chat" else {"prompt": LONG}
    sent = {"model": "m", **prompt, **more}
    call = parse_call(route, orjson.dumps(sent))
    plain = ApiCall(route, b"", sent, call.stream, 1, None, 1)
    assert (call.long is None) is ("n" in more), "fields that few have are looked at whole"
    body = one_token_body(call, KV)
    assert len(body) == len(joined(body)) and isinstance(body, LongBody) is (call.long is not None)
    assert orjson.loads(joined(body)) == one_token(plain, KV)
    assert orjson.loads(joined(spliced(call, {"kv_transfer_params": KV}))) == {**sent, "kv_transfer_params": KV}
    assert orjson.loads(joined(spliced(call, {"model": "other"}))) == {**sent, "model": "other"}
    assert call.fields == sent and call.outline.keys() == sent.keys()


def test_an_image_counts_as_an_image_and_a_text_as_a_text() -> None:
    for content, most in ((image(LONG), 1200), ([{"role": "user", "content": LONG}], 1 << 20)):
        body = orjson.dumps({"messages": content})
        call, short = parse_call("chat", body), parse_call("chat", body.replace(LONG.encode(), b"x"))
        assert call.long is not None and short.num_prompt_tokens - 10 <= call.num_prompt_tokens <= most
    assert call.num_prompt_tokens == len(body) // 4 + 1


def test_of_a_name_that_comes_twice_the_last_counts() -> None:
    call = parse_call("completions", b'{"prompt":"%b","prompt":"2"}' % LONG.encode())
    assert call.fields == {"prompt": "2"} and orjson.loads(joined(one_token_body(call, None)))["prompt"] == "2"


@pytest.mark.parametrize("first", [LONG + "1", "2"])
@pytest.mark.parametrize("last", [LONG, "3"])
@pytest.mark.parametrize(
    "names", [("prompt", "prom\\u0070t"), ("prom\\u0070t", "prompt"), ("\\u0070rompt", "prom\\u0070t")]
)
def test_both_legs_get_one_prompt_however_its_name_is_written(names: tuple[str, str], first: str, last: str) -> None:
    """Or a decoder would keep KV of one prompt under the other's name, and serve it to whoever sends that one."""
    body = f'{{"{names[0]}":"{first}","x":"{LONG}","{names[1]}":"{last}"}}'.encode()
    call = parse_call("completions", body)
    prefill = orjson.loads(joined(one_token_body(call, KV)))
    decode = orjson.loads(joined(spliced(call, {"kv_transfer_params": KV})))
    assert prefill["prompt"] == decode["prompt"] == last


@pytest.mark.parametrize("text", ['\\"' * MAX_STEPS * 2, "\\\\" * MAX_STEPS * 2 + '\\"', 'y","' * MAX_STEPS * 2])
def test_a_body_made_to_be_slow_is_parsed_whole(text: str) -> None:
    body = b'{"prompt":["%b"],"stream":true}' % (text + LONG).encode()
    assert (long_strings(body) is not None) == text.startswith("\\\\")
    call = parse_call("completions", body)
    assert (
        orjson.loads(joined(one_token_body(call, KV)))["prompt"]
        == orjson.loads(body)["prompt"]
        == call.fields["prompt"]
    )


def test_millions_of_backslashes_cost_no_more_than_other_bytes() -> None:
    body = b'{"prompt":"%b"}' % (b"\\" * (8 << 20))
    begun = time.process_time()
    found = long_strings(body)
    assert found is not None and len(found.raw[0]) == 8 << 20
    assert time.process_time() - begun < 0.5
    assert long_strings(body[:-3] + b'"}') is None, "the quote is a part of the string, which has no end"


@pytest.mark.parametrize("body", ['{"prompt":"%s}', '{"prompt":"%s",}', '{"prompt":"%s" "a"}', '"%s"', '["%s"]', "%s"])
def test_what_is_no_json_object_is_refused_whole_as_well(body: str) -> None:
    with pytest.raises(BadRequest, match="JSON"):
        parse_call("completions", (body % LONG).encode())


@pytest.mark.parametrize("text", ["\n", "\\q", "\x00"])
def test_an_engine_is_the_first_to_read_a_long_string(text: str) -> None:
    call = parse_call("completions", b'{"prompt":"%b"}' % (text + LONG).encode())
    assert isinstance(one_token_body(call, None), LongBody)
    with pytest.raises(BadRequest, match="not valid JSON"):
        assert call.fields


def test_a_short_string_is_not_worth_it() -> None:
    others = ["y" * 1000] * (LONG_BYTES // 1000)
    found = long_strings(orjson.dumps({"prompt": ["x" * LONG_STRING_BYTES, *others]}))
    assert found is not None and [bytes(one) for one in found.raw] == [b"x" * LONG_STRING_BYTES]
    assert long_strings(orjson.dumps({"prompt": ["x" * (LONG_STRING_BYTES - 1), *others]})) is None
    assert long_strings(orjson.dumps({"prompt": "x" * (LONG_BYTES - 14)})) is None
