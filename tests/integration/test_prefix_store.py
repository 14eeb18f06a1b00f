"""Prefillers that share a directory: what one computed another one loads, and the answers stay the same."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import aiohttp
import pytest

from bench.prefix_store import measure
from tests.integration.deployment import Deployment, Instance, metric
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
    with Deployment(tiny_model, num_prefill=2, sidecar_args=["--store-dir", str(store)]) as split:
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


async def _ask_many(url: str, asked: list[Prompt]) -> list[Answer | BaseException]:
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        return await asyncio.gather(
            *(ask(session, url, prompt, stream=False) for prompt in asked), return_exceptions=True
        )


def kill_writer(instance: Instance, part: str) -> None:
    (instance.sidecar if part == "sidecar" else instance.engine).kill9()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", ["sidecar", "engine"])
def test_a_writer_killed_in_the_middle_of_a_save(tiny_model: Path, tmp_path: Path, part: str) -> None:
    """Of two prefillers; the other one reads what is there and answers as if nothing had been."""
    store = tmp_path / "store"
    asked = [Prompt(False, {"prompt": [5 + (7 * i + 31 * k) % 390 for i in range(1400)]}, 1400) for k in range(6)]
    with Deployment(tiny_model) as alone:
        expected = asyncio.run(ask_all(alone.url, asked, stream=[False] * 6, num_at_once=2))
    flags = ["--store-dir", str(store)]
    with Deployment(tiny_model, num_prefill=2, sidecar_args=flags, proxy_args=["--policy", "round_robin"]) as split:

        async def run() -> list[Answer | BaseException]:
            under_way = asyncio.ensure_future(_ask_many(split.url, asked))
            while num_files(store) < 10:
                assert not under_way.done(), "nothing was saved"
                await asyncio.sleep(0.005)
            kill_writer(split.prefillers[0], part)
            return await under_way

        for answer, wanted in zip(asyncio.run(run()), expected, strict=True):
            assert isinstance(answer, AssertionError) or answer == wanted, "an error may be, a wrong text may not"
        command = split.prefillers[0].sidecar if part == "sidecar" else split.prefillers[0].engine
        command.start()
        command.wait_ready()
        again = asyncio.run(ask_all(split.url, asked, stream=[False] * 6, num_at_once=2))
        assert again == expected
        for instance in split.prefillers:
            assert metric(instance.sidecar_url, "baton_sidecar_store_errors_total") == 0
        assert split.settles(within_s=10) == {}
