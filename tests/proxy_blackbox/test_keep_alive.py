"""`--keepalive-interval`: comments while a stream has not begun, and what fails after they have committed the 200."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.proxy_blackbox.harness import (
    CHAT,
    COMPLETIONS,
    Answer,
    Engines,
    Proxy,
    body_of,
    connected,
    raw_post,
    read_answer,
    text_for,
)

COMMENT = b": keep-alive\n\n"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
SLOW = {"prefill_s": 0.4}


@pytest.fixture
def chatty(start_proxy: Callable[..., Proxy]) -> Callable[..., Proxy]:
    return lambda *flags: start_proxy("--keepalive-interval", "0.05", "--health-retry-interval-s", "0.1", *flags)


def asked(path: str, **more: Any) -> dict[str, Any]:
    fields = body_of(CHAT if path == MESSAGES else path, stream=True, mock=SLOW, **more)
    if path == RESPONSES:
        fields["input"] = fields.pop("prompt")
        fields["max_output_tokens"] = fields.pop("max_tokens")
    return fields


def after_comments(answer: Answer) -> bytes:
    """The stream; comments stand before it and nowhere else."""
    num_comments = answer.body.count(COMMENT)
    assert num_comments >= 2 and answer.body.startswith(COMMENT * num_comments), answer.body[:300]
    answer.body = answer.body.removeprefix(COMMENT * num_comments)
    return answer.body


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_comments_come_until_the_stream_begins(chatty: Callable[..., Proxy], path: str) -> None:
    fields = asked(path)
    fields["mock"] = {**SLOW, "interval_s": 0.15}
    answer = chatty().post(path, fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    after_comments(answer)
    assert answer.text == text_for(fields) and answer.events[-1] == "[DONE]"


def test_a_stream_of_several_choices_begins_with_comments_too(chatty: Callable[..., Proxy]) -> None:
    answer = chatty().post(CHAT, asked(CHAT, n=2))
    after_comments(answer)
    assert {choice["index"] for event in answer.events[:-1] for choice in event["choices"]} == {0, 1}
    assert answer.events[-1] == "[DONE]"


def test_a_whole_answer_and_a_proxy_that_was_not_told_have_none(
    chatty: Callable[..., Proxy], start_proxy: Callable[..., Proxy]
) -> None:
    fields = body_of(CHAT, mock=SLOW)
    assert chatty().post(CHAT, fields).text == text_for(fields)
    streamed = start_proxy().post(CHAT, asked(CHAT))
    assert streamed.body.startswith(b"data: ")


def test_failures_are_still_retried_unseen(chatty: Callable[..., Proxy], engines: Engines) -> None:
    engines.fault("decode", "error_event", shared=True)
    engines.fault("prefill", "reset_before_head", shared=True)
    fields = asked(CHAT)
    answer = chatty().post(CHAT, fields)
    after_comments(answer)
    assert answer.text == text_for(fields)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES, RESPONSES])
def test_an_engines_error_after_them_is_an_event_of_the_api(
    chatty: Callable[..., Proxy], engines: Engines, path: str
) -> None:
    engines.fault("decode", "status", status=400, message="too long a prompt", count=9)
    proxy = chatty()
    answer = proxy.post(path, asked(path))
    said = after_comments(answer).decode()
    assert answer.status == 200 and said.count("\n\n") == 1
    name, _, data = said.strip().rpartition("data: ")
    assert name == ("event: error\n" if path in (MESSAGES, RESPONSES) else "")
    told = json.loads(data)
    message = told["message"] if path == RESPONSES else told["error"]["message"]
    assert message == "too long a prompt"
    if path == MESSAGES:
        assert told["type"] == "error" and told["error"]["type"] == "invalid_request_error"
    if path == RESPONSES:
        assert (told["type"], told["code"]) == ("error", "400")


@pytest.mark.parametrize("num_choices", [1, 2])
def test_the_proxys_own_error_is_an_event_and_the_connection_goes_on(
    chatty: Callable[..., Proxy], engines: Engines, num_choices: int
) -> None:
    engines.fault("prefill", "hang_before_head", count=9)
    proxy = chatty("--prefill-timeout-s", "1", "--max-retries", "1")
    with connected(proxy.port) as sock:
        fields = body_of(CHAT, stream=True, n=num_choices)
        sock.sendall(raw_post(CHAT, json.dumps(fields).encode()))
        answer = read_answer(sock)
        after_comments(answer)
        assert answer.events[0]["error"]["code"] == 504
        engines.reset()
        fields = body_of(CHAT)
        sock.sendall(raw_post(CHAT, json.dumps(fields).encode()))
        assert read_answer(sock).text == text_for(fields)


def test_the_requests_own_limit_is_told_in_an_event(chatty: Callable[..., Proxy]) -> None:
    fields = body_of(CHAT, stream=True, mock={"prefill_s": 5})
    answer = chatty("--total-timeout-s", "1").post(CHAT, fields)
    after_comments(answer)
    assert answer.events[0]["error"]["code"] == 504


def test_a_queue_that_is_too_slow_is_told_in_an_event(chatty: Callable[..., Proxy], engines: Engines) -> None:
    proxy = chatty("--decoder-max-streams", "1", "--queue-timeout-s", "0.3")
    body = json.dumps(body_of(CHAT, stream=True, num_tokens=500, mock={"interval_s": 0.02})).encode()
    with connected(proxy.port) as one, connected(proxy.port) as other:
        for sock in (one, other):
            sock.sendall(raw_post(CHAT, body))
            while b'"content":" ' not in sock.recv(65536):
                pass
        answer = proxy.post(CHAT, body_of(CHAT, stream=True))
        after_comments(answer)
        assert answer.events[0]["error"]["code"] == 503


def test_a_client_of_http_1_0_gets_them_unframed(chatty: Callable[..., Proxy]) -> None:
    fields = asked(COMPLETIONS)
    request = raw_post(COMPLETIONS, json.dumps(fields).encode()).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    with connected(chatty().port) as sock:
        sock.sendall(request)
        answer = read_answer(sock)
    after_comments(answer)
    assert answer.text == text_for(fields)
