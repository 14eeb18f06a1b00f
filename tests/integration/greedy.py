"""Greedy requests whose answers can be held against each other: token ids, text and finish reason."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any

import aiohttp

MAX_TOKENS = 16
WORDS = [
    "the",
    "baton",
    "is",
    "passed",
    "from",
    "one",
    "runner",
    "to",
    "the",
    "next",
    "while",
    "cache",
    "blocks",
    "cross",
    "a",
    "wire",
    "and",
    "nobody",
    "drops",
    "them",
]
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1499, 1500)


@dataclass(frozen=True)
class Prompt:
    """One prompt, in the form its route takes: token ids for a completion, messages for a chat."""

    chat: bool
    body: dict[str, Any]
    num_tokens: int | None


@dataclass(frozen=True)
class Answer:
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    num_prompt_tokens: int


def prompts(count: int, seed: int, vocab_size: int = 400) -> list[Prompt]:
    """`count` prompts of 1 to 1,500 tokens, every second one a chat; the borders of blocks and chunks come first."""
    rng = random.Random(seed)
    lengths = [*LENGTHS, *(rng.randint(1, 1500) for _ in range(count))][:count]
    made = []
    for index, length in enumerate(lengths):
        if index % 2:
            words = " ".join(rng.choice(WORDS) for _ in range(max(1, length // 3)))
            made.append(Prompt(True, {"messages": [{"role": "user", "content": words}]}, None))
        else:
            made.append(Prompt(False, {"prompt": [rng.randrange(5, vocab_size) for _ in range(length)]}, length))
    return made


async def ask(session: aiohttp.ClientSession, url: str, prompt: Prompt, *, stream: bool, **extra: Any) -> Answer:
    """One greedy answer. Raises AssertionError on any status but 200 and on an error event."""
    route = "/v1/chat/completions" if prompt.chat else "/v1/completions"
    body = {
        "model": "tiny",
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "return_token_ids": True,
        **prompt.body,
        **extra,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    async with session.post(url + route, json=body) as response:
        raw = await response.read()
        assert response.status == 200, (response.status, raw[:500])
    return _from_stream(raw, prompt.chat) if stream else _from_json(json.loads(raw), prompt.chat)


def _from_json(answer: dict[str, Any], chat: bool) -> Answer:
    (choice,) = answer["choices"]
    text = choice["message"]["content"] if chat else choice["text"]
    return Answer(tuple(choice["token_ids"]), text or "", choice["finish_reason"], answer["usage"]["prompt_tokens"])


def _from_stream(raw: bytes, chat: bool) -> Answer:
    events = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", events[-1]
    token_ids: list[int] = []
    text, finish_reason, num_prompt_tokens = "", "", 0
    for event in map(json.loads, events[:-1]):
        assert "error" not in event, event
        if event.get("usage"):
            num_prompt_tokens = event["usage"]["prompt_tokens"]
        for choice in event["choices"]:
            text += (choice["delta"].get("content") or "") if chat else choice["text"]
            token_ids += choice.get("token_ids") or []
            finish_reason = choice["finish_reason"] or finish_reason
    return Answer(tuple(token_ids), text, finish_reason, num_prompt_tokens)


async def ask_all(
    url: str, asked: list[Prompt], *, stream: list[bool], num_at_once: int = 8, **extra: Any
) -> list[Answer]:
    """All answers in order, `num_at_once` requests in flight."""
    gate = asyncio.Semaphore(num_at_once)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(prompt: Prompt, streamed: bool) -> Answer:
            async with gate:
                return await ask(session, url, prompt, stream=streamed, **extra)

        return await asyncio.gather(*(one(p, s) for p, s in zip(asked, stream, strict=True)))
