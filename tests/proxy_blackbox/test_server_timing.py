"""`Server-Timing`: who asks is told where the time went; who doesn't is told nothing, and engines never hear of it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.proxy_blackbox.harness import CHAT, HOST, Answer, Engines, Proxy, body_of

ASKED = {"X_Server_Timing": "1"}
PACED = {"prefill_s": 0.2, "first_token_s": 0.1}


def durations(answer: Answer) -> dict[str, float]:
    """Milliseconds by name."""
    found = {}
    for one in answer.headers["server-timing"].split(", "):
        name, *rest = one.split(";")
        assert re.fullmatch(r"dur=\d+\.\d", rest[-1]), one
        found[name] = float(rest[-1].removeprefix("dur="))
    return found


def test_a_stream_and_a_whole_answer(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    engines.configure(**PACED)
    proxy = start_proxy()
    told = durations(proxy.post(CHAT, body_of(CHAT, stream=True), **ASKED))
    assert list(told) == ["queue", "prefill", "handoff", "ttft"]
    assert told["prefill"] >= 190 and told["handoff"] >= 90
    assert told["ttft"] == pytest.approx(told["queue"] + told["prefill"] + told["handoff"], abs=0.3)
    told = durations(proxy.post(CHAT, body_of(CHAT), **ASKED))
    assert list(told) == ["queue", "prefill", "decode", "total"]
    assert told["total"] >= told["prefill"] + told["decode"] - 0.3 >= 280


def test_who_does_not_ask_is_told_nothing_and_engines_never_hear_of_it(proxy: Proxy, engines: Engines) -> None:
    assert "server-timing" not in proxy.post(CHAT, body_of(CHAT)).headers
    assert "server-timing" not in proxy.post(CHAT, body_of(CHAT, stream=True), X_Server_Timing="0").headers
    answer = proxy.post(CHAT, body_of(CHAT), **ASKED)
    assert HOST not in answer.headers["server-timing"]
    heard = [one["headers"] for role in ("prefill", "decode") for one in engines.requests(role)]
    assert heard and not [headers for headers in heard if "x-server-timing" in headers]


@pytest.mark.parametrize(("when", "unasked", "asked"), [("off", False, False), ("always", True, True)])
def test_the_operator_decides(when: str, unasked: bool, asked: bool, start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy("--server-timing", when)
    for stream in (False, True):
        fields = body_of(CHAT, stream=stream)
        assert ("server-timing" in proxy.post(CHAT, fields).headers) is unasked
        assert ("server-timing" in proxy.post(CHAT, fields, **ASKED).headers) is asked


def test_instances_are_named_where_that_is_allowed(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy("--server-timing-instances")
    said = proxy.post(CHAT, body_of(CHAT, stream=True), **ASKED).headers["server-timing"]
    named = re.findall(r'(\w+);desc="127\.0\.0\.1:(\d+)"', said)
    assert [name for name, _ in named] == ["prefill", "handoff"]
    assert int(named[0][1]) in engines.prefill and int(named[1][1]) in engines.decode


def test_errors_and_divided_requests(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy()
    refused = proxy.post(CHAT, b"{", **ASKED)
    assert refused.status == 400 and list(durations(refused)) == ["total"]
    engines.fault("prefill", "status", status=422)
    passed_on = proxy.post(CHAT, body_of(CHAT), **ASKED)
    assert passed_on.status == 422 and list(durations(passed_on)) == ["queue", "total"]
    engines.reset()
    for stream in (False, True):
        divided = proxy.post(CHAT, body_of(CHAT, n=2, stream=stream), **ASKED)
        assert divided.status == 200 and {"queue", "prefill"} < set(durations(divided))
