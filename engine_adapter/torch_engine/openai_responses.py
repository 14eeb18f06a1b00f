"""The answers of the OpenAI API as vLLM shapes them, built from choices. Pure.

vLLM writes every field of a whole answer, null or not, and in a chunk those that it set; so does this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engine_adapter.torch_engine.choice import Choice, ChoiceDelta, Prompt
from engine_adapter.torch_engine.sequence import TokenLogprobs

MIN_LOGPROB = -9999.0
"""JSON has no -inf; OpenAI and vLLM write this."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TokenSpelling:
    """How tokens are written in logprobs."""

    text_of: Callable[[int], str]
    bytes_of: Callable[[int], bytes]
    as_token_ids: bool = False

    def spell(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_token_ids else self.text_of(token_id)


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every chunk and answer to one request has in common."""

    response_id: str
    model: str
    created: int

    def wrap(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.response_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def usage(num_prompt_tokens: int, num_completion_tokens: int, num_cached_tokens: int | None = None) -> Json:
    counts: Json = {
        "prompt_tokens": num_prompt_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "completion_tokens": num_completion_tokens,
    }
    if num_cached_tokens is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": num_cached_tokens}
    return counts


def clamp(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def completion_logprobs(
    entries: Sequence[tuple[int, TokenLogprobs | None]], spelling: TokenSpelling, first_offset: int
) -> Json:
    """Parallel lists, one entry a token; the sampled token always is among its top ones. A prompt's first has none."""
    offsets, logprobs, tokens, tops = [], [], [], []
    offset = first_offset
    for token_id, entry in entries:
        token = spelling.spell(token_id)
        offsets.append(offset)
        offset += len(token)
        tokens.append(token)
        logprobs.append(None if entry is None else clamp(entry.logprob))
        tops.append(
            None
            if entry is None
            else {token: clamp(entry.logprob)} | {spelling.spell(other): clamp(value) for other, value in entry.top}
        )
    return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": tokens, "top_logprobs": tops}


def chat_logprobs(entries: Iterable[TokenLogprobs], spelling: TokenSpelling) -> Json:
    return {
        "content": [
            _chat_token(entry.token_id, entry.logprob, spelling)
            | {"top_logprobs": [_chat_token(token_id, value, spelling) for token_id, value in entry.top]}
            for entry in entries
        ]
    }


def _chat_token(token_id: int, logprob: float, spelling: TokenSpelling) -> Json:
    return {
        "token": spelling.spell(token_id),
        "logprob": clamp(logprob),
        "bytes": list(spelling.bytes_of(token_id)),
    }


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None] | None, spelling: TokenSpelling
) -> list[Json | None] | None:
    """vLLM's own shape: per token a map from token id to logprob, rank and text."""
    if entries is None:
        return None
    return [None if entry is None else _prompt_position(entry, spelling) for entry in entries]


def _prompt_position(entry: TokenLogprobs, spelling: TokenSpelling) -> Json:
    position = {
        str(token_id): {"logprob": clamp(value), "rank": rank, "decoded_token": spelling.text_of(token_id)}
        for rank, (token_id, value) in enumerate(entry.top, start=1)
    }
    actual = {"logprob": clamp(entry.logprob), "rank": entry.rank, "decoded_token": spelling.text_of(entry.token_id)}
    return {str(entry.token_id): actual} | position


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """Answers to one /v1/completions request."""

    envelope: Envelope
    spelling: TokenSpelling
    with_logprobs: bool
    with_token_ids: bool
    echo: bool
    echo_only: bool
    prompt_text_of: Callable[[Prompt], str]

    def opening(self, choices: Sequence[Choice]) -> list[Json]:
        return []

    def chunk(self, delta: ChoiceDelta) -> Json:
        choice = delta.choice
        text, entries, token_ids = self._parts(delta.text, delta.token_ids, delta.logprobs, choice, delta.is_first)
        first_offset = choice.num_chars
        choice.num_chars += len(text)
        return self.envelope.wrap(
            "text_completion",
            [
                {
                    "index": choice.index,
                    "text": text,
                    "logprobs": completion_logprobs(entries, self.spelling, first_offset)
                    if self.with_logprobs
                    else None,
                    "finish_reason": delta.finish_reason,
                    "stop_reason": delta.stop_reason,
                    "prompt_token_ids": choice.prompt.token_ids if self.with_token_ids and delta.is_first else None,
                    "token_ids": token_ids if self.with_token_ids else None,
                }
            ],
        )

    def usage_chunk(self, counts: Json) -> Json:
        return self.envelope.wrap("text_completion", []) | {"usage": counts}

    def answer(self, choices: Sequence[Choice], counts: Json, kv_transfer_params: Json | None) -> Json:
        return self.envelope.wrap("text_completion", [self._choice(choice) for choice in choices]) | {
            "service_tier": None,
            "system_fingerprint": None,
            "usage": counts,
            "kv_transfer_params": kv_transfer_params,
        }

    def _choice(self, choice: Choice) -> Json:
        text, entries, token_ids = self._parts(choice.text, choice.token_ids, choice.logprobs, choice, True)
        return {
            "index": choice.index,
            "text": text,
            "logprobs": completion_logprobs(entries, self.spelling, 0) if self.with_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": token_ids if self.with_token_ids else None,
            "prompt_logprobs": prompt_logprobs(choice.prompt_logprobs, self.spelling),
            "prompt_token_ids": choice.prompt.token_ids if self.with_token_ids else None,
        }

    def _parts(
        self,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None,
        choice: Choice,
        is_first: bool,
    ) -> tuple[str, list[tuple[int, TokenLogprobs | None]], list[int]]:
        """The text and its tokens' logprobs, with the prompt before them where it is echoed; the generated ids."""
        entries: list[tuple[int, TokenLogprobs | None]] = [(entry.token_id, entry) for entry in logprobs or ()]
        if self.echo_only:
            text, entries = "", []
        if self.echo and is_first:
            text = self.prompt_text_of(choice.prompt) + text
            scored = choice.prompt_logprobs or [None] * len(choice.prompt.token_ids)
            entries = [*zip(choice.prompt.token_ids, scored, strict=True), *entries]
        return text, entries, list(token_ids)


@dataclass(frozen=True, slots=True)
class ChatShape:
    """Answers to one /v1/chat/completions request."""

    envelope: Envelope
    spelling: TokenSpelling
    with_logprobs: bool
    with_token_ids: bool
    role: str = "assistant"

    def opening(self, choices: Sequence[Choice]) -> list[Json]:
        """Every choice begins with a delta that only says the role."""
        return [self._role_chunk(choice) for choice in choices]

    def _role_chunk(self, choice: Choice) -> Json:
        opening = {
            "index": choice.index,
            "delta": {"role": self.role, "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self.envelope.wrap("chat.completion.chunk", [opening]) | {
            "prompt_token_ids": choice.prompt.token_ids if self.with_token_ids else None
        }

    def chunk(self, delta: ChoiceDelta) -> Json:
        choice: Json = {
            "index": delta.choice.index,
            "delta": {"content": delta.text},
            "logprobs": chat_logprobs(delta.logprobs or (), self.spelling) if self.with_logprobs else None,
            "finish_reason": delta.finish_reason,
            "token_ids": list(delta.token_ids) if self.with_token_ids else None,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        return self.envelope.wrap("chat.completion.chunk", [choice])

    def usage_chunk(self, counts: Json) -> Json:
        return self.envelope.wrap("chat.completion.chunk", []) | {"usage": counts}

    def answer(self, choices: Sequence[Choice], counts: Json, kv_transfer_params: Json | None) -> Json:
        first = choices[0]
        return self.envelope.wrap("chat.completion", [self._choice(choice) for choice in choices]) | {
            "service_tier": None,
            "system_fingerprint": None,
            "usage": counts,
            "prompt_logprobs": prompt_logprobs(first.prompt_logprobs, self.spelling),
            "prompt_token_ids": first.prompt.token_ids if self.with_token_ids else None,
            "kv_transfer_params": kv_transfer_params,
        }

    def _choice(self, choice: Choice) -> Json:
        return {
            "index": choice.index,
            "message": {
                "role": self.role,
                "content": choice.text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "tool_calls": [],
                "reasoning": None,
            },
            "logprobs": chat_logprobs(choice.logprobs, self.spelling) if self.with_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": list(choice.token_ids) if self.with_token_ids else None,
        }
