"""What only the prefiller knows of a prompt, put into the decoder's answer: cached tokens, and logprobs of the prompt.

Bytes are searched before anything is parsed: an answer that is right already is not touched. A name in quotes and a
colon cannot stand inside a JSON string, whose quotes are escaped, so what is found is a member.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from proxy.openai_api import ApiCall

Json = dict[str, Any]
_CACHED = re.compile(rb'"cached_tokens"\s*:\s*(\d+)')
_CACHE_READ = re.compile(rb'"cache_read_input_tokens"\s*:\s*(\d+)')
_FLAT_USAGE = re.compile(rb'"usage"\s*:\s*(\{[^{}]*\})')
_PROMPT_TOKENS = re.compile(rb'"usage"\s*:\s*\{[^{}]*?"prompt_tokens"\s*:\s*(\d+)')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_NO_DETAILS = re.compile(rb'"(prompt_tokens_details|input_tokens_details)"\s*:\s*null')
# An engine's words on limits that the prefill leg has rewritten: about one token, where the client asked for more.
_ABOUT_LIMITS = re.compile(rb"(?:max|min)_[a-z_]*tokens|output tokens|context length")


def cached_tokens_of(prefill_answer: bytes, kv: Json | None) -> int:
    """Tokens of the prompt that the prefiller had in its caches; 0 if it does not say, as the seeds' proxy has it.

    vLLM 0.32 and our engine say it beside the KV, the others in the usage alone."""
    told = kv.get("remote_prefill_cached_tokens") if kv else None
    if type(told) is int:
        return told
    at = prefill_answer.rfind(b'"cached_tokens"')
    found = _CACHED.match(prefill_answer, at) if at >= 0 else _CACHE_READ.search(prefill_answer)
    return int(found[1]) if found else 0


def prompt_tokens_of(prefill_answer: bytes) -> int | None:
    """How many tokens the prompt has by the engine's count; None where it does not say."""
    found = _PROMPT_TOKENS.search(prefill_answer)
    return int(found[1]) if found else None


def with_cached_tokens(answer: bytes, num_cached: int) -> bytes:
    """`answer` with the prefiller's number in its usage, where it has one; the same object if nothing is to change.

    The decoder counts the KV it was sent as cached, which is not what the client pays for."""
    at = answer.rfind(b'"cached_tokens"')
    if at >= 0:
        if answer.startswith(b":%d}" % num_cached, at + 15):
            return answer
        found = _CACHED.match(answer, at)
        if found is None or int(found[1]) == num_cached:
            return answer
        return b"%b%d%b" % (answer[: found.start(1)], num_cached, answer[found.end(1) :])
    if num_cached and (nothing := _NO_DETAILS.search(answer)) is not None:
        start, end = nothing.span()
        return b'%b"%b":{"cached_tokens":%d}%b' % (answer[:start], nothing[1], num_cached, answer[end:])
    if b'"cache_read_input_tokens"' in answer:
        edited = _FLAT_USAGE.sub(lambda found: _with_cache_read(found, num_cached), answer)
        return edited if edited != answer else answer
    return answer


def _with_cache_read(found: re.Match[bytes], num_cached: int) -> bytes:
    """Anthropic's usage: what was cached does not count as input, so the sum of both stays."""
    usage = orjson.loads(found[1])
    read, num_input = usage.get("cache_read_input_tokens"), usage.get("input_tokens")
    if type(read) is not int or type(num_input) is not int or read == num_cached:
        return found[0]
    usage["cache_read_input_tokens"] = num_cached
    usage["input_tokens"] = max(0, num_input + read - num_cached)
    return b'"usage":' + orjson.dumps(usage)


def says_usage(prefill_answer: bytes) -> bool:
    return _USAGE.search(prefill_answer) is not None


def speaks_of_limits(error: bytes) -> bool:
    return _ABOUT_LIMITS.search(error) is not None


def with_scored_prompt(call: ApiCall, prefill_answer: bytes, answer: bytes) -> bytes:
    """`answer`, which knows nothing of the prompt, with the prompt's logprobs, and its text where it is echoed, out of
    the prefiller's. Raises ValueError where either is not what was asked for."""
    scored, told = orjson.loads(prefill_answer), orjson.loads(answer)  # orjson.JSONDecodeError is a ValueError
    try:
        source, choice = scored["choices"][0], told["choices"][0]
        holder, target = (scored, told) if call.route == "chat" else (source, choice)
        if "prompt_logprobs" in holder:
            target["prompt_logprobs"] = holder["prompt_logprobs"]
        if call.outline.get("echo"):
            _echo(call, source, choice)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"an answer lacks what the prompt's logprobs belong to: {error!r}") from None
    return orjson.dumps(told)


def _echo(call: ApiCall, source: Json, choice: Json) -> None:
    """Put the prompt before the choice: `source` is prompt and one generated token, which is left out."""
    scores = source.get("logprobs")
    if scores is None:
        choice["text"] = _prompt_text(call, source["text"], "") + choice["text"]
        return
    tokens, offsets = scores["tokens"], scores["text_offset"]
    base = offsets[-1] if offsets else 0
    choice["text"] = _prompt_text(call, source["text"], tokens[-1]) + choice["text"]
    own = choice["logprobs"]
    for key, values in scores.items():
        mine = own[key]
        if values is None or mine is None:
            continue
        own[key] = values[:-1] + ([base + offset for offset in mine] if key == "text_offset" else mine)


def _prompt_text(call: ApiCall, text: str, generated: str) -> str:
    prompt = call.fields.get("prompt")
    if type(prompt) is list and len(prompt) == 1:
        prompt = prompt[0]
    if type(prompt) is str and text.startswith(prompt):
        return prompt
    return text[: len(text) - len(generated)] if text.endswith(generated) else text
