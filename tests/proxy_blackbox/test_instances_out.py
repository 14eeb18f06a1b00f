"""Instances that go out and come back: by probes, by requests that fail; and what becomes of those who wait on them."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.proxy_blackbox.harness import CHAT, COMPLETIONS, Answer, Engines, Proxy, body_of, eventually, text_for

StartProxy = Callable[..., Proxy]
PROBES = "--health-interval-s", "0.2", "--health-timeout-s", "0.5", "--health-retry-interval-s", "0.1"
MANY_S = 30.0  # far less than the 600 s of a first token or the 300 s between two, far more than the probes need here
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
ROLES = pytest.mark.parametrize("role", ["prefill", "decode"])


def is_healthy(proxy: Proxy, port: int) -> bool:
    (found,) = [one for one in proxy.get("/instances").json["instances"] if one["address"].endswith(f":{port}")]
    return bool(found["healthy"])


def count_of(proxy: Proxy, leg: str, failure: str) -> int:
    lines = [line for line in proxy.get("/metrics").body.decode().splitlines() if "pd_proxy_retries_total" in line]
    return sum(int(float(one.split()[-1])) for one in lines if f'leg="{leg}"' in one and f'failure="{failure}"' in one)


def at_once(proxy: Proxy, path: str, asked: list[dict[str, Any]]) -> list[Answer | None]:
    """The answers to requests that run side by side; None for one that was broken off."""

    def post(fields: dict[str, Any]) -> Answer | None:
        try:
            return proxy.post(path, fields, MANY_S)
        except (http.client.IncompleteRead, ConnectionError):
            return None

    with ThreadPoolExecutor(len(asked)) as threads:
        return list(threads.map(post, asked))


@STREAM
@ROLES
def test_who_waits_on_a_frozen_instance_is_served_elsewhere(
    start_proxy: StartProxy, engines: Engines, role: str, stream: bool
) -> None:
    """A stopped process keeps its connections, and the kernel accepts new ones: only the probes can tell."""
    proxy = start_proxy(*PROBES)
    frozen = getattr(engines, role)[0]
    engines.act(frozen, "freeze")
    asked = [body_of(CHAT, f"number {number}", stream=stream) for number in range(4)]
    began = time.monotonic()
    answers = at_once(proxy, CHAT, asked)
    assert [(one.status, one.text) for one in answers if one] == [(200, text_for(fields)) for fields in asked]
    assert time.monotonic() - began < MANY_S
    assert count_of(proxy, role, "instance_out") >= 1
    assert not is_healthy(proxy, frozen)
    engines.act(frozen, "thaw")
    eventually(lambda: not is_healthy(proxy, frozen), "the instance is not back", 10.0)


def test_a_stream_of_a_decoder_that_freezes_ends(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy(*PROBES)
    asked = [body_of(CHAT, f"{n}", num_tokens=60, stream=True, mock={"interval_s": 0.05}) for n in range(4)]
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(at_once, proxy, CHAT, asked)
        eventually(lambda: engines.count("decode", "decodes") < 4, "not all streams began")
        time.sleep(0.3)
        engines.act(engines.decode[0], "freeze")
        answers = running.result(MANY_S)
    for fields, answer in zip(asked, answers, strict=True):
        if answer is not None:
            assert answer.text and text_for(fields).startswith(answer.text)
            told = any(isinstance(one, dict) and "error" in one for one in answer.events)
            assert told != (answer.events[-1] == "[DONE]" and answer.text == text_for(fields))
    assert count_of(proxy, "decode", "silent_mid_answer") >= 1
    engines.act(engines.decode[0], "thaw")


def test_an_instance_that_is_slow_at_probes_and_sends_bytes_is_alive(start_proxy: StartProxy, engines: Engines) -> None:
    """Under heavy load a probe may go unanswered: no healthy request must die of it."""
    proxy = start_proxy(*PROBES)
    busy = engines.decode[1]
    asked = [body_of(COMPLETIONS, f"{n}", num_tokens=100, stream=True, mock={"interval_s": 0.05}) for n in range(4)]
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(at_once, proxy, COMPLETIONS, asked)
        eventually(lambda: engines.count("decode", "decodes") < 4, "not all streams began")
        engines.act(busy, "mute")
        time.sleep(2.0)  # several probes in a row go unanswered
        assert is_healthy(proxy, busy)
        answers = running.result(MANY_S)
    assert [one.text for one in answers if one] == [text_for(fields) for fields in asked]
    eventually(lambda: is_healthy(proxy, busy), "silent and mute, and taken for well", 10.0)
    assert count_of(proxy, "decode", "silent_mid_answer") == 0


@STREAM
@ROLES
def test_an_instance_that_fails_at_requests_goes_out_and_is_tried_again(
    start_proxy: StartProxy, engines: Engines, role: str, stream: bool
) -> None:
    """Its probes are answered all the while: they prove that it can be reached, not that it works."""
    proxy = start_proxy(*PROBES, "--health-max-request-failures", "3")
    broken = getattr(engines, role)[0]
    engines.fault(broken, "status", status=500, count=100_000)
    deadline = time.monotonic() + MANY_S
    number = 0
    while is_healthy(proxy, broken):
        number += 1
        fields = body_of(CHAT, f"number {number}", stream=stream)
        answers = at_once(proxy, CHAT, [fields] * 2)
        assert [one.text for one in answers if one] == [text_for(fields)] * 2
        assert time.monotonic() < deadline
    assert count_of(proxy, role, "server_error") >= 3
    engines.reset()
    while not is_healthy(proxy, broken):  # comes back by a request that is let in as a trial
        assert proxy.post(CHAT, body_of(CHAT, stream=stream)).status == 200
        assert time.monotonic() < deadline
        time.sleep(0.05)


@ROLES
def test_an_instance_that_died_of_its_requests_is_back_with_its_restart(
    start_proxy: StartProxy, engines: Engines, role: str
) -> None:
    """Many requests fail at once where a process dies, and then its probes for as long as it starts."""
    proxy = start_proxy(*PROBES, "--health-max-request-failures", "2")
    died = getattr(engines, role)[0]
    engines.fault(died, "status", status=500, count=100_000)
    deadline = time.monotonic() + MANY_S
    while is_healthy(proxy, died):
        at_once(proxy, CHAT, [body_of(CHAT, f"at {time.monotonic()}")] * 2)
        assert time.monotonic() < deadline
    engines.stop(died)
    time.sleep(2)  # of probes that are refused: far more than the two that count
    engines.reset()
    engines.start(died)
    eventually(lambda: not is_healthy(proxy, died), "a probe was answered by another process", 5.0)
    assert proxy.post(CHAT, body_of(CHAT)).status == 200


@ROLES
def test_one_poisoned_request_takes_nobody_out(start_proxy: StartProxy, engines: Engines, role: str) -> None:
    proxy = start_proxy(*PROBES, "--health-max-request-failures", "2", "--max-retries", "8")
    engines.fault(role, "status", status=500, count=8, shared=True)
    assert proxy.post(CHAT, body_of(CHAT)).status == 500
    assert engines.count(role, "faults") == 8
    assert all(is_healthy(proxy, port) for port in getattr(engines, role))
    assert proxy.post(CHAT, body_of(CHAT)).status == 200


@STREAM
@pytest.mark.parametrize("where", ["prefill_s", "first_token_s"])
def test_a_request_has_a_limit_of_its_own(start_proxy: StartProxy, where: str, stream: bool) -> None:
    proxy = start_proxy("--total-timeout-s", "0.6")
    answer = proxy.post(CHAT, body_of(CHAT, stream=stream, mock={where: 3}))
    assert (answer.status, answer.error["type"]) == (504, "timeout")
    fields = body_of(CHAT, stream=stream)
    assert proxy.post(CHAT, fields).text == text_for(fields)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_has_it_too(start_proxy: StartProxy, path: str) -> None:
    proxy = start_proxy("--total-timeout-s", "0.6")
    fields = body_of(path, num_tokens=400, stream=True, mock={"interval_s": 0.02})
    answer = proxy.post(path, fields)
    assert answer.status == 200 and answer.text and text_for(fields).startswith(answer.text)
    assert answer.events[-1]["error"]["code"] == 504
