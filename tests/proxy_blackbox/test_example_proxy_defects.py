"""The defects of the example proxies that concern loads, cancellation, retries and what a client is told
(ascend-proxy.md 2.1 and 2.2, each named here), which must not be found in this one.

Those of membership are in `test_control.py`, those of bodies in `test_bad_requests.py`.
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.proxy_blackbox.harness import (
    CHAT,
    COMPLETIONS,
    HOST,
    Engines,
    Proxy,
    body_of,
    eventually,
    raw_post,
    request,
    text_for,
)

StartProxy = Callable[..., Proxy]
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def loads(proxy: Proxy, role: str) -> list[int]:
    return [one["load"]["num_requests"] for one in proxy.get("/instances").json["instances"] if one["role"] == role]


def sent(proxy: Proxy, fields: dict[str, object]) -> socket.socket:
    sock = socket.create_connection((HOST, proxy.port), timeout=10)
    sock.sendall(raw_post(CHAT, json.dumps(fields).encode()))
    return sock


def leave(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@STREAM
def test_a_failed_second_prefill_does_not_release_the_old_decoder_twice(
    start_proxy: StartProxy, engines: Engines, stream: bool
) -> None:
    """There the decoder's load goes negative, and it attracts traffic."""
    proxy = start_proxy("--first-token-timeout-s", "2.5")
    engines.fault("decode", "hang_before_head", shared=True)
    with ThreadPoolExecutor(1) as beside:
        answering = beside.submit(proxy.post, CHAT, body_of(CHAT, stream=stream))
        eventually(lambda: not engines.count("decode", "faults"), "no decode began")
        engines.fault("prefill", "status", status=500, count=100)
        assert answering.result().status == 500
    assert (loads(proxy, "prefill"), loads(proxy, "decode")) == ([0, 0], [0, 0])
    engines.reset()
    held = [sent(proxy, body_of(CHAT, f"{number}", stream=True, mock={"first_token_s": 2})) for number in range(4)]
    eventually(lambda: engines.count("decode", "decodes") < 4, "not all decodes began")
    assert loads(proxy, "decode") == [2, 2]
    for sock in held:
        leave(sock)


@STREAM
def test_the_failed_prefill_of_a_recompute_gives_every_load_back_once(
    start_proxy: StartProxy, engines: Engines, stream: bool
) -> None:
    """There the `finally` of the stream releases the old decoder a second time."""
    proxy = start_proxy("--max-retries", "1")
    engines.fault("decode", "recomputed", shared=True, after=3, count=99)
    shape = {"interval_s": 0.1, "first_token_s": 1.5}
    with ThreadPoolExecutor(1) as beside:
        answering = beside.submit(proxy.post, CHAT, body_of(CHAT, num_tokens=9, stream=stream, mock=shape))
        eventually(lambda: not engines.count("decode", "decodes"), "no decode began")
        engines.fault("prefill", "status", status=500, count=100)
        answer = answering.result()
    assert engines.count("prefill", "prefills") == 1 and engines.count("prefill", "faults") == 1
    if stream:
        assert answer.events[-1]["error"]["code"] == 502 and b"[DONE]" not in answer.body
    else:
        assert answer.status == 500
    assert (loads(proxy, "prefill"), loads(proxy, "decode")) == ([0, 0], [0, 0])


def test_a_client_that_leaves_in_prefill_leaves_no_load_and_removal_ends(
    start_proxy: StartProxy, engines: Engines
) -> None:
    """There `except Exception` does not see the cancellation: the load stays for ever, and draining never ends."""
    proxy = start_proxy()
    for _ in range(2):
        sock = sent(proxy, body_of(CHAT, mock={"prefill_s": 20}))
        eventually(lambda: not sum(loads(proxy, "prefill")), "no prefill began")
        leave(sock)
        eventually(lambda: sum(loads(proxy, "prefill")), "the load stays")
    address = f"{HOST}:{engines.prefill[0]}"
    removal = {"type": "prefill", "instances": [address]}
    assert request(proxy.port, "POST", "/instances/remove", removal).status == 200
    eventually(lambda: len(loads(proxy, "prefill")) == 2, "the instance was not removed", 15.0)


@pytest.mark.parametrize("kind", ["status", "recomputed"])
def test_a_request_that_is_retried_does_not_give_back_the_load_of_another(
    proxy: Proxy, engines: Engines, kind: str
) -> None:
    """There a retry releases the prefiller's load twice, and the floor at zero hides whose it was."""
    held = [sent(proxy, body_of(CHAT, f"held {number}", mock={"prefill_s": 20})) for number in range(2)]
    eventually(lambda: sum(loads(proxy, "prefill")) < 2, "the prefills did not begin")
    for number in range(3):
        engines.fault("decode", kind, status=500, shared=True)
        fields = body_of(CHAT, f"retried {number}", num_tokens=7, stream=number == 1)
        assert proxy.post(CHAT, fields).text == text_for(fields)
        assert sum(loads(proxy, "prefill")) == 2
    for sock in held:
        leave(sock)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_error_event_in_the_middle_reaches_the_client(proxy: Proxy, engines: Engines, path: str) -> None:
    """There an event without choices is an IndexError that is swallowed: a truncated 200."""
    engines.fault("decode", "error_event_mid", shared=True, message="out of memory")
    # one that asks for logprobs is not continued on another decoder, which would hide the error
    answer = proxy.post(path, body_of(path, num_tokens=9, stream=True, logprobs=1, mock={"interval_s": 0.01}))
    errors = [one["error"]["message"] for one in answer.events if isinstance(one, dict) and "error" in one]
    assert errors == ["out of memory"]


@STREAM
@pytest.mark.parametrize(
    ("kind", "statuses"), [("status", {500}), ("reset_before_head", {502, 503}), ("garbage", {502})]
)
def test_a_decoder_that_fails_is_no_empty_200(
    proxy: Proxy, engines: Engines, kind: str, statuses: set[int], stream: bool
) -> None:
    """There the status is fixed at 200 before the decoder is asked: any error of it is an empty or truncated answer."""
    engines.fault("decode", kind, count=100)
    answer = proxy.post(CHAT, body_of(CHAT, stream=stream))
    assert answer.status in statuses and answer.error["message"]


@STREAM
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("status", [400, 401, 404, 422, 429])
def test_a_4xx_is_the_clients_and_asked_for_once(
    proxy: Proxy, engines: Engines, role: str, status: int, stream: bool
) -> None:
    """There every status but 400 is retried (in 2.2 that too), three times on the same instance."""
    engines.fault(role, "status", status=status, count=100, message="yours")
    answer = proxy.post(CHAT, body_of(CHAT, stream=stream))
    assert (answer.status, answer.error["message"]) == (status, "yours")
    assert engines.count(role, "faults") == 1


@STREAM
def test_a_prefiller_that_cannot_be_reached_is_an_openai_error(
    start_proxy: StartProxy, engines: Engines, stream: bool
) -> None:
    """There it is a plain-text 500 of the web framework."""
    proxy = start_proxy()
    for port in engines.prefill:
        engines.stop(port)
    answer = proxy.post(CHAT, body_of(CHAT, stream=stream))
    assert answer.status == 503 and answer.error["type"] and answer.headers["retry-after"]


@pytest.mark.parametrize("kind", ["reset_mid", "close_mid"])
def test_nothing_is_said_twice_when_a_stream_breaks(proxy: Proxy, engines: Engines, kind: str) -> None:
    """There (2.2) a transport error may be retried after bytes were sent, and the client reads them again."""
    engines.fault("decode", kind, shared=True, after=4)
    fields = body_of(COMPLETIONS, num_tokens=9, stream=True, mock={"interval_s": 0.01})
    try:
        answer = proxy.post(COMPLETIONS, fields)
    except (http.client.IncompleteRead, ConnectionError):
        return
    assert text_for(fields).startswith(answer.text)
    assert answer.text == text_for(fields) or any(isinstance(one, dict) and "error" in one for one in answer.events)


@STREAM
def test_kv_whose_decoder_never_came_is_given_back(proxy: Proxy, engines: Engines, stream: bool) -> None:
    """There the prefiller holds it until a time-out of the engine, 480 s by default."""
    before = proxy.get("/instances").json["kv_ledger"]["totals"]
    engines.fault("decode", "status", status=403, count=100)
    assert proxy.post(CHAT, body_of(CHAT, stream=stream)).status == 403
    eventually(lambda: engines.state()["kv"]["outstanding"], "KV is still held")
    eventually(proxy.wrong, "the proxy is not idle")
    after = proxy.get("/instances").json["kv_ledger"]["totals"]
    assert engines.state()["kv"]["counts"]["released"] == after["reclaimed"] - before["reclaimed"] == 1
    assert after["orphaned"] == before["orphaned"]
    assert b'pd_proxy_kv_total{event="reclaimed"} %d.0' % after["reclaimed"] in proxy.get("/metrics").body
