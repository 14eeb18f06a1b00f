"""What a mock engine says to several prompts and choices at once, and of the prompt's own tokens.

Choice `k` of prompt `p` has index `p * n + k`; the prompt's logprobs are made from its text, so that they too can be
told from another prompt's.
"""

from __future__ import annotations

import zlib
from typing import Any

import orjson

from bench.mock_answers import (
    CHARS_PER_TOKEN,
    CREATED,
    DONE_EVENT,
    EventTemplate,
    Script,
    prompts_of,
    scripts_of,
    usage_of,
)

Json = dict[str, Any]


def scores_prompt(fields: Json) -> bool:
    """Whether an engine would have to compute logprobs of the prompt, as vLLM decides it."""
    echoed = fields.get("echo") and fields.get("logprobs") is not None
    return fields.get("prompt_logprobs") is not None or bool(echoed)


def is_plain(fields: Json) -> bool:
    """One prompt, nothing of the prompt shown: `mock_answers` suffices."""
    special = ("echo", "logprobs", "prompt_logprobs")
    return len(prompts_of(fields)) == 1 and not any(fields.get(key) is not None for key in special)


def _prompt_tokens(prompt: Any) -> list[str]:
    if isinstance(prompt, list):
        return (
            [f"<{one}>" for one in prompt] if prompt and isinstance(prompt[0], int) else [orjson.dumps(prompt).decode()]
        )
    text = str(prompt)
    return [text[at : at + CHARS_PER_TOKEN] for at in range(0, len(text), CHARS_PER_TOKEN)]


def _logprob(context: str, token: str) -> float:
    return -(zlib.crc32(f"{context}|{token}".encode()) % 1000) / 128


def _completion_logprobs(tokens: list[str], context: str, num_scored_from: int) -> Json:
    """Parallel lists; tokens before `num_scored_from` have none."""
    offsets = [sum(map(len, tokens[:at])) for at in range(len(tokens))]
    values = [None if at < num_scored_from else _logprob(context, token) for at, token in enumerate(tokens)]
    tops = [None if value is None else {token: value} for token, value in zip(tokens, values, strict=True)]
    return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}


def _choice(index: int, script: Script, fields: Json, prompt: Any, chat: bool) -> Json:
    said = [script.token(at) for at in range(script.num_tokens)]
    shown = _prompt_tokens(prompt) if fields.get("echo") else []
    text, context = "".join(shown + said), script.fingerprint
    choice: Json = {"index": index, "finish_reason": "length", "stop_reason": None, "logprobs": None}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    if not chat and fields.get("logprobs") is not None:
        choice["logprobs"] = _completion_logprobs(shown + said, context, 1 if shown else 0)
    if not chat and fields.get("prompt_logprobs") is not None:
        choice["prompt_logprobs"] = prompt_logprobs(fields, prompt, context)
    return choice


def prompt_logprobs(fields: Json, prompt: Any, context: str) -> list[Json | None] | None:
    if fields.get("prompt_logprobs") is None:
        return None
    scored: list[Json | None] = [
        {str(at): {"logprob": _logprob(context, token), "rank": 1, "decoded_token": token}}
        for at, token in enumerate(_prompt_tokens(prompt))
    ]
    return [None, *scored[1:]]


def whole_answer_of_all(fields: Json, num_tokens: int | None, chat: bool, name: str, model: str, **more: Any) -> bytes:
    """The whole answer to a request of any number of prompts and choices."""
    num_choices = int(fields.get("n") or 1)
    prompts, scripts = prompts_of(fields), scripts_of(fields, num_tokens)
    pairs = [(prompt, script) for prompt, script in zip(prompts, scripts, strict=True) for _ in range(num_choices)]
    answer: Json = {
        "id": name,
        "object": "chat.completion" if chat else "text_completion",
        "created": CREATED,
        "model": model,
        "choices": [_choice(index, script, fields, prompt, chat) for index, (prompt, script) in enumerate(pairs)],
        "usage": usage_of_all(scripts, num_choices),
    }
    if chat and fields.get("prompt_logprobs") is not None:
        answer["prompt_logprobs"] = prompt_logprobs(fields, prompts[0], scripts[0].fingerprint)
    return orjson.dumps({**answer, **more})


def usage_of_all(scripts: list[Script], num_choices: int, num_cached_tokens: int = 0) -> Json:
    """Every prompt once, every choice's tokens."""
    each = [usage_of(script, num_choices, num_cached_tokens) for script in scripts]
    counted = {key: sum(one[key] for one in each) for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return {**counted, "prompt_tokens_details": {"cached_tokens": num_cached_tokens}}


class ManyTemplates:
    """The events of the streams of several prompts, token by token side by side; used as an EventTemplate."""

    def __init__(self, scripts: list[Script], chat: bool, name: str, model: str, num_choices: int, usage: bool) -> None:
        self.script = scripts[0]
        self._templates = [
            EventTemplate(script, chat, name, model, num_choices, 0, False, first_index=at * num_choices)
            for at, script in enumerate(scripts)
        ]
        self._usage = usage_of_all(scripts, num_choices) if usage else None

    def first_events(self) -> list[bytes]:
        return [event for one in self._templates for event in one.first_events()]

    def token_events(self, index: int) -> list[bytes]:
        return [event for one in self._templates for event in one.token_events(index)]

    def recomputed_event(self) -> bytes:
        """One of the prompts is given up; the rest is not told of any more."""
        return self._templates[0].recomputed_event()

    def last_events(self) -> list[bytes]:
        if self._usage is None:
            return [DONE_EVENT]
        return [self._templates[0].usage_event(orjson.dumps(self._usage)), DONE_EVENT]
