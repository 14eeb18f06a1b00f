"""The `openai` package against the proxy: chat and completion, streamed and not, errors and all."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.proxy_blackbox.harness import CHAT, COMPLETIONS, HOST, Engines, Proxy, body_of, text_for

MESSAGES = [{"role": "user", "content": "Say it"}]


@pytest.fixture
def client(proxy: Proxy) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{HOST}:{proxy.port}/v1", api_key="key", max_retries=0, timeout=10) as made:
        yield made


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="mock", messages=MESSAGES, max_tokens=5)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == text_for(body_of(CHAT))
    assert answer.usage is not None and answer.usage.completion_tokens == 5


def test_chat_streamed(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="mock", messages=MESSAGES, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )  # type: ignore[call-overload]
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == text_for(body_of(CHAT))
    assert chunks[-1].usage.completion_tokens == 5
    assert chunks[-2].choices[0].finish_reason == "length"


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="mock", prompt="Say it", max_tokens=5, extra_body={"top_k": 3})
    assert answer.choices[0].text == text_for(body_of(COMPLETIONS))


def test_completion_streamed(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="mock", prompt="Say it", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text_for(body_of(COMPLETIONS))


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["mock"]


def test_an_error_is_one_of_the_packages_own(client: openai.OpenAI, engines: Engines) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="mock", prompt="a", max_tokens=0)
    assert refused.value.param == "max_tokens"
    engines.fault("decode", "status", status=404, message="no such model")
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.completions.create(model="other", prompt="a", max_tokens=2)


def test_a_stream_that_is_closed_early(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="mock", messages=MESSAGES, max_tokens=5000, stream=True, extra_body={"mock": {"interval_s": 0.02}}
    )  # type: ignore[call-overload]
    next(iter(stream))
    stream.close()


async def test_the_async_client(proxy: Proxy) -> None:
    url = f"http://{HOST}:{proxy.port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="key", max_retries=0, timeout=10) as made:
        stream = await made.completions.create(model="mock", prompt="Say it", max_tokens=5, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
    assert text == text_for(body_of(COMPLETIONS))
