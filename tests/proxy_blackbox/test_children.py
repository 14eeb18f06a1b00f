"""Several prompts and choices: divided, prefilled each, joined to what one engine alone would have said."""

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
    eventually,
    raw_post,
    read_answer,
    request,
)

PROMPTS = ["one", "two is longer than one", "three"]
IDS = [[1, 2, 3], [4, 5], [6]]


def several(**more: Any) -> dict[str, Any]:
    return {"model": "mock", "prompt": PROMPTS, "max_tokens": 4, **more}


def unsplit(engines: Engines, path: str, fields: dict[str, Any], **headers: str) -> Answer:
    """What one decoder says that is asked for all of it by itself."""
    return request(engines.decode[0], "POST", path, fields, **headers)


def by_choice(answer: Answer) -> dict[int, list[Any]]:
    """What a stream says of each choice, in order, and under -1 what it says of none."""
    told: dict[int, list[Any]] = {}
    for event in answer.events[:-1]:
        for choice in event["choices"] or [{"index": -1}]:
            told.setdefault(choice["index"], []).append({**event, "choices": [choice]})
    return told


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a list": (COMPLETIONS, several()),
    "lists of token ids": (COMPLETIONS, several(prompt=IDS)),
    "choices": (COMPLETIONS, several(prompt="alone", n=3)),
    "a list and choices": (COMPLETIONS, several(n=2, seed=5)),
    "choices of a chat": (CHAT, body_of(CHAT, n=3, num_tokens=4)),
    "echo": (COMPLETIONS, several(echo=True, n=2)),
    "echo and logprobs": (COMPLETIONS, several(echo=True, logprobs=1, n=2)),
    "logprobs of the prompts": (COMPLETIONS, several(prompt_logprobs=1)),
    "logprobs of a chat": (CHAT, body_of(CHAT, n=2, num_tokens=4, prompt_logprobs=0)),
}
ALL = pytest.mark.parametrize(("path", "fields"), CASES.values(), ids=CASES)


@ALL
def test_the_whole_answer_is_one_engines(proxy: Proxy, engines: Engines, path: str, fields: dict[str, Any]) -> None:
    expected = unsplit(engines, path, fields, X_Request_Id="r-1")
    answer = proxy.post(path, fields, X_Request_Id="r-1")
    assert (answer.status, answer.json) == (200, expected.json)
    assert answer.headers["x-request-id"] == "r-1" and answer.headers["x-mock"] == "json"
    assert engines.count("prefill", "prefills") == len(answer.json["choices"])
    assert engines.count("decode", "recomputed") == 1  # the one asked directly


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("name", ["a list", "lists of token ids", "a list and choices", "choices of a chat"])
def test_the_stream_says_of_each_choice_what_one_engine_says(
    proxy: Proxy, engines: Engines, name: str, usage: bool
) -> None:
    path, fields = CASES[name]
    fields = {**fields, "stream": True, **({"stream_options": {"include_usage": True}} if usage else {})}
    expected = unsplit(engines, path, fields, X_Request_Id="r-1")
    answer = proxy.post(path, fields, X_Request_Id="r-1")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert by_choice(answer) == by_choice(expected)
    assert answer.events.count("[DONE]") == 1 and answer.events[-1] == "[DONE]"
    assert (answer.events[-2]["choices"] == []) is usage


def test_each_child_is_a_request_of_its_own(proxy: Proxy, engines: Engines) -> None:
    proxy.post(COMPLETIONS, several(n=2, seed=5, stop=["x"]), X_Request_Id="r-1")
    for role in ("prefill", "decode"):
        seen = sorted(engines.requests(role), key=lambda one: str(one["headers"]["x-request-id"]))
        assert [one["headers"]["x-request-id"] for one in seen] == [f"r-1-c{index}" for index in range(6)]
        assert [one["body"]["prompt"] for one in seen] == [prompt for prompt in PROMPTS for _ in range(2)]
        assert [one["body"]["seed"] for one in seen] == [5, 6] * 3
        assert {one["body"]["n"] for one in seen} == {1}


@pytest.mark.parametrize(
    ("more", "reason"),
    [({"use_beam_search": True, "n": 2}, "beam_search"), ({"n": 2, "best_of": 3}, "best_of")],
)
def test_what_cannot_be_divided_is_computed_by_a_decoder_alone(
    proxy: Proxy, engines: Engines, more: dict[str, Any], reason: str
) -> None:
    fields = several(**more)
    assert proxy.post(COMPLETIONS, fields).status == 200
    assert engines.count("prefill", "requests") == 0
    (seen,) = engines.requests("decode")
    assert seen["body"] == fields
    assert f'pd_proxy_decoder_recomputes_total{{reason="{reason}"}}' in proxy.get("/metrics").body.decode()


def test_more_than_max_children_are_computed_by_a_decoder_alone(
    start_proxy: Callable[..., Proxy], engines: Engines
) -> None:
    proxy = start_proxy("--max-children", "5")
    assert len(proxy.post(COMPLETIONS, several(n=2)).json["choices"]) == 6
    assert engines.count("prefill", "requests") == 0
    assert len(proxy.post(COMPLETIONS, several(prompt=[*PROMPTS, "4", "5"])).json["choices"]) == 5
    assert engines.count("prefill", "prefills") == 5


@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_first_error_of_a_child_is_the_answer(proxy: Proxy, engines: Engines, leg: str, stream: bool) -> None:
    engines.fault(leg, "status", shared=True, status=422, message="no")
    slow = {"first_token_s": 3.0} if leg == "decode" else {"prefill_s": 0.5, "first_token_s": 3.0}
    answer = proxy.post(COMPLETIONS, several(stream=stream, mock=slow))
    assert answer.status == 422 and answer.error["message"] == "no"


@pytest.mark.parametrize("kind", ["reset_before_head", "garbage", "error_event"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_child_is_retried_by_itself(proxy: Proxy, engines: Engines, kind: str, stream: bool) -> None:
    fields = several(stream=stream)
    expected = unsplit(engines, COMPLETIONS, fields, X_Request_Id="r-1")
    engines.fault("decode", kind, count=1)
    answer = proxy.post(COMPLETIONS, fields, X_Request_Id="r-1")
    if stream:
        assert by_choice(answer) == by_choice(expected)
    else:
        assert answer.json == expected.json


@pytest.mark.parametrize("kind", ["error_event_mid", "reset_mid"])
def test_an_error_in_the_middle_ends_the_stream_honestly(
    start_proxy: Callable[..., Proxy], engines: Engines, kind: str
) -> None:
    proxy = start_proxy("--max-continuations", "0")
    engines.fault(engines.decode[0], kind, after=2)
    answer = proxy.post(COMPLETIONS, several(stream=True, n=2, max_tokens=50, mock={"interval_s": 0.02}))
    assert answer.status == 200
    errors = [event for event in answer.events if event != "[DONE]" and "error" in event]
    assert len(errors) == 1 and errors[0]["error"]["message"]
    after = answer.events[answer.events.index(errors[0]) + 1 :]
    assert after in ([], ["[DONE]"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_a_client_that_leaves_takes_its_children_along(proxy: Proxy, engines: Engines, stream: bool, when: str) -> None:
    mock = {"prefill_s": 0.4} if when == "prefill" else {"interval_s": 0.2}
    body = json.dumps(several(stream=stream, n=2, max_tokens=100, mock=mock)).encode()
    leg, what = ("prefill", "prefills") if when == "prefill" else ("decode", "decodes")
    with connected(proxy.port) as sock:
        sock.sendall(raw_post(COMPLETIONS, body))
        eventually(lambda: engines.count(leg, what) < 6, f"no {what}")
    # the fixture holds the rest: loads, ledgers and running requests come to zero


def test_a_slow_reader_slows_all_children(proxy: Proxy, engines: Engines) -> None:
    fields = several(stream=True, n=2, max_tokens=60_000)
    with connected(proxy.port, timeout=60) as sock:
        sock.sendall(raw_post(COMPLETIONS, json.dumps(fields).encode()))
        eventually(lambda: engines.count("decode", "decodes") < 6, "not all are decoded")
        before = proxy.rss_bytes()
        sock.settimeout(1.0)
        seen = sock.recv(1000)
        assert proxy.rss_bytes() - before < 120 << 20  # 6 times 60,000 events are more
        assert seen.startswith(b"HTTP/1.1 200")


def test_a_client_of_http_1_0_gets_the_joined_stream_too(proxy: Proxy) -> None:
    body = json.dumps(several(stream=True)).encode()
    head = f"POST {COMPLETIONS} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with connected(proxy.port) as sock:
        sock.sendall(head + body)
        answer = read_answer(sock)
    assert answer.status == 200 and answer.events[-1] == "[DONE]"
    assert set(by_choice(answer)) == {0, 1, 2}


def test_the_connection_serves_on_after_a_joined_answer(proxy: Proxy) -> None:
    with connected(proxy.port) as sock:
        for stream in (False, True, False):
            sock.sendall(raw_post(COMPLETIONS, json.dumps(several(stream=stream)).encode()))
            assert read_answer(sock).status == 200


def test_children_are_told_apart_in_the_metrics(proxy: Proxy) -> None:
    def requests_of(route: str) -> float:
        lines = proxy.get("/metrics").body.decode().splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith("pd_proxy_requests_total") and f'route="{route}"' in line
        )

    before = {route: requests_of(route) for route in ("completions", "child")}
    proxy.post(COMPLETIONS, several())
    eventually(lambda: requests_of("child") != before["child"] + 3, "children are not counted")
    eventually(lambda: requests_of("completions") != before["completions"] + 1, "the request is not counted")
