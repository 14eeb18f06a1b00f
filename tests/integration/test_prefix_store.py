"""Prefillers that share a directory: what one computed another one loads, and the answers stay the same."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import aiohttp
import pytest

from bench.prefix_store import measure
from tests.integration.deployment import Command, Deployment, metric
from tests.integration.greedy import Answer, Prompt, ask, ask_all, prompts

LOADED = "baton_engine_store_load_blocks_total"
PROMPT_TOKENS = "vllm:prompt_tokens_by_source_total"
LEAST_SPEED_UP = 2.0
"""Measured: 5 with `--size tiny`, 6 with `--size small`, on a machine shared by many; the bar of 3 is bench's."""


def num_files(store: Path) -> int:
    return sum(path.is_file() and path.parent.name != "tmp" for path in store.rglob("*"))


def settle(store: Path, within_s: float = 30.0) -> int:
    """Wait until no more blocks appear; how many there are."""
    deadline = time.monotonic() + within_s
    before = -1
    while (now := num_files(store)) != before and time.monotonic() < deadline:
        before = now
        time.sleep(0.5)
    return now


@pytest.mark.timeout(300)
def test_a_second_prefiller_loads_what_the_first_one_computed(tiny_model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    asked = prompts(10, seed=21)[3:] + prompts(23, seed=21)[-4:]
    streamed = [False] * len(asked)
    with Deployment(tiny_model, num_prefill=2, prefill_sidecar_args=["--store-dir", str(store)]) as split:
        first, second = split.prefillers
        computed = asyncio.run(ask_all(first.url, asked, stream=streamed, num_at_once=2))
        assert settle(store) > 0
        assert metric(first.url, LOADED) == 0
        assert asyncio.run(ask_all(second.url, asked, stream=streamed, num_at_once=2)) == computed
        num_loaded = metric(second.url, LOADED, tier="posix")
        assert num_loaded > 200
        assert metric(second.url, PROMPT_TOKENS, source="external_kv_transfer") == 16 * num_loaded
        assert asyncio.run(ask_all(split.url, asked, stream=streamed, num_at_once=2)) == computed
        assert split.settles(within_s=5) == {}


@pytest.mark.timeout(300)
def test_the_first_token_of_a_stored_prefix_comes_sooner(tiny_model: Path, tmp_path: Path) -> None:
    times = measure(tiny_model, tmp_path / "store", 1500, 3, "--num-threads", "1")
    assert times.num_cached_tokens >= 1500 // 16 * 16
    assert times.computed > LEAST_SPEED_UP * times.from_directory
    assert times.computed > LEAST_SPEED_UP * times.from_memory


Outcomes = list[Answer | BaseException]


async def _ask_many(url: str, asked: list[Prompt]) -> Outcomes:
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        return await asyncio.gather(
            *(ask(session, url, prompt, stream=False) for prompt in asked), return_exceptions=True
        )


async def _kill_while_it_saves(split: Deployment, store: Path, victim: Command, asked: list[Prompt]) -> Outcomes:
    before = num_files(store)
    under_way = asyncio.ensure_future(_ask_many(split.url, asked))
    while num_files(store) < before + 10:
        assert not under_way.done(), "nothing was saved"
        await asyncio.sleep(0.005)
    victim.kill9()
    return await under_way


@pytest.mark.timeout(300)
def test_a_writer_killed_in_the_middle_of_a_save(tiny_model: Path, tmp_path: Path) -> None:
    """Of two prefillers; the other one reads what is there and answers as if nothing had been."""
    store = tmp_path / "store"
    flags, policy = ["--store-dir", str(store)], ["--policy", "round_robin"]
    with Deployment(tiny_model, num_prefill=2, prefill_sidecar_args=flags, proxy_args=policy) as split:
        first = split.prefillers[0]
        for seed, victim in enumerate((first.sidecar, first.engine)):
            asked = [a_prompt(31 * index + 7 * seed) for index in range(4)]
            expected = asyncio.run(ask_all(split.decoders[0].url, asked, stream=[False] * 4, num_at_once=1))
            outcomes = asyncio.run(_kill_while_it_saves(split, store, victim, asked))
            for outcome, wanted in zip(outcomes, expected, strict=True):
                assert isinstance(outcome, AssertionError) or outcome == wanted, "an error may be, a wrong text may not"
            victim.start()
            victim.wait_ready()
            assert split.settles(within_s=10) == {}
            for instance in split.prefillers:
                again = asyncio.run(ask_all(instance.url, asked, stream=[False] * 4, num_at_once=1))
                assert again == expected
        for instance in split.prefillers:
            assert metric(instance.sidecar_url, "baton_sidecar_store_errors_total") == 0


def a_prompt(start: int) -> Prompt:
    """1,200 tokens unlike those of any other start."""
    return Prompt(False, {"prompt": [5 + (7 * index + start) % 390 for index in range(1200)]}, 1200)
