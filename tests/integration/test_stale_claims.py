"""KV that can no longer be trusted is refused: the client gets an error or a retried answer, never a wrong text."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.deployment import Deployment, metric
from tests.integration.greedy import ask, prompts

PROMPT = prompts(60, seed=17)[50]
LEASE_S = 1.0


@pytest.fixture(scope="module")
def split(tiny_model: Path) -> Iterator[Deployment]:
    arguments = ["--no-enable-prefix-caching", "--kv-lease-s", str(LEASE_S)]
    with Deployment(tiny_model, num_prefill=2, engine_args=arguments) as deployment:
        yield deployment
        assert deployment.settles(within_s=5) == {}


async def prefill(session: aiohttp.ClientSession, split: Deployment, index: int = 0) -> dict[str, Any]:
    body = {"model": "tiny", "temperature": 0, "max_tokens": 1, "min_tokens": 1, **PROMPT.body}
    body["kv_transfer_params"] = {"do_remote_decode": True, "do_remote_prefill": False}
    async with session.post(split.prefillers[index].url + "/v1/completions", json=body) as response:
        answer = await response.json()
        assert response.status == 200, answer
        params: dict[str, Any] = answer["kv_transfer_params"]
        return params


async def refused(session: aiohttp.ClientSession, split: Deployment, params: dict[str, Any], stream: bool) -> str:
    """The decoder's error message for these parameters; asserts that there is one, and a retryable status."""
    body = {"model": "tiny", "max_tokens": 8, "temperature": 0, "stream": stream, **PROMPT.body}
    body["kv_transfer_params"] = params
    async with session.post(split.decoders[0].url + "/v1/completions", json=body) as response:
        answer = await response.json()
        assert response.status == 503, answer
        assert answer["error"]["type"] == "kv_load_error"
        message: str = answer["error"]["message"]
        return message


@pytest.mark.parametrize("stream", [False, True])
async def test_after_expiry(split: Deployment, stream: bool) -> None:
    async with aiohttp.ClientSession() as session:
        params = await prefill(session, split)
        await asyncio.sleep(LEASE_S * 1.5)
        assert "expired" in await refused(session, split, params, stream)


async def test_after_release(split: Deployment) -> None:
    async with aiohttp.ClientSession() as session:
        params = await prefill(session, split)
        await ask(session, split.decoders[0].url, PROMPT, stream=False, kv_transfer_params=params)
        assert "released" in await refused(session, split, params, False)


async def test_with_a_wrong_token_then_with_the_right_one(split: Deployment) -> None:
    async with aiohttp.ClientSession() as session:
        params = await prefill(session, split)
        forged = copy.deepcopy(params)
        forged["baton"]["token"] = "0" * len(params["baton"]["token"])
        assert "token" in await refused(session, split, forged, False)
        await ask(session, split.decoders[0].url, PROMPT, stream=False, kv_transfer_params=params)


async def test_from_a_wrong_engine(split: Deployment) -> None:
    async with aiohttp.ClientSession() as session:
        params = await prefill(session, split)
        other = (await prefill(session, split, 1)) | {"baton": params["baton"]}
        assert "engine" in await refused(session, split, params | {"remote_engine_id": "prefill1"}, False)
        await refused(session, split, other, False)
        await asyncio.sleep(LEASE_S)


@pytest.mark.parametrize("part", ["engine", "sidecar"])
async def test_after_the_producer_restarted_at_the_same_address(split: Deployment, part: str) -> None:
    producer = split.prefillers[0]
    async with aiohttp.ClientSession() as session:
        params = await prefill(session, split)
        command = getattr(producer, part)
        command.kill9()
        command.start()
        await asyncio.to_thread(command.wait_ready)
        await asyncio.to_thread(producer.engine.wait_ready)
        await asyncio.sleep(0.5)
        message = await refused(session, split, params, False)
        assert "epoch" in message or "restarted" in message
        assert metric(producer.sidecar_url, "baton_sidecar_hellos_refused_total", reason="stale_epoch") >= 1
        answer = await ask(session, split.url, PROMPT, stream=False)
        assert answer == await ask(session, split.url, PROMPT, stream=True)
