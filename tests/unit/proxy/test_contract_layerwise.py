from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.contracts.layerwise import LayerwiseContract
from proxy.openai_api import ApiCall, parse_call

LAYERWISE = LayerwiseContract()
URL = "http://proxy:8000/v1/metaserver"


def call(route: str, **fields: Any) -> ApiCall:
    return parse_call(route, orjson.dumps(fields))


def posted(name: str) -> dict[str, Any]:
    return {"request_id": name, "do_remote_decode": True, "remote_block_ids": [1], "future ☃": {"a": None}}


@pytest.mark.parametrize(
    ("route", "fields", "ids"),
    [
        ("chat", {"messages": []}, ("chatcmpl-R",)),
        ("completions", {"prompt": "x"}, ("cmpl-R-0",)),
        ("completions", {"prompt": [1, 2, 3]}, ("cmpl-R-0",)),
        ("completions", {"prompt": ["a", "b"]}, ("cmpl-R-0", "cmpl-R-1")),
        ("completions", {"prompt": [[1], [2], [3]]}, ("cmpl-R-0", "cmpl-R-1", "cmpl-R-2")),
    ],
)
def test_the_ids_are_those_vllm_derives(route: str, fields: dict[str, Any], ids: tuple[str, ...]) -> None:
    assert LAYERWISE.child_ids(call(route, **fields), "R") == ids


def test_the_decoder_gets_the_original_and_where_to_call() -> None:
    one = call("completions", prompt="x", max_tokens=9, odd=1.50)
    made = LAYERWISE.ask_body(one, URL)
    assert made.startswith(one.body[:-1])
    params = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": URL}
    assert orjson.loads(made) == {**one.fields, "kv_transfer_params": params}


def test_of_a_list_the_decoder_is_told_that_it_is_one() -> None:
    made = orjson.loads(LAYERWISE.ask_body(call("completions", prompt=["a", "b"], max_tokens=9), URL))
    assert made["kv_transfer_params"]["num_children"] == 2


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (b'{"kv_transfer_params":{"baton":{"version":1,"push_failed":"no sidecar"}}}', "no sidecar"),
        (b'{"kv_transfer_params":null}', ""),
        (b'{"push_failed":"says the client"}', ""),
        (b'{"kv_transfer_params":["push_failed"]}', ""),
        (b'{"push_failed"', ""),
        (orjson.dumps({"choices": [{"text": '"push_failed"'}]}), ""),
    ],
)
def test_what_a_prefiller_says_of_its_push(answer: bytes, fault: str) -> None:
    assert LAYERWISE.push_fault(answer) == fault


def test_the_prefiller_gets_what_was_posted_verbatim() -> None:
    one = call("chat", messages=[], max_tokens=9, stream=True, stream_options={"include_usage": True}, x=1)
    params = posted("chatcmpl-R")
    assert orjson.loads(LAYERWISE.push_body(one, {"chatcmpl-R": params})) == {
        "messages": [], "x": 1, "max_tokens": 1, "min_tokens": 1, "max_completion_tokens": 1, "stream": False,
        "kv_transfer_params": params,
    }  # fmt: skip


def test_several_children_are_joined_in_one_map() -> None:
    one = call("completions", prompt=["a", "b"])
    both = {name: posted(name) for name in ("cmpl-R-0", "cmpl-R-1")}
    made = orjson.loads(LAYERWISE.push_body(one, both))
    assert made["kv_transfer_params"] == {**both["cmpl-R-0"], "batch_kv_transfer_params": both}
    assert made["prompt"] == ["a", "b"]


def test_what_has_other_ids_is_not_split() -> None:
    assert LAYERWISE.splits(call("completions", prompt=["a", "b"]))
    assert not LAYERWISE.takes_whole(call("completions", prompt="a", n=2))
