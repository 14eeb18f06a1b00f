"""The `openai` package against a split deployment, and bad input as it sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from tests.integration.deployment import Deployment


@pytest.fixture(scope="module")
def split(tiny_model: Path) -> Iterator[Deployment]:
    with Deployment(tiny_model, engine_args=["--max-body-bytes", "1000000"]) as deployment:
        yield deployment
        assert deployment.settles(within_s=5) == {}


@pytest.fixture
def client(split: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{split.url}/v1", api_key="none", max_retries=0) as made:
        yield made


MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who carries the baton?"},
]


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_chat_streamed_and_not_agree(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, temperature=0)
    assert whole.usage is not None
    assert whole.choices[0].finish_reason in ("length", "stop")
    assert whole.usage.completion_tokens <= 20
    pieces, usage, roles = [], None, []
    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            roles += [choice.delta.role] if choice.delta.role else []
    assert "".join(pieces) == whole.choices[0].message.content
    assert roles == ["assistant"]
    assert usage is not None
    assert usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )


def test_completion_streamed_and_not_agree(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="A relay race", max_tokens=20, temperature=0)
    stream = client.completions.create(model="tiny", prompt="A relay race", max_tokens=20, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_several_choices_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=5, n=3, seed=4, temperature=1.0, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert all(len(entry.top_logprobs) >= 2 for entry in choice.logprobs.content)


def test_a_list_of_prompts_is_answered_in_order(client: openai.OpenAI) -> None:
    prompts = ["one runner", "two runners", "three runners"]
    together = client.completions.create(model="tiny", prompt=prompts, max_tokens=8, temperature=0)
    alone = [client.completions.create(model="tiny", prompt=p, max_tokens=8, temperature=0) for p in prompts]
    assert [c.text for c in sorted(together.choices, key=lambda c: c.index)] == [a.choices[0].text for a in alone]


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"messages": "hello"}, 400, "messages"),
    ({"messages": [{"role": "user"}], "max_tokens": 0}, 400, "max_tokens"),
    ({"messages": MESSAGES, "max_tokens": "ten"}, 400, "max_tokens"),
    ({"messages": MESSAGES, "temperature": -1}, 400, "temperature"),
    ({"messages": MESSAGES, "model": "nobody"}, 404, "nobody"),
    ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "context"),
    ({"messages": MESSAGES, "kv_transfer_params": {"do_remote_prefill": True}}, 400, "kv_transfer_params"),
    ({"messages": [{"role": "user", "content": "x" * 1_040_000}]}, 413, ""),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "status", "named"), BAD, ids=[str(index) for index in range(len(BAD))])
async def test_bad_input_is_an_openai_error(
    split: Deployment, change: dict[str, Any], status: int, named: str, stream: bool
) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "stream": stream} | change
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{split.url}/v1/chat/completions", json=body) as response,
    ):
        answer = await response.json()
        assert response.status == status, answer
        assert set(answer["error"]) >= {"message", "type", "param", "code"}
        assert named in str(answer["error"])


async def test_malformed_json_is_a_400_and_no_traceback(split: Deployment) -> None:
    async with aiohttp.ClientSession() as session:
        for body in (b"{", b"[]", b"", b"\xff\xfe", b'{"model": "tiny", "messages": [}'):
            async with session.post(f"{split.url}/v1/chat/completions", data=body) as response:
                assert response.status == 400
                assert (await response.json())["error"]["message"]
    for command in split.commands:
        assert "Traceback" not in command.log.read_text(errors="replace"), command.tail()
