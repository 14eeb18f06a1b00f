"""A decoder lost in the middle of a stream, or one that gave up the KV: the client gets one answer all the same."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from bench.mock_answers import script_of
from tests.proxy_blackbox.harness import CHAT, COMPLETIONS, Answer, Engines, Proxy, body_of, settled, text_for

PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
LOSSES = ["reset_mid", "close_mid", "hang_mid", "error_event_mid", "recomputed"]


@pytest.fixture(scope="module")
def _impatient(fleet: Engines) -> Iterator[Proxy]:
    started = Proxy(fleet, "--between-tokens-timeout-s", "1", "--health-retry-interval-s", "0.1")
    yield started
    started.stop()


@pytest.fixture
def impatient(_impatient: Proxy, engines: Engines) -> Iterator[Proxy]:
    yield _impatient
    settled(_impatient, engines)


def assert_undisturbed(answer: Answer, fields: dict[str, Any], num_prompt_tokens: int | None = None) -> None:
    """As from one decoder: the text, one id, one role chunk, one finish reason, the usage, and the end."""
    assert (answer.status, answer.text) == (200, text_for(fields)), answer.body
    *events, last = answer.events
    assert last == "[DONE]"
    assert len({(event["id"], event["created"], event["model"], event["object"]) for event in events}) == 1
    choices = [choice for event in events for choice in event["choices"]]
    assert sum("role" in choice.get("delta", {}) for choice in choices) == ("messages" in fields)
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    if (fields.get("stream_options") or {}).get("include_usage"):
        script = script_of(fields)
        usage = events[-1]["usage"]
        assert usage["prompt_tokens"] == script.num_prompt_tokens
        assert usage["completion_tokens"] == script.num_tokens
        assert usage["total_tokens"] == script.num_prompt_tokens + script.num_tokens
    if fields.get("return_token_ids"):
        script = script_of(fields)
        ids = [one for choice in choices for one in choice.get("token_ids") or ()]
        assert ids == [script.token_id(index) for index in range(script.num_tokens)]
        assert sum(bool(choice.get("prompt_token_ids")) for choice in choices) == 1


def test_the_same_is_asserted_of_an_undisturbed_stream(proxy: Proxy) -> None:
    for path in (CHAT, COMPLETIONS):
        fields = body_of(path, num_tokens=7, stream=True, stream_options={"include_usage": True}, return_token_ids=True)
        assert_undisturbed(proxy.post(path, fields), fields)


@PATHS
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("more", [{}, {"stream_options": {"include_usage": True}}, {"return_token_ids": True}])
def test_the_client_of_a_stream_does_not_notice(
    impatient: Proxy, engines: Engines, kind: str, path: str, more: dict[str, Any]
) -> None:
    engines.fault("decode", kind, shared=True, after=4)
    fields = body_of(path, num_tokens=9, stream=True, **more)
    assert_undisturbed(impatient.post(path, fields), fields)
    assert engines.count("prefill", "prefills") == 2
    first, second = engines.requests("decode")
    if second["body"]["max_tokens"] == 9:
        first, second = second, first
    assert second["body"]["max_tokens"] == 5
    assert first["headers"]["x-request-id"] != second["headers"]["x-request-id"]


@PATHS
@pytest.mark.parametrize("limits", [
    {"max_tokens": 9}, {"max_tokens": 30, "max_completion_tokens": 9}, {"max_completion_tokens": 9, "min_tokens": 7},
])  # fmt: skip
@pytest.mark.parametrize("stream", [True, False])
def test_both_limits_hold_over_all_parts(
    impatient: Proxy, engines: Engines, path: str, limits: dict[str, int], stream: bool
) -> None:
    engines.fault("decode", "recomputed", shared=True, after=4)
    fields = {key: value for key, value in body_of(path, stream=stream).items() if key != "max_tokens"} | limits
    assert impatient.post(path, fields).text == text_for(fields)
    bodies = [one["body"] for one in engines.requests("decode")]
    changed = [body for body in bodies if any(body[key] != limits[key] for key in limits)]
    assert [{key: body[key] for key in limits} for body in changed] == [
        {key: max(0, limit - 4) for key, limit in limits.items()}
    ]


def test_a_completion_without_a_limit_has_sixteen_tokens_in_all(impatient: Proxy, engines: Engines) -> None:
    engines.fault("decode", "recomputed", shared=True, after=4)
    fields = {"model": "mock", "prompt": "unlimited", "stream": True}
    assert impatient.post(COMPLETIONS, fields).text == text_for(fields)


@pytest.mark.parametrize("stream", [True, False])
def test_a_chat_without_a_limit_gets_none(impatient: Proxy, engines: Engines, stream: bool) -> None:
    """Warning sign in ascend-proxy.md 2.1: there 16 is taken for the limit, and the answer is cut off."""
    engines.fault("decode", "recomputed", shared=True, after=4)
    fields = {key: value for key, value in body_of(CHAT, stream=stream).items() if key != "max_tokens"}
    answer = impatient.post(CHAT, fields)
    assert answer.status == 200 and answer.text.startswith(text_for({**fields, "max_tokens": 16}))
    bodies = [one["body"] for one in engines.requests("decode")]
    assert sorted(len(body["messages"]) for body in bodies) == [1, 2]
    assert not any("max_tokens" in body or "max_completion_tokens" in body for body in bodies)


def test_a_prompt_of_token_ids_is_continued_by_token_ids(impatient: Proxy, engines: Engines) -> None:
    engines.fault("decode", "reset_mid", shared=True, after=4)
    fields = {"model": "mock", "prompt": [5, 6, 7], "max_tokens": 9, "stream": True, "return_token_ids": True}
    assert_undisturbed(impatient.post(COMPLETIONS, fields), fields)
    prompts = [one["body"]["prompt"] for one in engines.requests("decode")]
    assert sorted(map(len, prompts)) == [3, 7]


@pytest.mark.parametrize("stream", [True, False])
def test_without_ids_those_of_the_text_are_asked_for(impatient: Proxy, engines: Engines, stream: bool) -> None:
    engines.fault("decode", "recomputed", shared=True, after=4)
    fields = {"model": "mock", "prompt": [5, 6, 7], "max_tokens": 9, "stream": stream}
    answer = impatient.post(COMPLETIONS, fields)
    assert (answer.status, answer.text) == (200, text_for(fields))
    assert sorted(len(one["body"]["prompt"]) for one in engines.requests("decode")) == [3, 7]


def test_a_chat_goes_on_in_its_last_message(impatient: Proxy, engines: Engines) -> None:
    engines.fault("decode", "recomputed", shared=True, after=4)
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}]
    fields = {"model": "mock", "messages": messages, "max_tokens": 9, "stream": True}
    assert_undisturbed(impatient.post(CHAT, fields), fields)
    (body,) = [one["body"] for one in engines.requests("decode") if len(one["body"]["messages"]) == 3]
    assert body["messages"][:2] == messages
    assert body["messages"][2] == {"role": "assistant", "content": text_for({**fields, "max_tokens": 4})}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


@PATHS
def test_a_whole_answer_that_was_given_up_is_asked_for_on(impatient: Proxy, engines: Engines, path: str) -> None:
    engines.fault("decode", "recomputed", shared=True, after=4, count=1)
    fields = body_of(path, num_tokens=9)
    answer = impatient.post(path, fields)
    assert (answer.status, answer.text) == (200, text_for(fields))
    (choice,) = answer.json["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    script = script_of(fields)
    assert answer.json["usage"]["prompt_tokens"] == script.num_prompt_tokens
    assert answer.json["usage"]["completion_tokens"] == 9
    assert b"recomputed" not in answer.body


def test_a_whole_answer_that_cannot_be_continued_is_asked_for_again(impatient: Proxy, engines: Engines) -> None:
    engines.fault("decode", "recomputed", shared=True, after=4)
    fields = body_of(COMPLETIONS, num_tokens=9, frequency_penalty=0.5)
    assert impatient.post(COMPLETIONS, fields).text == text_for(fields)
    assert [one["body"]["max_tokens"] for one in engines.requests("decode")] == [9, 9]


@PATHS
@pytest.mark.parametrize("stream", [True, False])
def test_what_is_given_up_every_time_still_gets_done(
    impatient: Proxy, engines: Engines, path: str, stream: bool
) -> None:
    engines.fault("decode", "recomputed", shared=True, after=2, count=4)
    fields = body_of(path, num_tokens=9, stream=stream)
    assert impatient.post(path, fields).text == text_for(fields)


def test_continuations_are_bounded_and_counted(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy("--max-continuations", "2")
    engines.fault("decode", "recomputed", shared=True, after=1, count=100)
    fields = body_of(CHAT, num_tokens=9, stream=True)
    answer = proxy.post(CHAT, fields)
    assert answer.events[-1]["error"]["code"] == 502 and b"[DONE]" not in answer.body
    assert answer.text == text_for({**fields, "max_tokens": 3})
    assert proxy.post(CHAT, body_of(CHAT)).error["code"] == 503
    told = proxy.get("/metrics").body.decode()
    assert 'pd_proxy_continuations_total{outcome="continued",reason="recomputed"} 4.0' in told


@pytest.mark.parametrize("more", [
    {"logprobs": 1}, {"response_format": {"type": "json_object"}}, {"guided_regex": "a+"}, {"stop": " 0"},
    {"presence_penalty": 1.0},
])  # fmt: skip
def test_where_it_is_not_exact_the_client_is_told(impatient: Proxy, engines: Engines, more: dict[str, Any]) -> None:
    fields = {**body_of(COMPLETIONS, num_tokens=9, stream=True), **more}
    if "stop" in more:
        fields["stop"] = [text_for(fields)[4 * 15 - 2 : 4 * 15] + "more"]
    engines.fault("decode", "reset_mid", shared=True, after=4)
    answer = impatient.post(COMPLETIONS, fields)
    assert answer.events[-1]["error"]["code"] == 502 and b"[DONE]" not in answer.body
    assert text_for({**fields, "max_tokens": 4}) == answer.text
    assert len(engines.requests("decode")) == 1


@pytest.mark.parametrize("more", [{"n": 2}, {"prompt": ["a", "b"]}])
@pytest.mark.parametrize("kind", ["reset_mid", "recomputed"])
def test_each_child_of_a_divided_request_is_continued(
    proxy: Proxy, engines: Engines, more: dict[str, Any], kind: str
) -> None:
    fields = {**body_of(COMPLETIONS, num_tokens=9, stream=True), **more}
    engines.fault("decode", kind, shared=True, after=4, count=2)
    answer = proxy.post(COMPLETIONS, fields)
    said = ["", ""]
    for event in answer.events[:-1]:
        for choice in event["choices"]:
            said[choice["index"]] += choice["text"]
    prompts = fields["prompt"] if "prompt" in more else [fields["prompt"]] * 2
    assert said == [text_for({**fields, "prompt": one, "n": 1}) for one in prompts]
    assert answer.events[-1] == "[DONE]"


def test_an_engines_own_error_is_passed_on_where_it_cannot_be_made_up_for(impatient: Proxy, engines: Engines) -> None:
    engines.fault("decode", "error_event_mid", shared=True, after=4, message="out of order")
    answer = impatient.post(CHAT, body_of(CHAT, num_tokens=9, stream=True, logprobs=True))
    assert answer.events[-1]["error"]["message"] == "out of order"


def test_no_continuation_beyond_its_limit_of_bytes(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy("--max-continuation-bytes", "1000")
    engines.fault("decode", "reset_mid", shared=True, after=9, count=1)
    answer = proxy.post(CHAT, body_of(CHAT, num_tokens=20, stream=True))
    assert "error" in answer.events[-1]


def test_no_other_decoder_is_there(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy("--max-retries", "1", "--between-tokens-timeout-s", "1")
    engines.fault("decode", "reset_mid", after=3, count=1)
    for port in engines.decode:
        engines.fault(port, "status", status=503, count=5)
    answer = proxy.post(CHAT, body_of(CHAT, num_tokens=9, stream=True))
    assert answer.status == 200 and "error" in answer.events[-1]


@PATHS
@pytest.mark.parametrize("more", [
    {"stream_options": {"include_usage": True}}, {"return_token_ids": True}
], ids=["text", "ids"])  # fmt: skip
def test_a_loss_at_any_byte_of_the_body(impatient: Proxy, engines: Engines, path: str, more: dict[str, Any]) -> None:
    """The whole text once, or the beginning of it and an honest end."""
    fields = body_of(path, num_tokens=3, stream=True, **more)
    num_bytes = len(impatient.post(path, fields).body) + 100
    whole = text_for(fields)
    cuts = sorted({*range(0, num_bytes, 7), *random.Random(path).sample(range(num_bytes), 40)})
    continued = 0
    for cut in cuts:
        engines.fault("decode", "cut_at", shared=True, after=cut)
        answer = impatient.post(path, fields)
        if "error" in answer.events[-1]:
            assert whole.startswith(answer.text) and b"[DONE]" not in answer.body, cut
            assert answer.text == whole, "only a lost usage cannot be made up for"
        else:
            assert_undisturbed(answer, fields)
            continued += 1
    assert continued > len(cuts) * 3 // 5


def test_many_at_once(impatient: Proxy, engines: Engines) -> None:
    engines.fault("decode", "reset_mid", shared=True, after=5, count=12)

    def one(number: int) -> None:
        path = (CHAT, COMPLETIONS)[number % 2]
        fields = body_of(path, f"many {number}", 12, True, mock={"interval_s": 0.005})
        assert_undisturbed(impatient.post(path, fields), fields)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(24)))


def test_a_client_of_http_1_0_is_continued_too(impatient: Proxy, engines: Engines) -> None:
    engines.fault("decode", "reset_mid", shared=True, after=4)
    fields = body_of(CHAT, num_tokens=9, stream=True)
    connection = http.client.HTTPConnection("127.0.0.1", impatient.port, timeout=10)
    connection._http_vsn, connection._http_vsn_str = 10, "HTTP/1.0"  # type: ignore[attr-defined]
    connection.request("POST", CHAT, json.dumps(fields), {"Content-Type": "application/json"})
    response = connection.getresponse()
    headers = {name.lower(): value for name, value in response.getheaders()}
    assert_undisturbed(Answer(response.status, headers, response.read()), fields)
    connection.close()


@PATHS
@pytest.mark.parametrize("kind", [None, "reset_mid", "recomputed"])
@pytest.mark.parametrize("interval_s", [0, 0.01])
def test_a_streams_cached_tokens_are_the_prefillers(
    impatient: Proxy, engines: Engines, path: str, kind: str | None, interval_s: float
) -> None:
    if kind is not None:
        engines.fault("decode", kind, shared=True, after=4)
    mock = {"cached_tokens": 3, "decoder_cached_tokens": 8, "interval_s": interval_s}
    fields = body_of(path, num_tokens=9, stream=True, stream_options={"include_usage": True}, mock=mock)
    answer = impatient.post(path, fields)
    assert_undisturbed(answer, fields)
    assert answer.events[-2]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
