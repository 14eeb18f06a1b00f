from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.continuation import Continuation, Delivered, NotExact, delivered_in, delivered_whole, is_recomputed
from proxy.openai_api import ApiCall, parse_call
from proxy.prompt_facts import prompt_tokens_of

CHAT = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
COMPLETION = {"prompt": "p"}


def call_of(route: str, **fields: Any) -> ApiCall:
    return parse_call(route, orjson.dumps({**(CHAT if route == "chat" else COMPLETION), "stream": True, **fields}))


def stream(*choices: dict[str, Any], **more: Any) -> bytes:
    events = [{"id": "a", "created": 1, "model": "m", "choices": [{"index": 0, **one}], **more} for one in choices]
    return b"".join(b"data: " + orjson.dumps(one) + b"\n\n" for one in events)


def said(*texts: str, **more: Any) -> Delivered:
    return delivered_in(stream(*({"text": text, "finish_reason": None} for text in texts), **more))


def test_text_is_read_from_every_shape() -> None:
    role = {"delta": {"role": "assistant", "content": ""}}
    found = delivered_in(b": hello\n\n" + stream(role, {"delta": {"content": "a"}}, {"delta": {"content": "é"}}))
    assert (found.text, found.num_tokens, found.finish_reason, found.done) == ("aé", 2, None, False)
    found = delivered_in(stream({"text": "a"}, {"text": "", "finish_reason": "length"}) + b"data: [DONE]\n\n")
    assert (found.text, found.finish_reason, found.done) == ("a", "length", True)
    assert delivered_in(b"").num_tokens == 0


def test_the_engines_own_count_is_taken() -> None:
    """With continuous usage, an event that carries several tokens is told from one that carries one."""
    found = said("a", "b", usage={"completion_tokens": 7})
    assert (found.num_tokens, found.is_counted) == (7, True)
    assert not said("a").is_counted


@pytest.mark.parametrize(("choice", "reason"), [
    ({"index": 1, "text": "a"}, "several_choices"),
    ({"text": "a", "logprobs": {"tokens": ["a"]}}, "logprobs"),
    ({"delta": {"tool_calls": [{"index": 0}]}}, "tool_call"),
    ({"delta": {"reasoning_content": "hm"}}, "reasoning"),
])  # fmt: skip
def test_what_is_more_than_text_is_not_continued(choice: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotExact, match=reason):
        delivered_in(stream(choice))


@pytest.mark.parametrize(("route", "fields", "reason"), [
    ("chat", {"n": 2}, "several_choices"), ("completions", {"best_of": 2}, "several_choices"),
    ("completions", {"prompt": ["a", "b"]}, "several_choices"), ("chat", {"logprobs": True}, "logprobs"),
    ("completions", {"logprobs": 0}, "logprobs"), ("completions", {"prompt_logprobs": 0}, "logprobs"),
    ("chat", {"response_format": {"type": "json_schema"}}, "guided_decoding"),
    ("chat", {"structured_outputs": {"regex": "a"}}, "guided_decoding"),
    ("chat", {"tools": [{}], "tool_choice": "required"}, "guided_decoding"),
    ("chat", {"presence_penalty": 0.1}, "presence_penalty"), ("completions", {"echo": True}, "echo"),
    ("chat", {"add_generation_prompt": False}, "no_generation_prompt"),
    ("completions", {"prompt": [1, 2]}, "no_token_ids"), ("completions", {"max_tokens": 2}, "nothing_left"),
    ("chat", {"max_completion_tokens": 2, "max_tokens": 9}, "nothing_left"),
    ("chat", {"kv_transfer_params": {"a": 1}}, "own_kv_transfer_params"),
    ("completions", {"stop": ["xyz", "b!"]}, "stop_string"),
])  # fmt: skip
def test_requests_that_are_not_continued(route: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotExact, match=reason):
        Continuation(call_of(route, **fields), said("a", "b"), 3)


@pytest.mark.parametrize("fields", [
    {"n": 1}, {"best_of": 1}, {"logprobs": False}, {"response_format": {"type": "text"}}, {"presence_penalty": 0},
    {"stop": ["xyz"]}, {"stop": "b"}, {"stop": None}, {"temperature": 1.5, "seed": 3},
    {"tools": [{}], "logprobs": None},
])  # fmt: skip
def test_requests_that_are_continued(fields: dict[str, Any]) -> None:
    for route in ("chat", "completions"):
        rest = Continuation(call_of(route, max_tokens=5, **fields), said("a", "b"), 3).call
        assert rest.fields["max_tokens"] == 3 and orjson.loads(rest.body) == rest.fields and rest.stream


def test_half_a_character_is_not_put_into_a_prompt() -> None:
    with pytest.raises(NotExact, match="half_a_character"):
        Continuation(call_of("chat"), said("a\ufffd"), 3)


def test_limits() -> None:
    def limits(route: str, **fields: Any) -> dict[str, Any]:
        made = Continuation(call_of(route, **fields), said("a", "b"), 3).call
        return {
            key: made.fields[key] for key in ("max_tokens", "max_completion_tokens", "min_tokens") if key in made.fields
        }

    assert limits("completions") == {"max_tokens": 14}
    assert limits("completions", max_tokens=None) == {"max_tokens": None}
    assert limits("chat") == {}
    both = {"max_tokens": 30, "max_completion_tokens": 9, "min_tokens": 8}
    assert limits("chat", **both) == {"max_tokens": 28, "max_completion_tokens": 7, "min_tokens": 6}
    assert limits("chat", min_tokens=1) == {"min_tokens": 0}


def test_the_prefillers_count_corrects_that_of_events() -> None:
    rest = Continuation(call_of("completions", max_tokens=10), said("a b", "c d"), 3)
    rest.recount(4)
    assert (rest.num_tokens, rest.call.fields["max_tokens"]) == (4, 6)
    rest.recount(1)  # the text has fewer tokens than it was generated with
    assert rest.num_tokens == 4
    with pytest.raises(NotExact, match="nothing_left"):
        rest.recount(10)
    counted = Continuation(call_of("completions", max_tokens=10), said("a", usage={"completion_tokens": 2}), 3)
    counted.recount(5)
    assert counted.num_tokens == 2


def test_a_chat_that_continued_a_message_already_goes_on_in_it() -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "so ", "name": "x"}]
    call = call_of("chat", messages=messages, continue_final_message=True, add_generation_prompt=False)
    rest = Continuation(call, said("a"), 3).call
    assert rest.fields["messages"][-1] == {"role": "assistant", "content": "so a", "name": "x"}
    assert len(rest.fields["messages"]) == 3 and call.fields["messages"] == messages


def with_ids(*parts: tuple[str, list[int]]) -> Delivered:
    first = {"prompt_token_ids": [7, 8]}
    choices = [{"text": text, "token_ids": ids, **(first if not k else {})} for k, (text, ids) in enumerate(parts)]
    return delivered_in(stream(*choices))


def test_token_ids_are_the_prompt_where_there_are_any() -> None:
    rest = Continuation(call_of("completions", max_tokens=9), with_ids(("a", [1]), ("b", [2, 3])), 2)
    assert (rest.call.fields["prompt"], rest.call.fields["max_tokens"]) == ([7, 8, 1, 2, 3], 6)
    with pytest.raises(NotExact, match="stop_string"):
        Continuation(call_of("completions", stop="x"), with_ids(("a", [1])), 2)


def test_ids_whose_text_was_withheld_are_generated_again_and_not_told_twice() -> None:
    delivered = with_ids(("a", [1]), ("", [2]), ("", [3]))
    with pytest.raises(NotExact, match="half_a_character"):
        Continuation(call_of("completions", max_tokens=9), delivered, 2)
    rest = Continuation(call_of("completions", max_tokens=9, temperature=0), delivered, 2)
    assert (rest.call.fields["prompt"], rest.call.fields["max_tokens"]) == ([7, 8, 1], 8)
    events = [{"choices": [{"index": 0, "text": text, "token_ids": ids}]} for text, ids in
              (("", [2]), ("é", [3, 4]), ("b", [5]))]  # fmt: skip
    told = [rest.edited(event) for event in events]
    assert told[0] is None
    assert [one["choices"][0]["token_ids"] for one in told[1:] if one] == [[4], [5]]


def test_the_rest_is_the_same_answer() -> None:
    rest = Continuation(call_of("chat", max_tokens=9), said("a", "b"), 5)
    assert rest.edited({"id": "z", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}) is None
    told = rest.edited(
        {"id": "z", "created": 9, "choices": [{"index": 0, "delta": {"role": "assistant", "content": "c"}}]}
    )
    assert told == {"id": "a", "created": 1, "choices": [{"index": 0, "delta": {"content": "c"}}]}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    told = rest.edited({"id": "z", "choices": [], "usage": usage})
    assert told is not None
    assert told["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    end = {"id": "z", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    assert rest.edited(end) is not None


def test_nothing_was_said_yet_so_all_is_asked_for() -> None:
    call = call_of("chat", max_tokens=9)
    role = {"delta": {"role": "assistant", "content": ""}}
    assert Continuation(call, delivered_in(stream(role)), None).call is call


def test_a_whole_answer_is_joined() -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "ab"}, "finish_reason": "stop"}
    first = {"id": "a", "created": 1, "choices": [{**choice, "stop_reason": "recomputed"}]}
    first["usage"] = {"prompt_tokens": 5, "completion_tokens": 4}
    assert is_recomputed(first)
    rest = Continuation(call_of("chat", max_tokens=9), delivered_whole(first), None)
    assert rest.call.fields["max_tokens"] == 5
    last = {"id": "z", "choices": [{"index": 0, "message": {"content": "cd"}, "finish_reason": "length"}]}
    last["usage"] = {"prompt_tokens": 9, "completion_tokens": 5}
    joined = rest.joined(last)
    assert joined["id"] == "a" and joined["choices"][0]["message"]["content"] == "abcd"
    assert joined["usage"] == {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}


def test_what_the_prefiller_counted() -> None:
    usage = {"prompt_tokens": 12, "prompt_tokens_details": {"cached_tokens": 8}, "completion_tokens": 1}
    answer = {"choices": [{"text": '"usage":{"prompt_tokens":1}'}], "usage": usage}
    assert prompt_tokens_of(orjson.dumps(answer)) == 12
    assert prompt_tokens_of(orjson.dumps({**answer, "usage": {"prompt_tokens": 3}})) == 3
    assert prompt_tokens_of(b'{"usage": {"prompt_tokens": 4, "prompt_tokens_details": null}}') == 4
    assert prompt_tokens_of(b"{}") is None


def test_a_chat_whose_token_ids_are_known_goes_on_as_a_completion() -> None:
    role = {"delta": {"role": "assistant", "content": ""}}
    first = stream(role, prompt_token_ids=[7, 8], object="chat.completion.chunk")
    delivered = delivered_in(first + stream({"delta": {"content": "a"}, "token_ids": [1]}))
    rest = Continuation(call_of("chat", max_completion_tokens=9, max_tokens=30, temperature=0), delivered, 2)
    fields = {"stream": True, "temperature": 0, "prompt": [7, 8, 1], "max_tokens": 8}
    assert (rest.call.route, rest.call.fields) == ("completions", fields)
    event = {"object": "text_completion", "choices": [{"index": 0, "text": "b", "token_ids": [2]}]}
    choice = {"index": 0, "delta": {"content": "b"}, "token_ids": [2]}
    assert rest.edited(event) == {"object": "chat.completion.chunk", "choices": [choice]}
    unlimited = Continuation(call_of("chat"), delivered, 2).call.fields
    assert unlimited["max_tokens"] is None, "a completion would end after 16"
    with_tools = Continuation(call_of("chat", tools=[{}]), delivered, 2)
    assert with_tools.call.fields["messages"][-1]["content"] == "a", "a tool parser belongs to the chat route"
    seen = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]
    with_image = Continuation(call_of("chat", messages=seen), delivered, 2).call
    assert (with_image.route, with_image.fields["messages"][:1]) == ("chat", seen), "a completion would lose the image"


def test_a_whole_chat_is_joined_with_a_completion() -> None:
    message = {"role": "assistant", "content": "ab", "refusal": None}
    first = {"id": "a", "object": "chat.completion", "prompt_token_ids": [7], "usage": {"completion_tokens": 2}}
    first["choices"] = [{"index": 0, "message": message, "token_ids": [1, 2], "stop_reason": "recomputed"}]
    rest = Continuation(call_of("chat", max_tokens=9), delivered_whole(first), 1)
    last = {"id": "z", "object": "text_completion", "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    last["choices"] = [{"index": 0, "text": "c", "token_ids": [3], "prompt_token_ids": [7, 1, 2]}]
    joined = rest.joined(last)
    assert joined["choices"] == [{"index": 0, "message": {**message, "content": "abc"}, "token_ids": [1, 2, 3]}]
    assert (joined["object"], joined["prompt_token_ids"]) == ("chat.completion", [7])
    assert joined["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
