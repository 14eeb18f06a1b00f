"""kill -9 of a decoder in mid-stream: the other one goes on, and the greedy answer is the unsplit engine's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from tests.integration.deployment import Deployment, metric
from tests.integration.greedy import Answer, Prompt, _from_stream, ask, prompts

NUM_TOKENS = 300


async def _ask_slowly(session: aiohttp.ClientSession, url: str, prompt: Prompt, begun: asyncio.Event) -> Answer:
    """As `ask`, and says when a few tokens have come."""
    body = {"model": "tiny", "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    body |= {**prompt.body, "stream": True, "stream_options": {"include_usage": True}}
    raw = b""
    route = "chat/completions" if prompt.chat else "completions"
    async with session.post(f"{url}/v1/{route}", json=body) as response:
        assert response.status == 200
        async for piece in response.content.iter_any():
            raw += piece
            if raw.count(b"data: ") > 8:
                begun.set()
    return _from_stream(raw, prompt.chat)


@pytest.mark.timeout(240)
async def test_greedy_streams_survive_the_death_of_their_decoder(tiny_model: Path) -> None:
    asked = prompts(40, seed=29)[16:20]  # completions and chats
    with Deployment(tiny_model, num_prefill=1, num_decode=2) as split:
        async with aiohttp.ClientSession() as session:
            unsplit = split.prefillers[0].url
            more = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
            expected = [await ask(session, unsplit, prompt, stream=False, **more) for prompt in asked]
            begun = [asyncio.Event() for _ in asked]
            answers = [
                asyncio.create_task(_ask_slowly(session, split.url, *pair)) for pair in zip(asked, begun, strict=True)
            ]
            await asyncio.gather(*(event.wait() for event in begun))
            assert not any(answer.done() for answer in answers)
            split.decoders[0].engine.kill9()
            assert await asyncio.gather(*answers) == expected
        name, labels = "pd_proxy_continuations_total", {"outcome": "continued", "reason": "lost_mid_answer"}
        assert 1 <= metric(split.url, name, **labels) <= len(asked)
        lost = split.decoders[0]
        split.instances.remove(lost)  # its metrics are gone with it
        try:
            assert split.settles(within_s=5.0) == {}
        finally:
            split.instances.append(lost)
