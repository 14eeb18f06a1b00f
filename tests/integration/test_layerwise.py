"""What only the layerwise contract has: decoders' caches, lists joined at the metaserver, and pushes that fail."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.integration.deployment import Deployment, free_port, get_json, metric
from tests.integration.greedy import ask, prompts

LAYERWISE = ["--contract", "layerwise"]
SOURCE = "vllm:prompt_tokens_by_source_total"
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def split(tiny_model: Path) -> Iterator[Deployment]:
    engine_args = ["--kv-push-timeout-s", "4"]
    with Deployment(tiny_model, engine_args=engine_args, proxy_args=LAYERWISE) as deployment:
        yield deployment


async def complete(url: str, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    fields = {"model": "tiny", "max_tokens": 8, "temperature": 0, "return_token_ids": True, **body}
    timeout = aiohttp.ClientTimeout(total=60)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(url + COMPLETIONS, json=fields, headers=headers) as response,
    ):
        return response.status, json.loads(await response.read())


def tokens(split: Deployment, source: str) -> float:
    return metric(split.decoders[0].url, SOURCE, source=source)


def moved(split: Deployment) -> float:
    return metric(split.decoders[0].sidecar_url, "baton_sidecar_pull_blocks_total")


async def test_a_decoder_asks_for_the_blocks_it_misses_and_for_nothing_it_has(split: Deployment) -> None:
    prompt = [7 + index % 300 for index in range(129)]
    hits, blocks = tokens(split, "local_cache_hit"), moved(split)
    _, whole = await complete(split.url, {"prompt": prompt})
    assert (moved(split) - blocks, tokens(split, "local_cache_hit") - hits) == (8, 0)
    _, longer = await complete(split.url, {"prompt": [*prompt[:100], *range(300, 340)]})
    assert moved(split) - blocks == 8 + 3  # of nine blocks six were there
    assert tokens(split, "local_cache_hit") - hits == 96
    _, again = await complete(split.url, {"prompt": prompt})
    assert moved(split) - blocks == 8 + 3  # all of it was there: nobody was asked
    assert again["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"]
    assert longer["choices"][0]["token_ids"]
    assert split.settles(within_s=5) == {}


async def test_a_list_of_which_some_is_there(split: Deployment) -> None:
    """A prompt that is in the decoder's cache is posted too, or the others would wait for it for ever."""
    known, fresh = [11 + index % 200 for index in range(65)], [200 - index % 150 for index in range(70)]
    _, alone = await complete(split.url, {"prompt": known})
    status, joined = await complete(split.url, {"prompt": [known, fresh, [5], known]})
    assert status == 200 and len(joined["choices"]) == 4
    assert joined["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"] == joined["choices"][3]["token_ids"]
    assert split.settles(within_s=5) == {}


@asynccontextmanager
async def metaserver(status: int) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """One that answers every call with `status` and has nothing prefilled."""
    called: list[dict[str, Any]] = []

    async def answer(request: web.Request) -> web.Response:
        called.append(await request.json())
        return web.Response(status=status, text="no")

    application = web.Application()
    application.router.add_post("/v1/metaserver", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}/v1/metaserver", called
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("status", [404, 502])
async def test_a_metaserver_that_refuses_fails_the_request_at_once(split: Deployment, status: int) -> None:
    async with metaserver(status) as (url, called):
        params = {"do_remote_prefill": True, "do_remote_decode": False, "metaserver": url}
        body = {"prompt": [3, 4, 5] * (20 + status), "kv_transfer_params": params, "max_tokens": 1}
        answered, error = await complete(split.decoders[0].url, body, **{"X-Request-Id": f"m{status}"})
    assert answered == 503 and f"answered {status}" in error["error"]["message"]
    (call,) = called
    assert call["request_id"] == f"cmpl-m{status}-0" and call["do_remote_decode"] is True
    assert call["baton"]["landing_id"] and call["remote_engine_id"] == "decode0"
    assert split.settles(within_s=5) == {}


async def test_nobody_prefills_or_nobody_answers(split: Deployment) -> None:
    """A decoder that waits in vain fails its request in time, and leaves nothing."""
    async with metaserver(200) as (url, _):
        params = {"do_remote_prefill": True, "do_remote_decode": False, "metaserver": url}
        answered, error = await complete(split.decoders[0].url, {"prompt": [9] * 50, "kv_transfer_params": params})
        assert answered == 503 and "timeout" in error["error"]["message"]
    answered, error = await complete(split.decoders[0].url, {"prompt": [9] * 51, "kv_transfer_params": params})
    assert answered == 503 and "cannot be reached" in error["error"]["message"]
    answered, error = await complete(
        split.decoders[0].url, {"prompt": [9] * 52, "kv_transfer_params": params | {"metaserver": "nonsense"}}
    )
    assert answered == 400 and error["error"]["param"] == "kv_transfer_params.metaserver"
    assert split.settles(within_s=5) == {}


async def test_a_prefiller_refuses_a_stale_landing(split: Deployment) -> None:
    """A landing that has ended takes nothing, and costs its prefiller nothing that lasts."""
    prompt = [21] * 60
    async with metaserver(404) as (url, called):
        params = {"do_remote_prefill": True, "do_remote_decode": False, "metaserver": url}
        await complete(split.decoders[0].url, {"prompt": prompt, "kv_transfer_params": params})
    before = moved(split)
    answered, _ = await complete(split.prefillers[0].url, {"prompt": prompt, "kv_transfer_params": called[0]})
    assert answered == 200 and moved(split) == before
    forged = json.loads(json.dumps(called[0]))
    forged["baton"]["token"] = "0" * 32
    answered, _ = await complete(split.prefillers[0].url, {"prompt": prompt, "kv_transfer_params": forged})
    assert answered in (200, 503) and moved(split) == before
    wrong = json.loads(json.dumps(called[0]))
    wrong["baton"]["num_tokens"] = 7
    answered, error = await complete(split.prefillers[0].url, {"prompt": prompt, "kv_transfer_params": wrong})
    assert answered == 400 and "num_tokens" in error["error"]["message"]
    assert split.settles(within_s=5) == {}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", ["fail", "recompute"])
async def test_lists_that_do_not_fit_at_once(tiny_model: Path, policy: str) -> None:
    """Some lists are larger than half of the decoder's pool: they take turns. One is larger than all of it."""
    decode_args = ["--num-blocks", "16", "--no-enable-prefix-caching", "--kv-load-failure-policy", policy]
    lists = [[[10 * one + k + i % 3 for i in range(70)] for k in (0, 5)] for one in range(4)]
    long = [[7 + k + i % 5 for i in range(70)] for k in range(4)]
    with Deployment(tiny_model, decode_args=decode_args, proxy_args=LAYERWISE) as split:
        answers = await asyncio.gather(*(complete(split.url, {"prompt": prompts}) for prompts in lists))
        assert [status for status, _ in answers] == [200] * 4
        assert moved(split) == 4 * 2 * 5  # none of it was computed here
        began = time.monotonic()
        status, answer = await complete(split.url, {"prompt": long})
        assert time.monotonic() - began < 60, "that is the time-out of a push"
        if policy == "fail":
            assert status == 400 and "send fewer prompts" in answer["error"]["message"]
        else:
            assert status == 200 and len(answer["choices"]) == 4 and moved(split) == 40
        assert await asyncio.to_thread(split.settles, 20) == {}


@pytest.mark.timeout(120)
async def test_a_prefiller_killed_while_it_pushes_is_replaced(tiny_model: Path) -> None:
    """The decoder's blocks wait; another prefiller fills them; the text is the same."""
    asked = prompts(24, seed=17)[22]
    engine_args = ["--no-enable-prefix-caching", "--max-num-batched-tokens", "64"]
    with Deployment(tiny_model, 2, 1, engine_args=engine_args, proxy_args=LAYERWISE) as split:
        async with aiohttp.ClientSession() as session:
            expected = await ask(session, split.url, asked, stream=False)
            answers = [asyncio.create_task(ask(session, split.url, asked, stream=bool(i % 2))) for i in range(12)]
            await asyncio.sleep(0.15)
            split.prefillers[0].engine.kill9()
            assert await asyncio.gather(*answers) == [expected] * 12
        assert metric(split.decoders[0].sidecar_url, "baton_sidecar_open_landings") == 0
        for gauge in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
            assert metric(split.decoders[0].url, gauge) == 0
        assert get_json(f"{split.url}/instances")
