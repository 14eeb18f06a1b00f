"""Clients that leave at any moment leave nothing behind: no block, no lease, no load, no connection."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from pathlib import Path

import aiohttp
import pytest

from tests.integration.deployment import Deployment, expired_leases
from tests.integration.greedy import Prompt, ask, prompts

NUM_REQUESTS = 200
NUM_AT_ONCE = 8
SETTLE_S = 20.0
"""The proxy listens to a prefill that it gave up for 5 s more, for KV that it may still hand out, and gives that back.
Well below the 30 s of a lease; and that none has expired is asked for too."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("transport", "contract"),
    [("shm", "pull"), pytest.param("mooncake", "pull", marks=pytest.mark.mooncake), ("shm", "layerwise")],
)
async def test_200_requests_cut_at_a_random_moment_leave_nothing(
    tiny_model: Path, transport: str, contract: str
) -> None:
    with Deployment(tiny_model, transport=transport, proxy_args=["--contract", contract]) as split:
        asked = prompts(64, seed=11)
        usual_s = await _median_seconds(split.url, asked[20:30])
        rng = random.Random(5)
        gate = asyncio.Semaphore(NUM_AT_ONCE)

        async def cut(prompt: Prompt, after_s: float, stream: bool) -> bool:
            async with gate, aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
                try:
                    await asyncio.wait_for(ask(session, split.url, prompt, stream=stream, max_tokens=64), after_s)
                except TimeoutError:
                    return True
                return False

        moments = [rng.uniform(0, 1.5) ** 2 * usual_s * NUM_AT_ONCE / 2 for _ in range(NUM_REQUESTS)]
        cuts = await asyncio.gather(
            *(cut(rng.choice(asked), after_s, bool(index % 2)) for index, after_s in enumerate(moments))
        )
        assert sum(cuts) > NUM_REQUESTS / 4, "most answers came before their client left: the test proves little"
        left = await asyncio.to_thread(split.settles, SETTLE_S)
        assert left == {} and expired_leases(split) == 0
        await _still_right(split, asked[21])


async def test_a_client_that_leaves_in_the_middle_of_its_stream_stops_the_decoder(tiny_model: Path) -> None:
    with Deployment(tiny_model) as split:
        async with aiohttp.ClientSession() as session:
            body = {"model": "tiny", "prompt": [9, 8, 7] * 20, "max_tokens": 3000, "ignore_eos": True, "stream": True}
            response = await session.post(split.url + "/v1/completions", json=body)
            assert await response.content.readline()
            response.close()
        assert split.settles(within_s=2) == {}


async def _median_seconds(url: str, asked: list[Prompt]) -> float:
    seconds = []
    async with aiohttp.ClientSession() as session:
        for prompt in asked:
            start = time.monotonic()
            await ask(session, url, prompt, stream=False, max_tokens=64)
            seconds.append(time.monotonic() - start)
    return sorted(seconds)[len(seconds) // 2]


async def _still_right(split: Deployment, prompt: Prompt) -> None:
    async with aiohttp.ClientSession() as session:
        first = await ask(session, split.url, prompt, stream=False)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ask(session, split.url, prompt, stream=True, max_tokens=64), 0.02)
        assert await ask(session, split.url, prompt, stream=True) == first
