from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.contracts.pull import PullContract
from proxy.openai_api import parse_call

PULL = PullContract()
KV = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]], "baton": {"token": "t"}, "future_key": {"a": None}}


def call(route: str, **fields: Any):  # type: ignore[no-untyped-def]
    return parse_call(route, orjson.dumps(fields))


def test_the_prefill_body_asks_for_one_forced_token() -> None:
    one = call(
        "completions", model="m", prompt="x", stream=True, stream_options={"include_usage": True}, max_tokens=64,
        n=3, best_of=4, temperature=0.5, unknown={"kept": [1]},
    )  # fmt: skip
    assert orjson.loads(PULL.prefill_body(one)) == {
        "model": "m", "prompt": "x", "stream": False, "max_tokens": 1, "min_tokens": 1, "n": 1, "temperature": 0.5,
        "unknown": {"kept": [1]},
        "kv_transfer_params": {
            "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
            "remote_host": None, "remote_port": None,
        },
    }  # fmt: skip
    assert one.fields["max_tokens"] == 64  # the original is untouched


def test_chat_is_limited_by_the_newer_name_as_well() -> None:
    assert orjson.loads(PULL.prefill_body(call("chat", messages=[])))["max_completion_tokens"] == 1
    assert "max_completion_tokens" not in orjson.loads(PULL.prefill_body(call("completions", prompt="x")))


def test_the_decode_body_is_the_original_with_the_kv_verbatim() -> None:
    one = call("completions", prompt="x", max_tokens=64, weird=1.50)
    made = PULL.decode_body(one, KV)
    assert made.startswith(one.body[:-1])
    assert orjson.loads(made) == {**one.fields, "kv_transfer_params": KV}
    assert PULL.decode_body(one, None) == one.body


def test_kv_is_taken_from_the_answer() -> None:
    assert PULL.kv_of(orjson.dumps({"kv_transfer_params": KV})) == KV
    assert PULL.kv_of(b'{"kv_transfer_params":null}') is None
    assert PULL.kv_of(b"{}") is None


@pytest.mark.parametrize("answer", [b"", b"[]", b"<html>", b'{"kv_transfer_params":[1]}'])
def test_an_answer_that_is_not_understood_is_an_error(answer: bytes) -> None:
    with pytest.raises(ValueError, match="prefill answer"):
        PULL.kv_of(answer)


def test_only_ours_is_reclaimed_after_a_dispatch() -> None:
    stock = {"do_remote_prefill": True}
    assert PULL.may_reclaim(stock, dispatched=False) and not PULL.may_reclaim(stock, dispatched=True)
    assert PULL.may_reclaim(KV, dispatched=True)


def test_the_reclaim_body_drops_the_kv_and_generates_nothing_much() -> None:
    made = orjson.loads(PULL.reclaim_body(call("chat", messages=[], stream=True, n=2, max_completion_tokens=9), KV))
    assert made["kv_transfer_params"] == {**KV, "release_only": True}
    assert (made["max_tokens"], made["max_completion_tokens"], made["n"], made["stream"]) == (1, 1, 1, False)


def test_several_prompts_or_choices_are_divided() -> None:
    for fields, whole in (({"prompt": ["a"]}, True), ({"prompt": ["a", "b"]}, False), ({"prompt": "a", "n": 2}, False)):
        one = call("completions", **fields)
        assert PULL.splits(one) and PULL.takes_whole(one) is whole


def test_what_would_read_one_kv_several_times_is_not_taken() -> None:
    assert not PULL.takes_whole(call("completions", prompt="a", best_of=3))
    assert not PULL.takes_whole(call("chat", messages=[], use_beam_search=True))


def test_nothing_is_handed_over_where_nothing_is_generated() -> None:
    assert not PULL.splits(call("completions", prompt="a", echo=True, max_tokens=0))
