"""Several prompts and choices of one request, split: every choice is the one the unsplit engine makes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.deployment import BIN, Command, Deployment, free_port, metric

NO_PREFIX_CACHE = ["--no-enable-prefix-caching"]  # which engine has what in its cache is not what is compared
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SAMPLED = {"model": "tiny", "max_tokens": 12, "temperature": 1.0, "seed": 11, "return_token_ids": True}
LIST = ["the baton is passed", "from one runner", "to the next while the cache blocks cross a wire"]
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "choices": (COMPLETIONS, {"prompt": LIST[0], "n": 3}),
    "list": (COMPLETIONS, {"prompt": LIST}),
    "ids": (COMPLETIONS, {"prompt": [[5, 6, 7, 8], [9, 10], list(range(11, 60))], "n": 2}),
    "chat": (CHAT, {"messages": [{"role": "user", "content": LIST[2]}], "n": 3, "logprobs": True}),
    "echo": (COMPLETIONS, {"prompt": LIST, "echo": True, "logprobs": 2, "n": 2}),
    "scored": (COMPLETIONS, {"prompt": LIST, "prompt_logprobs": 2}),
    "one scored": (CHAT, {"messages": [{"role": "user", "content": LIST[1]}], "prompt_logprobs": 1}),
    "one echo": (COMPLETIONS, {"prompt": [5, 6, 7, 8], "echo": True, "logprobs": 1}),
}
ATTEMPT = r"(?<=-r-1)-[0-9a-f]{16}$"
"""What the layerwise contract adds to a request id for each attempt."""
SCORED = ("echo", "scored", "one scored", "one echo")
"""With logprobs of the prompt, which a decoder of the layerwise contract computes itself."""
STREAMED = ("choices", "list", "ids", "chat")


@pytest.fixture(scope="module")
def unsplit(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    flags = ["--model", str(tiny_model), "--served-model-name", "tiny", "--role", "both", "--port", str(port)]
    argv = [str(BIN / "pd-engine"), "serve", *flags, "--dtype", "float32", "--num-threads", "1", *NO_PREFIX_CACHE]
    command = Command("unsplit", argv, f"{url}/health", tmp_path_factory.mktemp("unsplit") / "log")
    command.start()
    try:
        command.wait_ready()
        yield url
    finally:
        command.stop()


@pytest.fixture(scope="module", params=["pull", "layerwise"])
def split(tiny_model: Path, unsplit: str, request: pytest.FixtureRequest) -> Iterator[Deployment]:
    proxy_args = ["--contract", request.param]
    with Deployment(tiny_model, engine_args=NO_PREFIX_CACHE, proxy_args=proxy_args) as deployment:
        yield deployment


async def ask(url: str, path: str, fields: dict[str, Any]) -> bytes:
    timeout = aiohttp.ClientTimeout(total=120)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(url + path, json={**SAMPLED, **fields}, headers={"X-Request-Id": "r-1"}) as response,
    ):
        raw = await response.read()
        assert response.status == 200, (response.status, raw[:500])
        return raw


def whole(raw: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(raw)
    del answer["created"]
    answer["id"] = re.sub(ATTEMPT, "", answer["id"])
    return answer


def streamed(raw: bytes) -> tuple[dict[int, dict[str, Any]], Any, set[str]]:
    """Text, token ids and end of each choice; the usage; the ids of all events."""
    events = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
    assert events.count("[DONE]") == 1 and events[-1] == "[DONE]"
    parsed = [json.loads(event) for event in events[:-1]]
    choices: dict[int, dict[str, Any]] = {}
    for event in parsed:
        for choice in event["choices"]:
            one = choices.setdefault(choice["index"], {"text": "", "token_ids": [], "logprobs": [], "end": None})
            one["text"] += choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
            one["token_ids"] += choice.get("token_ids") or []
            one["logprobs"] += (choice.get("logprobs") or {}).get("content") or []
            one["end"] = choice["finish_reason"] or one["end"]
    (usage,) = [event["usage"] for event in parsed if not event["choices"]]
    return choices, usage, {re.sub(ATTEMPT, "", event["id"]) for event in parsed}


def locally_computed(split: Deployment) -> float:
    return metric(split.decoders[0].url, "vllm:prompt_tokens_by_source_total", source="local_compute")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ASKED)
async def test_the_whole_answer_is_the_unsplit_engines(split: Deployment, unsplit: str, name: str) -> None:
    path, fields = ASKED[name]
    before = locally_computed(split)
    expected = whole(await ask(unsplit, path, fields))
    assert whole(await ask(split.url, path, fields)) == expected
    if split.proxy_args[-1] == "pull" or name not in SCORED:
        # One token a child: the rest of each prompt came over the wire.
        assert locally_computed(split) - before == len(expected["choices"])
    assert split.settles(within_s=5) == {}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", STREAMED)
async def test_every_streamed_choice_is_the_unsplit_engines(split: Deployment, unsplit: str, name: str) -> None:
    path, fields = ASKED[name]
    fields = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    expected = streamed(await ask(unsplit, path, fields))
    assert streamed(await ask(split.url, path, fields)) == expected
    texts = {choice["text"] for choice in expected[0].values()}
    assert len(texts) == len(expected[0]), "the seed is not counted up"
    assert split.settles(within_s=5) == {}


async def test_an_over_long_prompt_is_refused_in_the_unsplit_engines_words(split: Deployment, unsplit: str) -> None:
    async def refusal(url: str, fields: dict[str, Any]) -> tuple[int, Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(url + COMPLETIONS, json={**SAMPLED, **fields}) as response,
        ):
            return response.status, await response.json()

    long = list(range(5, 305)) * 20
    for fields in ({"prompt": long, "max_tokens": 77}, {"prompt": [long, long[1:]], "max_tokens": 77, "stream": True}):
        expected = await refusal(unsplit, fields)
        assert expected[0] == 400 and "77" in expected[1]["error"]["message"]
        status, error = await refusal(split.url, fields)
        assert status == 400
        # Of several bad prompts, one engine names the first, and the split one that of the first child to fail.
        assert re.sub(r"\d{4}", "N", error["error"]["message"]) == re.sub(
            r"\d{4}", "N", expected[1]["error"]["message"]
        )
    assert split.settles(within_s=5) == {}
