"""Long members are found where they stand, whatever surrounds them, and a rewritten body says what was asked for."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.long_body import LONG_BYTES, LONG_MEMBER_BYTES, MAX_STEPS, Body, LongBody, long_members, rewritten
from proxy.openai_api import one_token, one_token_body, parse_call, spliced

LONG = "x" * LONG_BYTES
KV = {"do_remote_decode": True}


def joined(body: Body) -> bytes:
    return body if isinstance(body, bytes) else b"".join(body.pieces)


def image(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}]}]


awkward = st.text(st.sampled_from(list('"\\{}[],: a\n\u00e9\U0001f600')), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | awkward,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(awkward, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(awkward, values, max_size=5), awkward, st.integers(0, 5), st.booleans())
def test_long_members_are_found_among_anything(others: dict[str, Any], name: str, at: int, spaced: bool) -> None:
    long = [LONG + '"\\', {"a": LONG}]
    items = [(key, value) for key, value in others.items() if key != name]
    items.insert(min(at, len(items)), (name, long))
    fields = dict(items)
    body = json.dumps(fields, indent=1).encode() if spaced else orjson.dumps(fields)
    found = long_members(body)
    plain = not set(name) & set('"\\\n') and (not spaced or name.isascii())
    assert set(found) == ({name} if plain else set())
    if plain:
        assert orjson.loads(found[name]) == long
    parsed = orjson.loads(body)
    asked = {**parsed, "stream": False}
    assert orjson.loads(joined(rewritten(body, parsed, asked))) == asked


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize("more", [{}, {"stream": True, "max_tokens": 9, "n": 1, "stop": ["\n"]}, {"x": [1, {"y": 2}]}])
def test_a_long_body_is_rewritten_as_a_short_one_is(route: str, more: dict[str, Any]) -> None:
    prompt = {"messages": image(LONG)} if route == "chat" else {"prompt": LONG}
    call = parse_call(route, orjson.dumps({"model": "m", **prompt, **more}))
    body = one_token_body(call, KV)
    assert isinstance(body, LongBody) and len(body) == len(joined(body))
    assert orjson.loads(joined(body)) == one_token(call, KV)
    shorter = spliced(call.body, call.fields, "kv_transfer_params", KV)
    assert orjson.loads(joined(shorter)) == {**call.fields, "kv_transfer_params": KV}


def test_what_was_changed_is_not_taken_from_the_clients_bytes() -> None:
    body = orjson.dumps({"prompt": LONG, "suffix": LONG})
    fields = orjson.loads(body)
    asked = {**fields, "prompt": "another"}
    assert orjson.loads(joined(rewritten(body, fields, asked))) == asked


def test_of_a_name_that_comes_twice_the_last_counts() -> None:
    longer, shorter = LONG + "1", "2"
    body = b'{"prompt":"%b","prompt":"%b"}' % (longer.encode(), LONG.encode())
    assert bytes(long_members(body)["prompt"]) == b'"%b"' % LONG.encode()
    assert not long_members(b'{"prompt":"%b","prompt":"%b"}' % (longer.encode(), shorter.encode()))


@pytest.mark.parametrize("text", ['\\"' * MAX_STEPS * 2, "\\\\" * MAX_STEPS * 2 + '\\"', 'y","' * MAX_STEPS * 2])
def test_a_body_made_to_be_slow_is_written_anew(text: str) -> None:
    body = b'{"prompt":["%b"],"stream":true}' % (text + LONG).encode()
    fields = orjson.loads(body)
    asked = {**fields, "stream": False}
    assert bool(long_members(body)) == text.startswith("\\\\")
    assert orjson.loads(joined(rewritten(body, fields, asked))) == asked


def test_a_short_member_is_not_worth_it() -> None:
    body = orjson.dumps({"prompt": "x" * (LONG_MEMBER_BYTES - 2)})
    assert bytes(long_members(body)["prompt"]) == body[10:-1]
    assert not long_members(orjson.dumps({"prompt": "x" * (LONG_MEMBER_BYTES - 3)}))
