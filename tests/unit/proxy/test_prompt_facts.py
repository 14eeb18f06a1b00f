from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.openai_api import parse_call
from proxy.prompt_facts import cached_tokens_of, speaks_of_limits, with_cached_tokens, with_scored_prompt

SAID = rb'{"choices":[{"text":"he said \"cached_tokens\": 99 \\"}],"usage":%b}'


@pytest.mark.parametrize(
    ("usage", "num_cached"),
    [
        (b'{"prompt_tokens_details":{"cached_tokens":12}}', 12),
        (b'{"prompt_tokens_details": {"cached_tokens" : 7 }}', 7),
        (b'{"input_tokens_details":{"cached_tokens":3}}', 3),
        (b'{"input_tokens":5,"cache_read_input_tokens":9}', 9),
        (b'{"prompt_tokens_details":null}', 0),
        (b"{}", 0),
    ],
)
def test_what_the_prefiller_says(usage: bytes, num_cached: int) -> None:
    assert cached_tokens_of(SAID % usage, None) == cached_tokens_of(SAID % usage, {"x": 1}) == num_cached
    assert cached_tokens_of(SAID % usage, {"remote_prefill_cached_tokens": 5}) == 5


@pytest.mark.parametrize(
    ("usage", "num_cached", "made"),
    [
        (b'{"a":{"cached_tokens":12},"b":1}', 3, b'{"a":{"cached_tokens":3},"b":1}'),
        (b'{"a":{"cached_tokens": 12}}', 345, b'{"a":{"cached_tokens": 345}}'),
        (b'{"prompt_tokens_details":null}', 3, b'{"prompt_tokens_details":{"cached_tokens":3}}'),
        (
            b'{"input_tokens":4,"cache_read_input_tokens":8}',
            2,
            b'{"input_tokens":10,"cache_read_input_tokens":2}',
        ),
    ],
)
def test_the_prefillers_number_takes_the_decoders_place(usage: bytes, num_cached: int, made: bytes) -> None:
    assert with_cached_tokens(SAID % usage, num_cached) == SAID % made


@pytest.mark.parametrize(
    ("usage", "num_cached"),
    [
        (b'{"a":{"cached_tokens":12}}', 12),
        (b'{"prompt_tokens_details":null}', 0),
        (b"null", 5),
        (b'{"a":{"cached_tokens":null}}', 5),
        (b'{"input_tokens":4,"cache_read_input_tokens":8}', 8),
        (b'{"input_tokens":4,"cache_read_input_tokens":null}', 8),
    ],
)
def test_what_is_right_is_not_touched(usage: bytes, num_cached: int) -> None:
    answer = SAID % usage
    assert with_cached_tokens(answer, num_cached) is answer


def test_which_errors_speak_of_limits() -> None:
    assert speaks_of_limits(b"maximum context length is 4096 tokens. However, you requested 1 output tokens")
    assert speaks_of_limits(b"'max_tokens' or 'max_completion_tokens' is too large: 1")
    assert speaks_of_limits(b"min_tokens must be less than or equal to max_tokens=1, got 4.")
    assert not speaks_of_limits(b"temperature must be non-negative, got -1.0.")


def call(**fields: Any):  # type: ignore[no-untyped-def]
    return parse_call("chat" if "messages" in fields else "completions", orjson.dumps(fields))


def logprobs(tokens: list[str], first_offset: int = 0, first: float | None = -1.0) -> dict[str, Any]:
    offsets = [first_offset + sum(map(len, tokens[:at])) for at in range(len(tokens))]
    values = [first, *[-1.0] * (len(tokens) - 1)]
    return {"tokens": tokens, "text_offset": offsets, "token_logprobs": values, "top_logprobs": None}


@pytest.mark.parametrize("prompt", ["ab cd", ["ab cd"], [1, 2]])
def test_an_echo_is_the_prompt_of_the_one_and_the_words_of_the_other(prompt: Any) -> None:
    """The prefiller's own token (" P") is not part of the answer: the decoder computed its own."""
    prefill = {"choices": [{"text": "ab cd P", "logprobs": logprobs(["ab", " cd", " P"], first=None)}]}
    decode = {"id": 1, "choices": [{"text": " D e", "logprobs": logprobs([" D", " e"]), "finish_reason": "length"}]}
    made = with_scored_prompt(call(prompt=prompt, echo=True, logprobs=1), orjson.dumps(prefill), orjson.dumps(decode))
    assert orjson.loads(made) == {
        "id": 1,
        "choices": [{"text": "ab cd D e", "logprobs": logprobs(["ab", " cd", " D", " e"], first=None),
                     "finish_reason": "length"}],
    }  # fmt: skip


def test_a_chats_prompt_is_scored_beside_the_choices() -> None:
    one = call(messages=[], prompt_logprobs=1)
    made = with_scored_prompt(one, b'{"choices":[{}],"prompt_logprobs":[null,{"5":1}]}', b'{"choices":[{"a":1}]}')
    assert orjson.loads(made) == {"choices": [{"a": 1}], "prompt_logprobs": [None, {"5": 1}]}


@pytest.mark.parametrize("broken", [b"", b"[]", b"{}", b'{"choices":[]}', b'{"choices":[{"text":"a","logprobs":{}}]}'])
def test_an_answer_without_what_was_asked_is_an_error(broken: bytes) -> None:
    one, fine = call(prompt="a", echo=True, logprobs=1), b'{"choices":[{"text":"a","logprobs":null}]}'
    with pytest.raises(ValueError, match=r"answer|zero-length"):
        with_scored_prompt(one, broken, fine)
