"""A real `pd-engine serve` with a real model, used as its users do: by the openai package and by raw sockets."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from engine_adapter.torch_engine.tokenizer import Tokenizer
from tests.unit.engine_adapter.torch_engine.server.conftest import Served

PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def metric(served: Served, name: str) -> float:
    with urllib.request.urlopen(served.url + "/metrics", timeout=5) as response:
        text = response.read().decode()
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.M))


def idle(served: Served) -> bool:
    return (
        metric(served, "vllm:num_requests_running") == 0
        and metric(served, "vllm:num_requests_waiting") == 0
        and metric(served, "baton_engine_free_blocks") == metric(served, "baton_engine_blocks")
    )


def wait_idle(served: Served) -> None:
    deadline = time.monotonic() + 5
    while not idle(served):
        assert time.monotonic() < deadline, "requests or blocks are left"
        time.sleep(0.02)


def test_streamed_and_whole_completions_agree(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    extra = {"return_token_ids": True}
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, temperature=0, extra_body=extra)
    chunks = list(
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=40, temperature=0, stream=True,
            stream_options={"include_usage": True}, extra_body=extra,
        )
    )  # fmt: skip
    choice = whole.choices[0]
    ids = choice.model_extra["token_ids"]  # type: ignore[index]
    assert choice.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == choice.text
    assert [chunk.choices[0].model_extra["token_ids"] for chunk in chunks[:-1]] == [[one] for one in ids]  # type: ignore[index]
    assert (len(chunks), chunks[-1].choices) == (41, [])
    assert chunks[-1].usage and whole.usage
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 40
    assert choice.finish_reason == "length"


def test_streamed_and_whole_chats_agree(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    ask = {"model": "tiny", "messages": messages, "max_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**ask)  # type: ignore[call-overload]
    chunks = list(client.chat.completions.create(**ask, stream=True))  # type: ignore[call-overload]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_n_choices_differ_and_are_repeatable_by_seed(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "n": 2, "seed": 3}
    first, again = (client.completions.create(**ask) for _ in range(2))  # type: ignore[call-overload]
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 2
    assert texts == [choice.text for choice in again.choices]


def test_a_list_of_prompts_is_each_prompt_alone(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "Another one", "世界"]
    ask = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    together = client.completions.create(prompt=prompts, **ask)  # type: ignore[call-overload]
    alone = [client.completions.create(prompt=prompt, **ask).choices[0].text for prompt in prompts]  # type: ignore[call-overload]
    assert [choice.text for choice in together.choices] == alone


def test_a_stop_string_cuts_the_text(client: openai.OpenAI, served: Served) -> None:
    ask = {"model": "tiny", "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    text = client.completions.create(**ask).choices[0].text  # type: ignore[call-overload]
    start = next(i for i in range(10, len(text)) if "�" not in text[i : i + 3] and text.find(text[i : i + 3]) == i)
    stop = text[start : start + 3]
    for stream in (False, True):
        answer = client.completions.create(**ask, stop=[stop], stream=stream)  # type: ignore[call-overload]
        choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
        assert "".join(choice.text for choice in choices) == text[:start]
        assert (choices[-1].finish_reason, choices[-1].model_extra["stop_reason"]) == ("stop", stop)
    wait_idle(served)


def test_logprobs_and_echo(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3, temperature=0, logprobs=2, echo=True)
    logprobs = answer.choices[0].logprobs
    num_prompt_tokens = len(tokenizer.encode(PROMPT, add_special_tokens=True))
    assert answer.choices[0].text.startswith(PROMPT)
    assert logprobs and logprobs.token_logprobs and logprobs.top_logprobs and logprobs.tokens
    assert len(logprobs.tokens) == num_prompt_tokens + 3
    assert logprobs.token_logprobs[0] is None
    for value, top in list(zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[num_prompt_tokens:]:
        assert value == max(top.values())
    scored = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, logprobs=0, echo=True).choices[0]
    assert scored.text == PROMPT
    assert scored.logprobs and scored.logprobs.token_logprobs
    assert scored.logprobs.token_logprobs == pytest.approx(logprobs.token_logprobs[:num_prompt_tokens], abs=1e-4)


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_completion_tokens=3, temperature=0,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content
    for position in logprobs.content:
        assert position.logprob == position.top_logprobs[0].logprob >= position.top_logprobs[1].logprob
        assert position.bytes == position.top_logprobs[0].bytes


def test_errors_reach_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="word " * 600)
    assert "maximum context length is 512 tokens" in long.value.message
    with pytest.raises(openai.BadRequestError) as hot:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], temperature=3)
    assert hot.value.param == "temperature"


def test_cached_prompt_tokens_are_said(client: openai.OpenAI) -> None:
    prompt = "cache me " * 30
    for cached in (False, True):
        usage = client.completions.create(model="tiny", prompt=prompt, max_tokens=1).usage
        assert usage and usage.prompt_tokens_details
        assert bool(usage.prompt_tokens_details.cached_tokens) is cached


def test_clients_that_leave_at_any_moment_leave_nothing(served: Served) -> None:
    rng = random.Random(5)
    body = json.dumps({"prompt": PROMPT * 8, "max_tokens": 300, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"

    def leave(after_s: float) -> None:
        deadline = time.monotonic() + after_s
        with socket.create_connection((served.host, served.port)) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            while (left_s := deadline - time.monotonic()) > 0:
                connection.settimeout(left_s)
                with contextlib.suppress(TimeoutError):
                    connection.recv(65536)

    before = metric(served, "vllm:generation_tokens_total")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, [rng.uniform(0.001, 0.15) for _ in range(40)]))
    wait_idle(served)
    assert metric(served, "vllm:generation_tokens_total") - before < 40 * 300 / 2


def test_metrics_count(client: openai.OpenAI, served: Served) -> None:
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_count",
             "vllm:e2e_request_latency_seconds_count", "vllm:time_per_output_token_seconds_count")  # fmt: skip
    before = [metric(served, name) for name in names]
    usage = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=5, extra_body={"ignore_eos": True}).usage
    assert usage
    wait_idle(served)
    grown = [metric(served, name) - value for name, value in zip(names, before, strict=True)]
    assert grown == [usage.prompt_tokens, 5, 1, 1, 4]
