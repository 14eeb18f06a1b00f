"""A vLLM split in two answers like a whole one, holds nothing back, and survives what goes wrong between its halves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.vllm.servers import Ask, eventually, post
from tests.vllm.splits import (
    Split,
    nothing_held,
    prefill,
    prompt,
    same_answers_in_every_form,
    sidecar_is_replaced,
    used,
)

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_split_answers_what_the_unsplit_one_does(split: Split, chat: bool, stream: bool) -> None:
    same_answers_in_every_form(split, chat, stream, 100 * (2 * chat + stream))


def test_many_at_once(split: Split) -> None:
    asks = [Ask(prompt(10 + 25 * n, 1000 + n), chat=n % 2 == 1, stream=n % 3 == 0) for n in range(12)]
    with ThreadPoolExecutor(12) as pool:
        want = list(pool.map(lambda ask: ask.text(split.unsplit), asks))
        got = list(pool.map(lambda ask: ask.text(split.proxy), asks))
    assert got == want
    assert eventually(lambda: nothing_held(split))


def test_a_lease_is_read_once_and_a_failed_load_fails_its_request_only(split: Split) -> None:
    text = prompt(80, 2000)
    body = {**Ask(text).body(), "kv_transfer_params": prefill(split, text)}
    assert post(split.decoder, "/v1/completions", body)[0] == 200
    other = prompt(80, 2001)  # one the decoder has nothing of, with the lease that is used up
    stale = {**Ask(other).body(), "kv_transfer_params": prefill(split, other)}
    stale["kv_transfer_params"]["baton"]["token"] = "no such token"
    began = time.monotonic()
    assert post(split.decoder, "/v1/completions", stale)[0] == 500  # vLLM's kv_load_failure_policy "fail"
    assert time.monotonic() - began < 30
    assert Ask(other).text(split.proxy) == Ask(other).text(split.unsplit)
    assert eventually(lambda: nothing_held(split), 60)


def test_parameters_of_nobody_are_recomputed(split: Split) -> None:
    text = prompt(40, 2500)
    for params in ({"do_remote_prefill": True}, {"do_remote_prefill": True, "baton": {"version": 99}}):
        status, raw = post(split.decoder, "/v1/completions", {**Ask(text).body(), "kv_transfer_params": params})
        assert status == 200
        assert json.loads(raw)["choices"][0]["text"] == Ask(text).text(split.unsplit)


def test_kv_that_nobody_wants_is_released_at_once(split: Split) -> None:
    text = prompt(200, 3000)
    params = prefill(split, text)
    assert used(split.prefiller) > 0
    release = {**Ask(text, max_tokens=1).body(), "kv_transfer_params": {**params, "release_only": True}}
    assert post(split.decoder, "/v1/completions", release)[0] == 200
    assert eventually(lambda: nothing_held(split), 10)


def test_kv_that_nobody_fetches_is_freed_when_the_lease_ends(split: Split) -> None:
    prefill(split, prompt(200, 3500))
    assert used(split.prefiller) > 0
    assert eventually(lambda: nothing_held(split), 40)  # the lease is 20 s, and the prefiller is idle


def test_clients_that_leave_hold_nothing_back(split: Split) -> None:
    for delay_s in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8):
        body = json.dumps(Ask(prompt(300, int(4000 + 100 * delay_s)), stream=True, max_tokens=500).body()).encode()
        with socket.create_connection(("127.0.0.1", split.proxy.port)) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            time.sleep(delay_s)
    assert eventually(lambda: nothing_held(split), 60)
    ask = Ask(prompt(100, 4999))
    assert ask.text(split.proxy) == ask.text(split.unsplit)


@pytest.mark.parametrize("whose", ["prefiller", "decoder"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_a_sidecar_that_dies_or_hangs_is_replaced(split: Split, whose: str, number: signal.Signals) -> None:
    prefill(split, prompt(50, 5000))  # void with the prefiller's sidecar, else it ends with its lease
    sidecar_is_replaced(split, whose, number, 5100)


def test_a_prefiller_that_dies_leaves_clean_errors(split: Split) -> None:
    """Last: nothing prefills after it."""
    text = prompt(90, 6000)
    body = {**Ask(text).body(), "kv_transfer_params": prefill(split, text)}
    sidecar = split.prefiller.sidecar_pid()
    split.prefiller.kill()
    with contextlib.suppress(ProcessLookupError):
        os.kill(sidecar, signal.SIGKILL)  # else it may hand over what it holds before it follows its engine
    began = time.monotonic()
    assert post(split.decoder, "/v1/completions", body)[0] == 500
    status, raw = post(split.proxy, "/v1/completions", Ask(text).body())
    assert status >= 500 and "error" in json.loads(raw)
    assert time.monotonic() - began < 60
    assert Ask(text).text(split.decoder) == Ask(text).text(split.unsplit)  # the decoder serves on
    assert eventually(lambda: used(split.decoder) == 0)
