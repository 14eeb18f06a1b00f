"""The fault matrix: {prefiller, decoder} x what can happen to it x {streamed, whole}.

Whatever an engine does, a client gets the right text or an error it can tell: never a wrong text, never a 200 without
an answer. What can be retried invisibly is (design.md, "Failure has a table"). The `proxy` fixture then checks that
loads and both KV ledgers are back to nothing within 5 seconds.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections.abc import Callable, Iterator

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
    settled,
    text_for,
)

BOTH_ENDS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
SHORT_TIMEOUTS = (
    *("--connect-timeout-s", "1", "--prefill-timeout-s", "1", "--first-token-timeout-s", "1"),
    *("--between-tokens-timeout-s", "1", "--health-retry-interval-s", "0.1"),
    *("--health-max-request-failures", "1000"),  # the faults of one test are no evidence in the next
)


@pytest.fixture(scope="module")
def _impatient(fleet: Engines) -> Iterator[Proxy]:
    started = Proxy(fleet, *SHORT_TIMEOUTS)
    yield started
    started.stop()


@pytest.fixture
def impatient(_impatient: Proxy, engines: Engines) -> Iterator[Proxy]:
    """A proxy with short timeouts that the tests of this file share."""
    yield _impatient
    settled(_impatient, engines)


def retried(proxy: Proxy, path: str, stream: bool) -> Answer:
    """The client must not notice."""
    fields = body_of(path, num_tokens=9, stream=stream)
    answer = proxy.post(path, fields)
    assert (answer.status, answer.text) == (200, text_for(fields))
    if stream:
        assert answer.events[-1] == "[DONE]"
        ids = {event["id"] for event in answer.events[:-1]}
        assert len(ids) == 1
    return answer


def given_up(proxy: Proxy, path: str, stream: bool, *statuses: int) -> Answer:
    """Every attempt failed: an error status with an OpenAI error, before any byte of an answer."""
    answer = proxy.post(path, body_of(path, stream=stream))
    assert answer.status in statuses, (answer.status, answer.body)
    assert answer.error
    return answer


def _once(engines: Engines, role: str, kind: str, **more: object) -> None:
    """The fault hits whichever instance of the role is asked first, and nobody after it."""
    engines.fault(role, kind, shared=True, **more)


BEFORE_ANSWER = ["reset_before_head", "close_before_head", "hang_before_head", "garbage"]


@BOTH_ENDS
@pytest.mark.parametrize("kind", [*BEFORE_ANSWER, "bad_json", "reset_mid", "close_mid", "hang_mid", "error_event"])
def test_one_prefiller_fails_and_another_is_asked(impatient: Proxy, engines: Engines, kind: str, stream: bool) -> None:
    _once(engines, "prefill", kind)
    retried(impatient, CHAT, stream)
    assert engines.count("prefill", "faults") == 1


@BOTH_ENDS
@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_prefillers_5xx_is_retried_elsewhere(impatient: Proxy, engines: Engines, status: int, stream: bool) -> None:
    _once(engines, "prefill", "status", status=status)
    retried(impatient, COMPLETIONS, stream)
    assert engines.count("prefill", "requests") == 2
    assert [state["counts"].get("requests") for state in engines.state()["instances"][:2]] == [1, 1]


def test_a_prefiller_that_hands_out_no_kv_leaves_the_work_to_the_decoder(impatient: Proxy, engines: Engines) -> None:
    _once(engines, "prefill", "no_kv")
    retried(impatient, CHAT, True)
    assert engines.count("decode", "recomputed") == 1


@BOTH_ENDS
@pytest.mark.parametrize("kind", [*BEFORE_ANSWER, "error_event"])
@pytest.mark.parametrize("consumed", [False, True])
def test_one_decoder_fails_before_its_first_event(
    impatient: Proxy, engines: Engines, kind: str, consumed: bool, stream: bool
) -> None:
    _once(engines, "decode", kind, consume=consumed)
    retried(impatient, CHAT, stream)
    assert engines.count("decode", "faults") == 1


@BOTH_ENDS
@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("consumed", [False, True])
def test_a_decoders_5xx_is_retried(
    impatient: Proxy, engines: Engines, status: int, consumed: bool, stream: bool
) -> None:
    _once(engines, "decode", "status", status=status, consume=consumed)
    retried(impatient, COMPLETIONS, stream)
    assert engines.count("decode", "decodes") >= 1


@BOTH_ENDS
def test_kv_that_the_decoder_could_not_load_is_prefilled_again(
    impatient: Proxy, engines: Engines, stream: bool
) -> None:
    """As our engine says it: 503 kv_load_error, the lease gone."""
    _once(engines, "decode", "status", status=503, message="kv_load_error", consume=True)
    retried(impatient, CHAT, stream)
    assert engines.count("prefill", "prefills") == 2


@pytest.mark.parametrize("kind", ["reset_mid", "close_mid", "hang_mid"])
def test_a_whole_answer_cut_short_is_retried(impatient: Proxy, engines: Engines, kind: str) -> None:
    """Nothing has reached the client yet."""
    _once(engines, "decode", kind)
    retried(impatient, CHAT, False)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("kind", ["reset_mid", "close_mid", "hang_mid", "error_event_mid"])
def test_a_stream_that_breaks_is_not_ended_as_if_all_were_there(
    impatient: Proxy, engines: Engines, kind: str, path: str
) -> None:
    """Either it is continued, exactly, or the client is told by an error event or a broken connection."""
    _once(engines, "decode", kind, after=4)
    fields = body_of(path, num_tokens=9, stream=True)
    expected = text_for(fields)
    try:
        answer = impatient.post(path, fields)
    except (http.client.IncompleteRead, ConnectionError):
        return
    assert answer.status == 200 and answer.text and expected.startswith(answer.text)
    told = any(isinstance(event, dict) and "error" in event for event in answer.events)
    assert told or (answer.text == expected and answer.events[-1] == "[DONE]"), answer.body
    assert not (told and kind != "error_event_mid" and answer.events[-1] == "[DONE]")


@BOTH_ENDS
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("kind", "statuses"),
    [
        ("reset_before_head", (502, 503)),
        ("close_before_head", (502, 503)),
        ("garbage", (502,)),
        ("hang_before_head", (504,)),
        ("error_event", (500, 502, 503)),
    ],
)
def test_all_instances_of_a_role_fail(
    impatient: Proxy, engines: Engines, role: str, kind: str, statuses: tuple[int, ...], stream: bool
) -> None:
    engines.fault(role, kind, count=100)
    given_up(impatient, CHAT, stream, *statuses)
    assert engines.count(role, "faults") <= 4, "--max-retries bounds the attempts"


@BOTH_ENDS
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_error_status_of_all_instances_is_passed_on(
    impatient: Proxy, engines: Engines, role: str, stream: bool
) -> None:
    engines.fault(role, "status", status=503, count=100, message="overloaded")
    assert given_up(impatient, CHAT, stream, 503).error["message"] == "overloaded"


@BOTH_ENDS
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_one_instance_is_down(impatient: Proxy, engines: Engines, role: str, stream: bool) -> None:
    engines.stop(getattr(engines, role)[0])
    for _ in range(3):
        retried(impatient, COMPLETIONS, stream)


@BOTH_ENDS
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_all_of_a_role_are_down_and_come_back(impatient: Proxy, engines: Engines, role: str, stream: bool) -> None:
    ports = getattr(engines, role)
    for port in ports:
        engines.stop(port)
    given_up(impatient, CHAT, stream, 502, 503)
    for port in ports:
        engines.start(port)
    deadline = time.monotonic() + 5
    while impatient.post(CHAT, body_of(CHAT)).status != 200:
        assert time.monotonic() < deadline, "not served 5 s after the engines came back"
        time.sleep(0.05)
    retried(impatient, CHAT, stream)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_engine_restarted_on_its_port_is_used_at_once(impatient: Proxy, engines: Engines, role: str) -> None:
    """Idle connections of the old process are stale: that costs no client an error."""
    for number in range(4):
        retried(impatient, CHAT, bool(number % 2))
    for port in getattr(engines, role):
        engines.stop(port)
        engines.start(port)
    for number in range(4):
        retried(impatient, CHAT, bool(number % 2))


def test_a_proxy_that_stood_still_reads_what_came_before_it_gives_up(
    start_proxy: Callable[..., Proxy], engines: Engines
) -> None:
    """A machine that was suspended, or a container out of its share: what came meanwhile is not late."""
    proxy = start_proxy("--prefill-timeout-s", "1", "--first-token-timeout-s", "1")
    fields = body_of(CHAT, mock={"prefill_s": 0.5})
    with connected(proxy.port) as sock:
        sock.sendall(raw_post(CHAT, json.dumps(fields).encode()))
        eventually(lambda: not engines.count("prefill", "prefills"), "no prefill began")
        os.kill(proxy.process.popen.pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(proxy.process.popen.pid, signal.SIGCONT)
        answer = read_answer(sock)
    assert (answer.status, answer.text) == (200, text_for(fields))
    assert engines.count("prefill", "prefills") == 1 and b"pd_proxy_retries_total{" not in proxy.get("/metrics").body


def test_without_leases_kv_is_never_used_twice(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    """A NIXL decoder reads what was freed, without any check (kv-contracts 2.1): the proxy must prefill again."""
    proxy = start_proxy(*SHORT_TIMEOUTS)
    for kind in ("reset_before_head", "close_before_head", "error_event", "status", "hang_before_head"):
        engines.reset()
        engines.configure(flavour="nixl")
        _once(engines, "decode", kind, consume=True)
        retried(proxy, CHAT, True)
        assert not engines.state()["kv"]["violations"], kind
