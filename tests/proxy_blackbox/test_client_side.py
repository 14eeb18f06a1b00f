"""The client's answer is what one unsplit engine gives: the prompt's logprobs, its echo, cached tokens, its errors."""

from __future__ import annotations

from typing import Any

import pytest

from tests.proxy_blackbox.harness import CHAT, COMPLETIONS, Engines, Proxy, body_of, request, text_for

LIMITS = "This model's maximum context length is 10 tokens. However, you requested {} output tokens"


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (COMPLETIONS, {"echo": True, "logprobs": 2}),
        (COMPLETIONS, {"echo": True, "logprobs": 0, "prompt_logprobs": 1}),
        (COMPLETIONS, {"prompt_logprobs": 0}),
        (COMPLETIONS, {"echo": True}),
        (COMPLETIONS, {"logprobs": 3}),
        (COMPLETIONS, {"prompt": [5, 6, 7], "echo": True, "logprobs": 1}),
        (COMPLETIONS, {"prompt": ["a list of one"], "echo": True, "logprobs": 1}),
        (CHAT, {"prompt_logprobs": 1}),
    ],
)
def test_what_is_said_of_the_prompt(proxy: Proxy, engines: Engines, path: str, more: dict[str, Any]) -> None:
    fields = {**body_of(path), **more}
    expected = request(engines.decode[0], "POST", path, fields, X_Request_Id="r-1")
    answer = proxy.post(path, fields, X_Request_Id="r-1")
    assert (answer.status, answer.json) == (200, expected.json)
    assert engines.count("prefill", "prefills") == 1


def test_a_stream_with_logprobs_of_the_prompt_is_one_engines(proxy: Proxy, engines: Engines) -> None:
    fields = body_of(COMPLETIONS, stream=True, echo=True, logprobs=1)
    assert proxy.post(COMPLETIONS, fields).status == 200
    assert engines.count("prefill", "requests") == 0
    (seen,) = engines.requests("decode")
    assert seen["body"] == fields


def test_only_the_prompt_is_asked_of_a_decoder_as_it_is(proxy: Proxy, engines: Engines) -> None:
    fields = {"model": "mock", "prompt": "a b", "echo": True, "max_tokens": 0, "logprobs": 1}
    assert proxy.post(COMPLETIONS, fields).status == 200
    assert engines.count("prefill", "requests") == 0 and engines.requests("decode")[0]["body"] == fields


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("flavour", ["baton", "nixl"])
@pytest.mark.parametrize(("prefiller", "decoder"), [(7, 0), (0, 9), (12, 123), (3, 3)])
def test_cached_tokens_are_the_prefillers(
    proxy: Proxy, engines: Engines, flavour: str, path: str, prefiller: int, decoder: int
) -> None:
    """Whether they are said beside the KV or in the prefiller's usage alone."""
    engines.configure(flavour=flavour)
    fields = body_of(path, mock={"cached_tokens": prefiller, "decoder_cached_tokens": decoder})
    answer = proxy.post(path, fields)
    assert answer.json["usage"]["prompt_tokens_details"] == {"cached_tokens": prefiller}
    assert answer.text == text_for(fields) and int(answer.headers["content-length"]) == len(answer.body)


def test_cached_tokens_of_children_are_counted_once_a_prompt(proxy: Proxy) -> None:
    fields = {"model": "mock", "prompt": ["a", "b"], "n": 2, "mock": {"cached_tokens": 5, "decoder_cached_tokens": 1}}
    usage = proxy.post(COMPLETIONS, {**fields, "max_tokens": 2}).json["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 10}
    assert usage["completion_tokens"] == 8 and usage["total_tokens"] == usage["prompt_tokens"] + 8


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_about_limits_speaks_of_the_clients_own(
    proxy: Proxy, engines: Engines, status: int, stream: bool
) -> None:
    """The prefiller was asked for one token, and says so: the decoder is asked what the client asked."""
    engines.fault("prefill", "status", status=status, message=LIMITS.format(1))
    engines.fault("decode", "status", status=status, message=LIMITS.format(99))
    answer = proxy.post(CHAT, body_of(CHAT, num_tokens=99, stream=stream))
    assert answer.status == status and answer.error["message"] == LIMITS.format(99)
    (seen,) = engines.requests("decode")
    assert seen["body"]["max_tokens"] == 99 and "kv_transfer_params" not in seen["body"]


def test_an_error_about_limits_of_a_child_is_its_own_too(proxy: Proxy, engines: Engines) -> None:
    engines.fault("prefill", "status", status=400, message=LIMITS.format(1), shared=True)
    engines.fault("decode", "status", status=400, message=LIMITS.format(99), shared=True)
    answer = proxy.post(COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 99, "mock": {"interval_s": 0.05}})
    assert answer.status == 400 and answer.error["message"] == LIMITS.format(99)


@pytest.mark.parametrize(
    ("odd", "usual"),
    [
        ({"max_tokens": "5"}, {"max_tokens": 5}),
        ({"max_tokens": 5.0}, {"max_tokens": 5}),
        ({"stream": 0}, {}),
        ({"stream": "no"}, {}),
        ({"n": 1.0}, {}),
        ({"n": None}, {}),
    ],
)
def test_what_vllm_takes_is_taken(proxy: Proxy, engines: Engines, odd: dict[str, Any], usual: dict[str, Any]) -> None:
    fields = {"model": "mock", "prompt": "lenient", "max_tokens": 3, **odd}
    answer = proxy.post(COMPLETIONS, fields)
    assert (answer.status, answer.text) == (200, text_for({**fields, **usual}))
    sent = dict(engines.requests("decode")[0]["body"])
    assert sent.pop("kv_transfer_params") and sent == fields  # in the client's own words
    assert engines.count("prefill", "prefills") == 1


def test_choices_in_words_are_counted(proxy: Proxy) -> None:
    answer = proxy.post(COMPLETIONS, {"model": "mock", "prompt": "a", "max_tokens": 2, "n": "3"})
    assert [choice["index"] for choice in answer.json["choices"]] == [0, 1, 2]


@pytest.mark.parametrize("word", [1, "yes", "True", 1.0])
def test_a_stream_by_another_word_is_a_stream(proxy: Proxy, word: Any) -> None:
    fields = body_of(COMPLETIONS)
    answer = proxy.post(COMPLETIONS, {**fields, "stream": word})
    assert answer.events[-1] == "[DONE]" and answer.text == text_for(fields)


def test_pictures_tools_and_reasoning_go_to_both_legs_and_grammars_to_the_decoder(
    proxy: Proxy, engines: Engines
) -> None:
    content = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
               {"type": "video_url", "video_url": {"url": "http://v/v.mp4"}}]  # fmt: skip
    both: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}], "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto", "reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": True},
        "parallel_tool_calls": False, "include_reasoning": True, "documents": [{"text": "d"}],
    }  # fmt: skip
    decode_only = {"response_format": {"type": "json_schema"}, "structured_outputs": {"regex": "a"}, "stop": ["z"]}
    fields = {"model": "mock", "max_tokens": 3, **both, **decode_only}
    assert proxy.post(CHAT, fields).text == text_for(fields)
    (prefill,), (decode,) = engines.requests("prefill"), engines.requests("decode")
    assert {key: prefill["body"].get(key) for key in both} == both
    assert not decode_only.keys() & prefill["body"].keys()
    assert {key: decode["body"][key] for key in fields} == fields
