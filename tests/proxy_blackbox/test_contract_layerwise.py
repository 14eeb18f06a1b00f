"""Contract `layerwise` over processes: decoders that really call the metaserver and wait for the push.

Among them the defects of the example proxy (ascend-proxy.md 2.2): output that is sent twice when a decoder is retried,
and a retry under the old id, which waits for KV that never comes.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

import pytest

from tests.proxy_blackbox.contracts import SHORT_TIMEOUTS, begun, called_off, leave
from tests.proxy_blackbox.harness import (
    CHAT,
    COMPLETIONS,
    HOST,
    PROXY,
    Engines,
    Proxy,
    body_of,
    eventually,
    request,
    settled,
    text_for,
)

METASERVER, CONTRACT = "/v1/metaserver", "layerwise"


def test_the_decoder_goes_first_and_its_post_reaches_the_prefiller(proxy: Proxy, engines: Engines) -> None:
    fields = body_of(CHAT, stream=True, mock={"prefill_s": 0.1})
    assert proxy.post(CHAT, fields, X_Request_Id="mine").text == text_for(fields)
    decode, prefill = engines.requests("decode")[0], engines.requests("prefill")[0]
    assert decode["body"]["kv_transfer_params"] == {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "metaserver": f"http://{HOST}:{proxy.port}{METASERVER}",
    }
    parent = decode["headers"]["x-request-id"]
    assert parent.startswith("mine-") and prefill["headers"]["x-request-id"] == parent
    assert prefill["body"]["kv_transfer_params"]["request_id"] == f"chatcmpl-{parent}"
    eventually(lambda: engines.count("decode", "metaserver_200") != 1, "the metaserver's answer")


@pytest.mark.parametrize("prompts", [["a", "b", "c"], [[1, 2], [3]], ["one"], [f"p{i}" for i in range(40)]])
def test_a_list_of_prompts_is_joined_in_one_prefill(proxy: Proxy, engines: Engines, prompts: list[object]) -> None:
    fields = {**body_of(COMPLETIONS), "prompt": prompts}
    answer = proxy.post(COMPLETIONS, fields)
    texts = [choice["text"] for choice in answer.json["choices"]]
    assert (answer.status, texts) == (200, [text_for({**fields, "prompt": one}) for one in prompts])
    assert engines.count("prefill", "prefills") == 1
    params = engines.requests("prefill")[0]["body"]["kv_transfer_params"]
    batch = params.get("batch_kv_transfer_params")
    assert batch is None if len(prompts) == 1 else len(batch) == len(prompts)
    eventually(lambda: engines.count("decode", "metaserver_200") != len(prompts), "calls answered")


def test_a_call_for_an_id_that_was_not_issued_is_404(proxy: Proxy) -> None:
    answer = request(proxy.port, "POST", METASERVER, {"request_id": "chatcmpl-guess", "remote_host": "evil"})
    assert answer.status == 404 and answer.error
    assert request(proxy.port, "POST", METASERVER, b"{").status == 400
    assert request(proxy.port, "GET", METASERVER).status == 405


def test_a_slow_prefill_does_not_hold_the_decoders_call(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy("--contract", "layerwise", "--metaserver-wait-s", "0.05")
    sock = begun(proxy, CHAT, body_of(CHAT, mock={"prefill_s": 10}))
    eventually(lambda: not engines.count("decode", "metaserver_200"), "the call was not answered")
    assert engines.count("decode", "decodes") == 0
    leave(sock)


def test_a_prefill_is_repeated_elsewhere_under_the_same_id(proxy: Proxy, engines: Engines) -> None:
    """The decoder that waits knows only this id."""
    engines.fault("prefill", "status", status=500, count=2, shared=True)
    fields = body_of(CHAT, stream=True)
    assert proxy.post(CHAT, fields).text == text_for(fields)
    ids = {one["headers"]["x-request-id"] for one in engines.requests("prefill")}
    assert len(ids) == 1 and engines.count("decode", "waits") == 1


def test_a_prefiller_that_answers_but_says_that_it_did_not_push(proxy: Proxy, engines: Engines) -> None:
    """vLLM can't answer with an error any more. It is well: that its sidecar was away says nothing about it."""
    engines.fault("prefill", "push_failed", count=1, shared=True)
    fields = body_of(CHAT, stream=True)
    assert proxy.post(CHAT, fields).text == text_for(fields)
    assert len(engines.requests("prefill")) == 2 and engines.count("decode", "waits") == 1
    engines.fault("prefill", "push_failed", count=99, message="the sidecar is away")
    answer = proxy.post(COMPLETIONS, body_of(COMPLETIONS))
    assert answer.status == 503 and b"the sidecar is away" in answer.body
    assert engines.count("decode", "aborted") == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_prefill_that_fails_for_good_ends_the_decode(proxy: Proxy, engines: Engines, stream: bool) -> None:
    """The decoder would wait for ever. Its calls get 502."""
    engines.fault("prefill", "status", status=500, count=99)
    fields = {**body_of(COMPLETIONS, stream=stream), "prompt": ["a", "b"]}
    assert proxy.post(COMPLETIONS, fields).status == 500
    eventually(lambda: engines.count("decode", "metaserver_502") != 2, "502 to both children")
    assert engines.count("decode", "aborted") == 1
    assert b'pd_proxy_metaserver_calls_total{outcome="failed"}' in proxy.get("/metrics").body


def test_a_decoder_is_retried_under_an_id_of_its_own(proxy: Proxy, engines: Engines) -> None:
    """The example sends the old id again, whose prefill is done: the decoder waits for ever."""
    engines.fault("decode", "reset_before_head", consume=True, shared=True)
    fields = body_of(CHAT, stream=True, num_tokens=9)
    answer = proxy.post(CHAT, fields)
    assert answer.text == text_for(fields)
    ids = [one["headers"]["x-request-id"] for one in engines.requests("decode")]
    assert len(ids) == len(set(ids)) == 2
    assert {one["headers"]["x-request-id"] for one in engines.requests("prefill")} == set(ids)


def test_a_decoder_lost_in_the_stream_does_not_repeat_its_output(proxy: Proxy, engines: Engines) -> None:
    engines.fault("decode", "reset_mid", after=3, shared=True)
    fields = body_of(CHAT, stream=True, num_tokens=9)
    said = proxy.post(CHAT, fields).body
    for token in re.findall(r" [0-9a-f]{8}:\d{5}", text_for(fields)):
        assert said.count(token.encode()) <= 1


def test_a_client_that_leaves_while_the_decoder_waits(proxy: Proxy, engines: Engines) -> None:
    """Neither leg goes on: nothing is pushed into blocks that are another request's by then."""
    sock = begun(proxy, CHAT, body_of(CHAT, mock={"prefill_s": 10}))
    eventually(lambda: not engines.count("prefill", "prefills"), "no prefill began")
    leave(sock)
    called_off(proxy, engines, "decode", "prefill")
    assert engines.count("prefill", "pushed_into_freed") == 0


def test_several_choices_are_left_to_the_decoder_or_divided(proxy: Proxy, engines: Engines) -> None:
    fields = body_of(CHAT, n=2)
    answer = proxy.post(CHAT, fields)
    assert answer.status == 200 and len(answer.json["choices"]) == 2


@pytest.mark.parametrize("lost", [False, True], ids=["at once", "retried"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_answers_id_is_the_clients(proxy: Proxy, engines: Engines, path: str, stream: bool, lost: bool) -> None:
    """Legs have ids that nobody can guess; one engine would have made the answer's of the client's own."""
    if lost:
        engines.fault("decode", "recomputed", shared=True, after=3)
    answer = proxy.post(path, body_of(path, stream=stream, num_tokens=9), X_Request_Id="mine")
    told = [one for one in answer.events if one != "[DONE]"] if stream else [answer.json]
    assert {one["id"] for one in told} == {("chatcmpl-" if path == CHAT else "cmpl-") + "mine"}
    assert b"mine-" not in answer.body


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_a_wildcard_address_needs_one_to_advertise(host: str) -> None:
    ended = subprocess.run(
        [PROXY, "--host", host, "--contract", "layerwise"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert "--advertise-url http://" in ended.stderr and ended.stderr.count("\n") == 1


def test_an_advertised_address_is_what_decoders_are_told(engines: Engines) -> None:
    proxy = Proxy(
        engines, "--contract", "layerwise", *SHORT_TIMEOUTS, "--host", "0.0.0.0",
        "--advertise-url", "http://127.0.0.2:9/",
    )  # fmt: skip
    try:
        sock = begun(proxy, CHAT, body_of(CHAT))
        eventually(lambda: not engines.requests("decode"), "no decode began")
        told = engines.requests("decode")[0]["body"]["kv_transfer_params"]["metaserver"]
        assert told == f"http://127.0.0.2:9{METASERVER}"
        leave(sock)
        settled(proxy, engines)
    finally:
        proxy.stop()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_that_was_given_up_is_gone_on_with(proxy: Proxy, engines: Engines, path: str, stream: bool) -> None:
    """Defect of the example proxy: it asks the same decoder under the same id, for which no prefill comes again."""
    engines.fault("decode", "recomputed", shared=True, after=3)
    fields = body_of(path, num_tokens=9, stream=stream)
    answer = proxy.post(path, fields)
    assert (answer.status, answer.text) == (200, text_for(fields))
    assert b"recomputed" not in answer.body
    ids = [one["headers"]["x-request-id"] for one in engines.requests("prefill")]
    assert len(ids) == len(set(ids)) == 2


@pytest.mark.parametrize("limits", [
    {"max_tokens": 9}, {"max_tokens": 30, "max_completion_tokens": 9}, {"max_completion_tokens": 9, "min_tokens": 7},
])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_both_limits_hold_over_all_parts(proxy: Proxy, engines: Engines, limits: dict[str, int], stream: bool) -> None:
    engines.fault("decode", "recomputed", shared=True, after=4)
    fields = {key: value for key, value in body_of(CHAT, stream=stream).items() if key != "max_tokens"} | limits
    assert proxy.post(CHAT, fields).text == text_for(fields)
    second = max((one["body"] for one in engines.requests("decode")), key=lambda body: len(body["messages"]))
    assert {key: second[key] for key in limits} == {key: max(0, limit - 4) for key, limit in limits.items()}


@pytest.mark.parametrize("prompts", [["a", "b", "c"], [[1, 2], [3]]])
def test_a_list_that_was_given_up_is_answered_whole_all_the_same(
    proxy: Proxy, engines: Engines, prompts: list[object]
) -> None:
    """Defect of the example proxy: a list of prompts is a TypeError that is swallowed, and a truncated answer. A list
    goes to one decoder here, so that it is asked for again from its beginning."""
    engines.fault("decode", "recomputed", shared=True, after=3)
    fields = {**body_of(COMPLETIONS, num_tokens=9), "prompt": prompts}
    answer = proxy.post(COMPLETIONS, fields)
    texts = [choice["text"] for choice in answer.json["choices"]]
    assert (answer.status, texts) == (200, [text_for({**fields, "prompt": one}) for one in prompts])
    assert engines.count("prefill", "prefills") == 2


def test_the_stream_of_a_list_that_was_given_up_ends_with_an_error(proxy: Proxy, engines: Engines) -> None:
    """Its prompts cannot be gone on with one by one on a decoder that has them all."""
    engines.fault("decode", "recomputed", shared=True, after=3)
    answer = proxy.post(COMPLETIONS, {**body_of(COMPLETIONS, num_tokens=9, stream=True), "prompt": ["a", "b"]})
    assert answer.events[-1]["error"]["code"] == 502 and b"recomputed" not in answer.body
    assert b"[DONE]" not in answer.body


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_whose_decoder_is_lost_is_gone_on_with(proxy: Proxy, engines: Engines, path: str) -> None:
    engines.fault("decode", "reset_mid", shared=True, after=3)
    fields = body_of(path, num_tokens=9, stream=True)
    assert proxy.post(path, fields).text == text_for(fields)
