"""A vLLM split in two by layerwise push: the decoder goes first, and KV comes while its prompt is computed."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vllm.servers import Ask, Server, baton, eventually, post, proxy_server, running, vllm_server
from tests.vllm.splits import (
    Split,
    by_source,
    nothing_held,
    prefill,
    prefiller_with_tier,
    prompt,
    same_answers_in_every_form,
    sidecar_is_replaced,
    tier_is_used,
)

pytestmark = pytest.mark.timeout(900)

PUSH_TIMEOUT_S = 12.0
CHUNK_TOKENS = 128


@pytest.fixture(scope="module")
def pushed(model: Path, unsplit: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Split]:
    """A prefiller that computes long prompts in chunks, and finds prefixes in its cache, as the decoder does."""
    logs = tmp_path_factory.mktemp("logs")
    extra = {"contract": "layerwise", "push_timeout_s": PUSH_TIMEOUT_S, "log_level": "DEBUG"}
    chunks = ("--max-num-batched-tokens", str(CHUNK_TOKENS))
    producer, consumer = baton("kv_producer", lease_s=20, **extra), baton("kv_consumer", **extra)
    prefiller = vllm_server("push-prefiller", model, logs, producer, *chunks, VLLM_SERVER_DEV_MODE="1")
    decoder = vllm_server("push-decoder", model, logs, consumer, VLLM_SERVER_DEV_MODE="1")  # its cache can be reset
    proxy = proxy_server([prefiller], [decoder], logs, "--contract", "layerwise")
    with running(prefiller, decoder), running(proxy):
        yield Split(prefiller, decoder, proxy, unsplit)


def loaded(split: Split) -> float:
    return by_source(split.decoder, "external_kv_transfer")


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_it_answers_what_the_unsplit_one_does(pushed: Split, chat: bool, stream: bool) -> None:
    same_answers_in_every_form(pushed, chat, stream, 20_000 + 100 * (2 * chat + stream))


def test_many_at_once_share_chunks(pushed: Split) -> None:
    asks = [Ask(prompt(10 + 25 * n, 21_000 + n), chat=n % 2 == 1, stream=n % 3 == 0) for n in range(12)]
    with ThreadPoolExecutor(12) as pool:
        want = list(pool.map(lambda ask: ask.text(pushed.unsplit), asks))
        got = list(pool.map(lambda ask: ask.text(pushed.proxy), asks))
    assert got == want
    assert eventually(lambda: nothing_held(pushed))


def test_what_either_half_has_in_its_cache_is_not_moved_or_not_computed(pushed: Split) -> None:
    text = prompt(150, 22_000)
    want = Ask(text).text(pushed.unsplit)
    assert Ask(text).text(pushed.proxy) == want
    before = loaded(pushed)
    longer = f"{text} {prompt(60, 22_001)}"
    assert Ask(longer).text(pushed.proxy) == Ask(longer).text(pushed.unsplit)
    assert 0 < loaded(pushed) - before < 150  # only what the decoder lacks
    assert post(pushed.decoder, "/reset_prefix_cache", {})[0] == 200
    assert Ask(longer).text(pushed.proxy) == Ask(longer).text(pushed.unsplit)  # out of the prefiller's cache
    assert eventually(lambda: nothing_held(pushed))


def test_a_prefill_that_is_preempted_is_pushed_again_from_its_other_blocks(pushed: Split) -> None:
    before = pushed.prefiller.log.read_text().count("push_taken_back")
    for number in range(6):
        ask = Ask(prompt(1100, 22_500 + number))
        want = ask.text(pushed.unsplit)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask.text, pushed.proxy)
            for _ in range(3):
                time.sleep(0.05 * (number + 1))
                post(pushed.prefiller, "/reset_prefix_cache?reset_running_requests=true", {})
            assert answer.result() == want
    assert pushed.prefiller.log.read_text().count("push_taken_back") > before
    assert eventually(lambda: nothing_held(pushed))


def test_the_prompts_of_a_list_are_pushed_together(pushed: Split) -> None:
    texts = [prompt(100, 23_000), prompt(90, 23_001), "river"]
    for _ in range(2):  # the second time one of them is in the decoder's cache
        body = {"model": "m", "prompt": texts, "temperature": 0, "max_tokens": 8}
        answers = [json.loads(post(server, "/v1/completions", body)[1]) for server in (pushed.proxy, pushed.unsplit)]
        got, want = ([choice["text"] for choice in answer["choices"]] for answer in answers)
        assert got == want
        texts[1] = prompt(90, 23_002)
    assert eventually(lambda: nothing_held(pushed))


def test_clients_that_leave_hold_nothing_back(pushed: Split) -> None:
    for delay_s in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8):
        asked = Ask(prompt(600, int(24_000 + 100 * delay_s)), stream=True, max_tokens=500).body()
        body = json.dumps(asked).encode()
        with socket.create_connection(("127.0.0.1", pushed.proxy.port)) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            time.sleep(delay_s)
    assert eventually(lambda: nothing_held(pushed), 60)
    ask = Ask(prompt(100, 24_999))
    assert ask.text(pushed.proxy) == ask.text(pushed.unsplit)


def test_a_metaserver_that_is_not_there_fails_the_request_soon(pushed: Split) -> None:
    text = prompt(80, 25_000)
    params = {"do_remote_prefill": True, "metaserver": "http://127.0.0.1:9/v1/metaserver"}
    began = time.monotonic()
    assert post(pushed.decoder, "/v1/completions", {**Ask(text).body(), "kv_transfer_params": params})[0] == 500
    assert time.monotonic() - began < PUSH_TIMEOUT_S
    assert Ask(text).text(pushed.proxy) == Ask(text).text(pushed.unsplit)
    assert eventually(lambda: nothing_held(pushed))


def test_kv_is_pulled_by_the_same_engines(pushed: Split) -> None:
    text = prompt(80, 26_000)
    before = loaded(pushed)
    body = {**Ask(text).body(), "kv_transfer_params": prefill(pushed, text)}
    status, raw = post(pushed.decoder, "/v1/completions", body)
    assert status == 200 and json.loads(raw)["choices"][0]["text"] == Ask(text).text(pushed.unsplit)
    assert loaded(pushed) > before
    assert eventually(lambda: nothing_held(pushed))


@pytest.mark.parametrize("whose", ["prefiller", "decoder"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_a_sidecar_that_dies_or_hangs_is_replaced(pushed: Split, whose: str, number: signal.Signals) -> None:
    sidecar_is_replaced(pushed, whose, number, 27_000)


def test_beside_a_prefix_tier_in_a_multi_connector(pushed: Split, model: Path, tmp_path: Path) -> None:
    """What vLLM's ExampleConnector loads within a step is pushed once vLLM knows that it was loaded."""
    prefiller = prefiller_with_tier("push-multi", model, tmp_path, contract="layerwise")
    proxy = proxy_server([prefiller], [pushed.decoder], tmp_path, "--contract", "layerwise")
    with running(prefiller), running(proxy):
        tier_is_used(Split(prefiller, pushed.decoder, proxy, pushed.unsplit), 29_000)


def test_small_pools_make_prompts_wait_and_none_is_lost(unsplit: Server, model: Path, tmp_path: Path) -> None:
    """Blocks of either half are held for the other one's turn: nothing may wait for ever."""
    small = ("--num-gpu-blocks-override", "40", "--max-num-batched-tokens", str(CHUNK_TOKENS), "--max-model-len", "800")
    extra = {"contract": "layerwise", "push_timeout_s": 60.0}
    prefiller = vllm_server("small-prefiller", model, tmp_path, baton("kv_producer", **extra), *small)
    decoder = vllm_server("small-decoder", model, tmp_path, baton("kv_consumer", **extra), *small)
    proxy = proxy_server([prefiller], [decoder], tmp_path, "--contract", "layerwise")
    asks = [Ask(prompt(250 + 5 * n, 28_000 + n), chat=n % 2 == 1, max_tokens=40) for n in range(16)]
    with running(prefiller, decoder), running(proxy), ThreadPoolExecutor(16) as pool:
        want = list(pool.map(lambda ask: ask.text(unsplit), asks))
        assert list(pool.map(lambda ask: ask.text(proxy), asks)) == want
        split = Split(prefiller, decoder, proxy, unsplit)
        assert loaded(split) > 0 and eventually(lambda: nothing_held(split))
