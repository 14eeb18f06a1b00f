"""Every family, greedy and sampled by seed: the split answer is that of one engine that computes both halves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from tests.integration.deployment import Deployment, make_model, metric
from tests.integration.greedy import Answer, Prompt, ask, prompts

SAMPLED = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "presence_penalty": 0.5, "max_tokens": 24}


async def answers_of(url: str, asked: list[Prompt], sampled: bool) -> list[Answer]:
    async with aiohttp.ClientSession() as session:
        extra = [SAMPLED | {"seed": 100 + index} if sampled else {} for index in range(len(asked))]
        return await asyncio.gather(
            *(ask(session, url, one, stream=bool(i % 2), **extra[i]) for i, one in enumerate(asked))
        )


@pytest.fixture
def model(family: str, tmp_path: Path) -> Path:
    return make_model(tmp_path / family, family)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
async def test_split_equals_unsplit(model: Path) -> None:
    asked = prompts(38, seed=11)[28:]
    with Deployment(model, engine_args=["--no-enable-prefix-caching"]) as split:
        for sampled in (False, True):
            alone = await answers_of(split.decoders[0].url, asked, sampled)
            source = metric(split.decoders[0].url, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer")
            assert await answers_of(split.url, asked, sampled) == alone
            assert len({one.token_ids for one in alone}) > len(asked) // 2, "the texts hardly differ"
            came = metric(split.decoders[0].url, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer")
            assert came - source == sum(one.num_prompt_tokens - 1 for one in alone)
        assert split.settles(within_s=5) == {}
