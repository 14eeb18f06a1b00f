"""What a mock engine says: deterministic bytes, so that whoever reads an answer can tell that it is the right one.

Token number i of a prompt is `" <fingerprint>:<i>"`, 15 characters, always. A prompt that ends in such a token is taken
for a continuation and goes on at i+1 under the same fingerprint: text continued on another engine stays checkable.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace
from typing import Any

import orjson

CREATED = 1_700_000_000
CHARS_PER_TOKEN = 4
DONE_EVENT = b"data: [DONE]\n\n"
# Ids of generated tokens: a mark, the fingerprint, the index. Below 2**53, so that every JSON reader takes them.
ID_MARK, INDEX_BITS = 1 << 52, 20
_TOKENS_AT_END = re.compile(r"(?: [0-9a-f]{8}:\d{5})+$")
_TOKEN_AT_END = re.compile(r" ([0-9a-f]{8}):(\d{5})$")


@dataclass(frozen=True, slots=True)
class Script:
    """What is to be generated: tokens `first` to `first + num_tokens - 1` of `fingerprint`."""

    fingerprint: str
    first: int
    num_tokens: int
    num_prompt_tokens: int

    def token(self, index: int) -> str:
        return f" {self.fingerprint}:{self.first + index:05d}"

    def token_id(self, index: int) -> int:
        return ID_MARK | int(self.fingerprint, 16) << INDEX_BITS | (self.first + index)

    def text(self) -> str:
        return "".join(self.token(index) for index in range(self.num_tokens))


def prompt_of(fields: dict[str, Any]) -> Any:
    return next((fields[name] for name in ("messages", "input") if name in fields), fields.get("prompt"))


def prompts_of(fields: dict[str, Any]) -> list[Any]:
    """The prompts of a completion, each in the form it was given; anything else is one."""
    prompt = fields.get("prompt")
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list))
    return list(prompt) if several and "messages" not in fields else [prompt_of(fields)]  # type: ignore[arg-type]


def scripts_of(fields: dict[str, Any], num_tokens: int | None = None) -> list[Script]:
    """One script a prompt."""
    if prompts_of(fields) == [prompt_of(fields)]:
        return [script_of(fields, num_tokens)]
    return [script_of({**fields, "prompt": one}, num_tokens) for one in prompts_of(fields)]


def script_of(fields: dict[str, Any], num_tokens: int | None = None) -> Script:
    """The script of a request's parsed body. A list of prompts counts as one (see `scripts_of`)."""
    prompt = prompt_of(fields)
    encoded = orjson.dumps(prompt)
    num_prompt_tokens = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], int) else 0
    if num_tokens is None:
        names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
        num_tokens = int(next((fields[name] for name in names if fields.get(name)), 16))
    fingerprint, first = f"{zlib.crc32(encoded):08x}", 0
    match = _TOKEN_AT_END.search(_last_text(prompt))
    if match:
        fingerprint, first = match[1], int(match[2]) + 1
        num_prompt_tokens = _num_tokens_of_continued(prompt)
    elif num_prompt_tokens and isinstance(prompt[-1], int) and prompt[-1] >= ID_MARK:
        fingerprint = f"{(prompt[-1] ^ ID_MARK) >> INDEX_BITS:08x}"
        first = (prompt[-1] & ((1 << INDEX_BITS) - 1)) + 1
    return Script(fingerprint, first, num_tokens, num_prompt_tokens or len(encoded) // CHARS_PER_TOKEN + 1)


def _last_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt[-16:]
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        content = prompt[-1].get("content")
        return content[-16:] if isinstance(content, str) else ""
    return ""


def _num_tokens_of_continued(prompt: Any) -> int:
    """The prompt's own tokens and one for each that was generated: what an engine would count."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    said = _TOKENS_AT_END.search(text)
    num_said = (len(said[0]) if said else 0) // 15
    rest = text[: len(text) - num_said * 15] if isinstance(prompt, str) else prompt[:-1]
    return num_said + len(orjson.dumps(rest)) // CHARS_PER_TOKEN + 1


def tokens_of(text: str) -> list[int]:
    """The ids of a text that is all generated tokens, as a tokenizer says them; of another, one a character."""
    found = re.findall(r" ([0-9a-f]{8}):(\d{5})", text)
    return [ID_MARK | int(one, 16) << INDEX_BITS | int(index) for one, index in found] or [ord(one) for one in text]


def given_up(script: Script, num_tokens: int, chat: bool, name: str, model: str) -> bytes:
    """A whole answer of a decoder that was preempted after `num_tokens`."""
    answer = orjson.loads(whole_answer(replace(script, num_tokens=num_tokens), chat, name, model))
    answer["choices"][0].update(finish_reason="stop", stop_reason="recomputed")
    return orjson.dumps(answer)


def answer_id(chat: bool, request_id: str) -> str:
    """vLLM's rule: the request id with the endpoint's prefix."""
    return ("chatcmpl-" if chat else "cmpl-") + request_id


def usage_of(script: Script, num_choices: int, num_cached_tokens: int) -> dict[str, Any]:
    num_completion_tokens = script.num_tokens * num_choices
    return {
        "prompt_tokens": script.num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": script.num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }


def whole_answer(
    script: Script, chat: bool, name: str, model: str, num_choices: int = 1, num_cached_tokens: int = 0, **more: Any
) -> bytes:
    """The JSON body of an answer that is not streamed. `name` is its id; `more` are further top-level members."""
    text = script.text()
    said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    choices = [
        {"index": k, **said, "logprobs": None, "finish_reason": "length", "stop_reason": None}
        for k in range(num_choices)
    ]
    return orjson.dumps(
        {
            "id": name,
            "object": "chat.completion" if chat else "text_completion",
            "created": CREATED,
            "model": model,
            "choices": choices,
            "usage": usage_of(script, num_choices, num_cached_tokens),
            **more,
        }
    )


class EventTemplate:
    """The SSE events of one stream, each the same length but the last: one formatting a token."""

    def __init__(
        self,
        script: Script,
        chat: bool,
        name: str,
        model: str,
        num_choices: int,
        num_cached_tokens: int,
        usage: bool,
        first_index: int = 0,
    ) -> None:
        self.script = script
        self._indices = range(first_index, first_index + num_choices)
        self.num_choices = num_choices
        self.with_ids = False
        """Events carry the ids of their tokens, the first one the prompt's too (`return_token_ids`)."""
        self._opening = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
            orjson.dumps(name),
            b"chat.completion.chunk" if chat else b"text_completion",
            CREATED,
            orjson.dumps(model),
        )
        text = b'"delta":{"content":"%b"}' if chat else b'"text":"%b"'
        self._usage = orjson.dumps(usage_of(script, num_choices, num_cached_tokens)) if usage else None
        self._chat = chat
        head, tail = text.split(b"%b")
        self._heads = [self._opening + b'{"index":%d,' % k + head for k in self._indices]
        self._tail = tail + b',"logprobs":null,"finish_reason":null}]}\n\n'
        self._last_tail = tail + b',"logprobs":null,"finish_reason":"length","stop_reason":null}]}\n\n'

    def first_events(self) -> list[bytes]:
        """Chat streams open with a chunk that carries the role alone."""
        if not self._chat:
            return []
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        return [self._opening + b'{"index":%d,' % k + delta for k in self._indices]

    def token_events(self, index: int) -> list[bytes]:
        script = self.script
        tail = self._last_tail if index + 1 == script.num_tokens else self._tail
        token = b" %b:%05d" % (script.fingerprint.encode(), script.first + index)
        if self.with_ids:
            tail = b'%b,"token_ids":[%d],"prompt_token_ids":%b}]}\n\n' % (
                tail.removesuffix(b"}]}\n\n"),
                script.token_id(index),
                orjson.dumps([1] * script.num_prompt_tokens) if index == 0 else b"null",
            )
        return [head + token + tail for head in self._heads]

    def recomputed_event(self) -> bytes:
        """As vllm-ascend ends a request that it has preempted on a decoder: no token, and a reason of its own."""
        return self._heads[0] + self._last_tail.replace(
            b'"finish_reason":"length","stop_reason":null', b'"finish_reason":"stop","stop_reason":"recomputed"'
        )

    def last_events(self) -> list[bytes]:
        if self._usage is None:
            return [DONE_EVENT]
        return [self.usage_event(self._usage), DONE_EVENT]

    def usage_event(self, usage: bytes) -> bytes:
        return self._opening + b'],"usage":' + usage + b"}\n\n"

    def whole(self) -> bytes:
        """Every byte of the stream's body."""
        events = self.first_events()
        for index in range(self.script.num_tokens):
            events += self.token_events(index)
        return b"".join(events + self.last_events())
