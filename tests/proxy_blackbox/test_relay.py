"""What goes through unharmed: bodies, fields, headers, ids, and the KV parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from bench.mock_answers import EventTemplate, script_of, whole_answer
from tests.proxy_blackbox.harness import CHAT, COMPLETIONS, Engines, Proxy, body_of, connected, request, text_for

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BOTH = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])


@BOTH
def test_a_whole_answer_is_the_decoders_byte_for_byte(proxy: Proxy, path: str) -> None:
    fields = body_of(path, num_tokens=7)
    answer = proxy.post(path, fields, X_Request_Id="whole-1")
    name = ("chatcmpl-" if path == CHAT else "cmpl-") + "whole-1"
    assert (answer.status, answer.body) == (200, whole_answer(script_of(fields), path == CHAT, name, "mock"))
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert answer.headers["x-mock"] == "json"


@BOTH
@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_is_the_decoders_byte_for_byte(proxy: Proxy, path: str, usage: bool) -> None:
    more: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    fields = body_of(path, num_tokens=40, stream=True, **more)
    answer = proxy.post(path, fields, X_Request_Id="stream-1")
    name = ("chatcmpl-" if path == CHAT else "cmpl-") + "stream-1"
    assert answer.body == EventTemplate(script_of(fields), path == CHAT, name, "mock", 1, 0, usage).whole()
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text == text_for(fields)


def test_tokens_arrive_one_by_one_and_not_at_the_end(proxy: Proxy) -> None:
    fields = body_of(COMPLETIONS, num_tokens=4, stream=True, mock={"interval_s": 0.15})
    body = json.dumps(fields).encode()
    seen = []
    with connected(proxy.port) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        while not seen or b"\r\n0\r\n\r\n" not in seen[-1]:
            seen.append(sock.recv(65536))
    assert len(seen) >= 4, seen


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_unknown_fields_survive_on_both_legs(proxy: Proxy, engines: Engines, path: str, stream: bool) -> None:
    odd = {"x_unknown": {"deep": [1, {"a": None}], "é☃": '\u2028"\\'}, "seed": 2**63 - 1, "temperature": 1e-07}
    fields = body_of(path, stream=stream, logit_bias={"5": -100}, **odd)
    assert proxy.post(path, fields).status == 200
    (decode,), (prefill,) = engines.requests("decode"), engines.requests("prefill")
    kv = decode["body"].pop("kv_transfer_params")
    assert decode["body"] == fields and list(decode["body"]) == list(fields)
    assert kv["do_remote_prefill"] is True
    changed = {
        "max_tokens",
        "min_tokens",
        "max_completion_tokens",
        "stream",
        "stream_options",
        "kv_transfer_params",
        "n",
    }
    assert {k: v for k, v in prefill["body"].items() if k not in changed} == {
        k: v for k, v in fields.items() if k not in changed
    }


def test_the_prefill_leg_is_one_forced_token(proxy: Proxy, engines: Engines) -> None:
    fields = body_of(
        CHAT, stream=True, stream_options={"include_usage": True}, n=1, max_completion_tokens=9, min_tokens=4
    )
    assert proxy.post(CHAT, fields).status == 200
    body = engines.requests("prefill")[0]["body"]
    assert (body["max_tokens"], body["max_completion_tokens"], body["min_tokens"], body["stream"]) == (1, 1, 1, False)
    assert "stream_options" not in body
    asked = body["kv_transfer_params"]
    assert asked["do_remote_decode"] is True and asked["do_remote_prefill"] is False
    assert not any(value for key, value in asked.items() if key.startswith("remote_"))


def test_both_legs_carry_the_clients_request_id_and_headers(proxy: Proxy, engines: Engines) -> None:
    headers = {"X_Request_Id": "abc-123", "Authorization": "Bearer secret", "traceparent": TRACE}
    answer = proxy.post(CHAT, body_of(CHAT), **headers)
    assert answer.headers["x-request-id"] == "abc-123"
    for leg in ("prefill", "decode"):
        (seen,) = engines.requests(leg)
        assert seen["headers"]["x-request-id"] == "abc-123"
        assert seen["headers"]["authorization"] == "Bearer secret"
        assert seen["headers"]["traceparent"] == answer.headers["traceparent"] == TRACE


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("given", ["", TRACE.replace("-01", "-1"), "00-" + "0" * 32 + TRACE[35:]])
def test_a_trace_is_made_for_both_legs_and_the_answer(proxy: Proxy, engines: Engines, stream: bool, given: str) -> None:
    given_lines = {"traceparent": given, "tracestate": "a=b"} if given else {}
    told = proxy.post(CHAT, body_of(CHAT, stream=stream), **given_lines).headers["traceparent"]
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", told) and told[3:35] != "0" * 32
    for leg in ("prefill", "decode"):
        (seen,) = engines.requests(leg)
        assert seen["headers"]["traceparent"] == told and "tracestate" not in seen["headers"]
    assert proxy.post(CHAT, b"{").headers["traceparent"] != told
    for path in ("/health", "/tokenize"):
        assert request(proxy.port, "GET", path, traceparent=TRACE).headers["traceparent"] == TRACE


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_retry_does_not_show_in_the_answers_id(proxy: Proxy, engines: Engines, stream: bool) -> None:
    engines.fault("prefill", "status", status=500, shared=True)
    answer = proxy.post(CHAT, body_of(CHAT, stream=stream), X_Request_Id="mine")
    told = [one for one in answer.events if one != "[DONE]"] if stream else [answer.json]
    assert {one["id"] for one in told} == {"chatcmpl-mine"}
    assert engines.requests("decode")[0]["headers"]["x-request-id"] == "mine-2"


def test_requests_without_an_id_get_one_each(proxy: Proxy) -> None:
    ids = {proxy.post(COMPLETIONS, body_of(COMPLETIONS)).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


@pytest.mark.parametrize("fields", [{"do_remote_prefill": True}, {"do_remote_decode": True}, [], "x"])
def test_a_clients_own_kv_transfer_params_are_refused(proxy: Proxy, engines: Engines, fields: Any) -> None:
    answer = proxy.post(CHAT, body_of(CHAT, kv_transfer_params=fields))
    assert answer.status == 400 and answer.error["param"] == "kv_transfer_params"
    assert engines.count("prefill", "requests") + engines.count("decode", "requests") == 0


@pytest.mark.parametrize("empty", [None, {}])
def test_empty_kv_transfer_params_are_as_good_as_none(proxy: Proxy, engines: Engines, empty: Any) -> None:
    fields = body_of(CHAT, kv_transfer_params=empty)
    assert proxy.post(CHAT, fields).text == text_for(fields)
    assert engines.requests("decode")[0]["body"]["kv_transfer_params"]["do_remote_prefill"] is True


def test_kv_transfer_params_among_the_extra_arguments_are_refused(proxy: Proxy, engines: Engines) -> None:
    """vLLM keeps both in one dictionary, where its connector would find them."""
    answer = proxy.post(CHAT, body_of(CHAT, vllm_xargs={"kv_transfer_params": "x"}))
    assert answer.status == 400 and answer.error["param"] == "kv_transfer_params"
    assert engines.count("prefill", "requests") + engines.count("decode", "requests") == 0


def test_kv_transfer_params_hidden_by_a_duplicate_key_do_not_reach_an_engine(proxy: Proxy, engines: Engines) -> None:
    """Parsers differ in which of two equal keys counts: an engine must never see the client's."""
    body = b'{"prompt":"a","max_tokens":2,"kv_transfer_params":{"do_remote_prefill":true},"kv_transfer_params":null}'
    answer = proxy.post(COMPLETIONS, body)
    assert answer.status in (200, 400)
    for leg in ("prefill", "decode"):
        for seen in engines.requests(leg):
            assert seen["body"]["kv_transfer_params"] != {"do_remote_prefill": True}


def test_token_ids_are_a_prompt(proxy: Proxy) -> None:
    fields = {"model": "mock", "prompt": list(range(50)), "max_tokens": 3}
    assert proxy.post(COMPLETIONS, fields).text == text_for(fields)


def test_a_megabyte_of_prompt(proxy: Proxy) -> None:
    fields = body_of(CHAT, prompt="wörd " * 200_000)
    assert proxy.post(CHAT, fields).text == text_for(fields)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_big_image_survives_an_instance_that_fails(proxy: Proxy, engines: Engines, role: str, stream: bool) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "Aa0/" * (1 << 19)}}
    messages = [{"role": "user", "content": [{"type": "text", "text": 'What is "this"?'}, image]}]
    fields = {"messages": messages, "model": "mock", "max_tokens": 5, "stream": stream, "seed": 1}
    engines.fault(role, "reset_before_head")
    answer = proxy.post(CHAT, fields)
    assert answer.status == 200, answer.body
    assert answer.text == text_for(fields)
    for leg, changed in (("prefill", {"stream": False, "max_tokens": 1}), ("decode", {})):
        bodies = [one["body"] for one in engines.requests(leg)]
        asked = [one for one in bodies if "release_only" not in one["kv_transfer_params"]]  # else KV is given back
        assert len(asked) >= (2 if leg == role else 1)
        for seen in asked:
            assert {key: seen[key] for key in fields} == {**fields, **changed}


def test_a_big_answer_that_is_not_streamed(proxy: Proxy) -> None:
    fields = body_of(COMPLETIONS, mock={"num_tokens": 99_999})
    assert proxy.post(COMPLETIONS, fields).text == text_for(fields)


def test_concurrent_work_spreads_over_the_instances(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy()

    def one(number: int) -> int:
        fields = body_of(COMPLETIONS, prompt=f"spread {number}", mock={"prefill_s": 0.1, "first_token_s": 0.2})
        return proxy.post(COMPLETIONS, fields).status

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(8))) == [200] * 8
    for state in engines.state()["instances"]:
        assert state["counts"].get("requests", 0) >= 2, engines.state()
