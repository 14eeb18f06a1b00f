"""The access log as a process writes it: one line a request, of either form, or none."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from typing import Any

import pytest

from proxy.access_log import FIELDS
from tests.proxy_blackbox.harness import (
    CHAT,
    COMPLETIONS,
    HOST,
    Engines,
    Proxy,
    body_of,
    connected,
    eventually,
    read_answer,
)


def lines_of(proxy: Proxy, num: int) -> list[dict[str, Any]]:
    """The first `num` lines, as words (text) or values (JSON)."""

    def found() -> list[dict[str, Any]]:
        output = proxy.process.output.splitlines()
        told = [json.loads(line) for line in output if line.startswith("{")]
        words = [line.partition(" proxy.access ")[2] for line in output if " proxy.access " in line]
        return told + [dict(re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)', line)) for line in words]

    eventually(lambda: len(found()) < num, "the lines are not there")
    assert len(found()) == num
    return found()


@pytest.mark.parametrize("form", ["text", "json"])
def test_one_line_a_request(form: str, start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy("--access-log", form)
    proxy.post(CHAT, body_of(CHAT, num_tokens=6, stream=True), X_Request_Id="first")
    proxy.post(COMPLETIONS, body_of(COMPLETIONS, num_tokens=6), X_Request_Id="second")
    proxy.post(COMPLETIONS, b"{", X_Request_Id="third")
    proxy.post("/tokenize", {"model": "mock", "prompt": "x"}, X_Request_Id="fourth")
    with connected(proxy.port) as sock:
        sock.sendall(b"GARBAGE\r\n\r\n")
        assert read_answer(sock).status == 400
    proxy.get("/health")  # the proxy's own routes write none
    lines = lines_of(proxy, 5)
    assert all(tuple(name for name in line if name not in ("time", "event")) == FIELDS for line in lines)
    stream, whole, third, passed, none = lines
    assert [str(line["request_id"]) for line in lines[:4]] == ["first", "second", "third", "fourth"]
    assert [line["route"] for line in lines] == ["chat", "completions", "completions", "passed", "none"]
    assert [int(line["status"]) for line in lines] == [200, 200, 400, 200, 400]
    assert [line["outcome"] for line in lines] == ["ok", "ok", "refused", "ok", "refused"]
    assert stream["model"] == whole["model"] == "mock"
    for line in (stream, whole):
        assert int(line["output_tokens"]) >= 6 and int(line["prompt_tokens"]) > 0
        assert line["prefiller"] in {f"{HOST}:{port}" for port in engines.prefill}
        assert line["decoder"] in {f"{HOST}:{port}" for port in engines.decode}
        assert line["prefill_choice"] == line["decode_choice"] == "least_load"
        assert all(
            float(line[f"{role}_{one}_s"]) >= 0 for role in ("prefill", "decode") for one in ("wait", "next_wait")
        )
        assert 0 <= float(line["queue_s"]) + float(line["prefill_s"]) <= float(line["e2e_s"])
    missing = "-" if form == "text" else None
    assert float(stream["handoff_s"]) <= float(stream["ttft_s"]) <= float(stream["e2e_s"])
    assert whole["handoff_s"] == whole["ttft_s"] == third["model"] == passed["prefiller"] == none["e2e_s"] == missing


USAGE = {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize("flags", [[], ["--max-continuations", "0"], ["--max-continuation-bytes", "600"]])
@pytest.mark.parametrize("interval_s", [0, 0.01], ids=["at once", "paced"])
def test_output_tokens_of_a_stream_are_those_the_engine_counts(
    start_proxy: Callable[..., Proxy], engines: Engines, flags: list[str], interval_s: float
) -> None:
    proxy = start_proxy("--access-log", "json", *flags)
    mock = {"interval_s": interval_s}
    for path in (CHAT, COMPLETIONS):
        proxy.post(path, body_of(path, num_tokens=13, stream=True, mock=mock, **USAGE))
    proxy.post("/v1/messages", {**body_of(CHAT, num_tokens=13, stream=True)})
    proxy.post("/v1/responses", {"model": "mock", "input": "Say it", "max_output_tokens": 13, "stream": True})
    assert [line["output_tokens"] for line in lines_of(proxy, 4)] == [13] * 4


def test_output_tokens_where_no_usage_is_asked_for(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy("--access-log", "json")
    mock = {"interval_s": 0.005}
    proxy.post(COMPLETIONS, body_of(COMPLETIONS, num_tokens=13, stream=True, mock=mock, return_token_ids=True))
    proxy.post(COMPLETIONS, body_of(COMPLETIONS, num_tokens=13, stream=True, return_token_ids=True))
    proxy.post(COMPLETIONS, body_of(COMPLETIONS, num_tokens=13, stream=True, mock=mock))
    counted, at_once, events = (line["output_tokens"] for line in lines_of(proxy, 3))
    assert (counted, at_once) == (13, 13) and 8 <= events <= 20


def test_output_tokens_of_what_was_gone_on_with_or_divided(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy("--access-log", "json")
    engines.fault("decode", "reset_mid", shared=True, after=3)
    proxy.post(CHAT, body_of(CHAT, num_tokens=13, stream=True, mock={"interval_s": 0.01}, **USAGE))
    proxy.post(CHAT, body_of(CHAT, num_tokens=13, n=2, stream=True, **USAGE))
    proxy.post(CHAT, body_of(CHAT, num_tokens=13, n=2))
    lines = lines_of(proxy, 7)
    assert [line["output_tokens"] for line in lines if line["route"] == "chat"] == [13, 26, 26]
    assert [line["output_tokens"] for line in lines if line["route"] == "child"] == [13] * 4


def test_retries_and_what_is_left_of_a_failure(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy("--access-log", "json", "--policy", "round_robin")
    engines.fault("prefill", "status", status=500)  # one of each prefiller
    assert proxy.post(CHAT, body_of(CHAT)).status == 200
    engines.fault("prefill", "status", status=400)
    assert proxy.post(CHAT, body_of(CHAT)).status == 400
    retried, refused = lines_of(proxy, 2)
    assert (retried["retries"], retried["outcome"], retried["prefill_choice"]) == (2, "ok", "round_robin")
    assert (refused["retries"], refused["outcome"], refused["decode_choice"]) == (0, "client_error", "round_robin")


@pytest.mark.parametrize(
    ("flags", "writes"),
    [
        (["--access-log", "off"], False),
        (["--log-level", "WARNING"], False),
        (["--log-level", "WARNING", "--access-log", "text"], True),
    ],
)
def test_who_writes_none(flags: list[str], writes: bool, start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy(*flags)
    assert proxy.post(CHAT, body_of(CHAT)).status == 200
    os.kill(proxy.process.popen.pid, signal.SIGTERM)  # which writes what is held
    assert proxy.process.popen.wait(15) == 0
    assert ("request_id=" in proxy.process.output) is writes


def test_a_model_cannot_forge_a_line(start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy()
    proxy.post(CHAT, body_of(CHAT, model='x"\nt INFO proxy.access request_id=forged outcome=ok'))
    (line,) = lines_of(proxy, 1)
    assert line["request_id"] != "forged" and line["model"].startswith('"x\\"\\n')
