from __future__ import annotations

from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.joining import EventSplitter, StreamJoiner, child_bodies, joined_answer, joined_name, joined_usage
from proxy.openai_api import parse_call


def bodies_of(route: str = "completions", **fields: Any) -> list[dict[str, Any]]:
    return [orjson.loads(body) for body in child_bodies(parse_call(route, orjson.dumps(fields)))]


def test_prompts_come_before_choices() -> None:
    made = bodies_of(prompt=["a", "b"], n=2, seed=7, x=[1], stream=True)
    assert made == [
        {"prompt": prompt, "n": 1, "seed": seed, "x": [1], "stream": True} for prompt in ("a", "b") for seed in (7, 8)
    ]


@pytest.mark.parametrize("prompts", [[[1, 2], [3]], ["a", "b"]])
def test_prompts_keep_their_form(prompts: list[Any]) -> None:
    assert [one["prompt"] for one in bodies_of(prompt=prompts)] == prompts
    assert "n" not in bodies_of(prompt=prompts)[0] and "seed" not in bodies_of(prompt=prompts)[0]


def test_choices_of_one_prompt_keep_it_as_it_is() -> None:
    assert [one["prompt"] for one in bodies_of(prompt=["a"], n=2)] == [["a"], ["a"]]
    assert [one["prompt"] for one in bodies_of(prompt=[1, 2], n="2")] == [[1, 2], [1, 2]]
    assert len(bodies_of("chat", messages=[{"role": "user"}], n=3)) == 3


def test_embeddings_are_divided_like_prompts() -> None:
    assert bodies_of(prompt_embeds=["A", "B"]) == [{"prompt_embeds": "A"}, {"prompt_embeds": "B"}]


@pytest.mark.parametrize(
    ("name", "joined"),
    [("cmpl-r-1-c0", "cmpl-r-1"), ("chatcmpl-r-1-c0-2", "chatcmpl-r-1"), ("r-1-c0", "r-1"), ("own", "own")],
)
def test_the_name_is_the_engines_way_of_naming(name: str, joined: str) -> None:
    assert joined_name(name, "r-1-c0", "r-1") == joined


def usage(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
    }  # fmt: skip
    return made | {"prompt_tokens_details": None if cached is None else {"cached_tokens": cached}}


def answer(index: int, **more: Any) -> bytes:
    return orjson.dumps(
        {
            "id": f"cmpl-r-c{index}", "created": 100 + index, "model": "m", "kv_transfer_params": {"x": 1},
            "choices": [{"index": 0, "text": f"t{index}"}], "usage": usage(10 + index // 2, 3, index // 2), **more,
        }
    )  # fmt: skip


def test_whole_answers_are_one() -> None:
    joined = orjson.loads(joined_answer([answer(index) for index in range(4)], 2, "r-c0", "r"))
    assert joined == {
        "id": "cmpl-r", "created": 100, "model": "m", "kv_transfer_params": None,
        "choices": [{"index": index, "text": f"t{index}"} for index in range(4)],
        "usage": usage(10 + 11, 12, 0 + 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    "broken", [b"", b"[]", b"{}", b'{"choices":[]}', b'{"choices":[1]}', b'{"choices":[{},{}]}', b'{"choices":']
)
def test_what_is_no_answer_is_an_error(broken: bytes) -> None:
    with pytest.raises(ValueError, match="an answer"):
        joined_answer([answer(0), broken], 1, "r-c0", "r")


def test_usage_details_are_added_where_they_are() -> None:
    assert joined_usage([usage(1, 2), usage(3, 4, 5)], 1) == usage(4, 6, 5)
    assert joined_usage([usage(1, 2), usage(3, 4)], 1) == usage(4, 6)
    assert joined_usage([usage(1, 2), None], 1) is None
    thought = {"completion_tokens_details": {"reasoning_tokens": 2}}
    assert joined_usage([usage(1, 2) | thought] * 2, 2) == usage(1, 4) | {
        "completion_tokens_details": {"reasoning_tokens": 4}
    }


def event(index: int, choices: list[dict[str, Any]], **more: Any) -> bytes:
    return b"data: " + orjson.dumps({"id": f"chatcmpl-r-c{index}", "created": 100 + index, "choices": choices, **more})


def test_events_get_the_requests_name_and_their_index() -> None:
    joiner = StreamJoiner(["r-c0", "r-c1"], 2, "r")
    for index in (1, 0, 1):
        made = joiner.event(index, event(index, [{"index": 0, "delta": {"content": "x"}}], usage=usage(1, 1)))
        assert made.endswith(b"\n\n") and orjson.loads(made[5:]) == {
            "id": "chatcmpl-r", "created": 101, "choices": [{"index": index, "delta": {"content": "x"}}],
            "usage": usage(1, 1),
        }  # fmt: skip


@pytest.mark.parametrize("silent", [b"data: [DONE]", b": ping", b"data:[DONE]"])
def test_what_ends_a_child_or_keeps_it_alive_is_not_passed_on(silent: bytes) -> None:
    assert StreamJoiner(["a"], 1, "r").event(0, silent) == b""


@pytest.mark.parametrize("odd", [b"data: nonsense", b'data: {"object":"x"}', b"data: [1]"])
def test_what_is_not_understood_is_passed_on(odd: bytes) -> None:
    assert StreamJoiner(["a"], 1, "r").event(0, odd) == odd + b"\n\n"


def test_the_usage_comes_once_and_last() -> None:
    joiner = StreamJoiner(["r-c0", "r-c1"], 2, "r")
    assert joiner.end() == b"data: [DONE]\n\n"
    for index in (1, 0):
        assert joiner.event(index, event(index, [], usage=usage(5, 2, 1))) == b""
    last, done = joiner.end().split(b"\n\n")[:2]
    assert orjson.loads(last[5:])["usage"] == usage(5, 4, 1) and done == b"data: [DONE]"


@given(st.lists(st.integers(0, 60), max_size=8), st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"]))
def test_events_are_found_however_they_are_cut(cuts: list[int], end: bytes) -> None:
    stream = end.join([b"data: a", b": c", b"data: b\ndata: c", b""])
    places = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    splitter = EventSplitter()
    found = [one for start, stop in pairwise(places) for one in splitter.feed(stream[start:stop])]
    assert found == [b"data: a", b": c", b"data: b\ndata: c"]
