"""One request as many, and many answers as one: the rules, without I/O.

A call with several prompts or choices becomes children with one of each; child `p * n + k` is choice `k` of prompt
`p`, as vLLM numbers choices. Their answers are joined so that the client reads what one engine would have said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from proxy import sse
from proxy.openai_api import ApiCall

Json = dict[str, Any]


def child_bodies(call: ApiCall) -> list[bytes]:
    """One body a child. Choice `k` counts its seed up by `k`, as vLLM does for the choices of one prompt."""
    fields = dict(call.fields)
    seed = fields.get("seed")
    if "n" in fields:
        fields["n"] = 1
    field = "prompt" if fields.get("prompt") is not None else "prompt_embeds"
    prompts = fields[field] if call.num_prompts > 1 else [fields.get(field)]
    bodies = []
    for prompt in prompts:
        if call.num_prompts > 1:
            fields[field] = prompt
        for k in range(call.num_choices):
            if seed is not None:
                fields["seed"] = seed + k
            bodies.append(orjson.dumps(fields))
    return bodies


def joined_name(name: object, child_id: str, request_id: str) -> str:
    """The answer's id, made as the engine made the child's: its prefix and the request's id."""
    text = str(name)
    at = text.find(child_id)
    return text[:at] + request_id if at >= 0 else text


def joined_answer(answers: Sequence[bytes], num_choices: int, child_id: str, request_id: str) -> bytes:
    """The whole answer out of the children's, in their order; `child_id` is the first's. Raises ValueError for one
    that is no answer."""
    parsed = [_object(answer) for answer in answers]
    choices = []
    for index, answer in enumerate(parsed):
        (choice,) = answer["choices"]
        choices.append({**choice, "index": index})
    joined = {**parsed[0], "id": joined_name(parsed[0].get("id"), child_id, request_id), "choices": choices}
    if "usage" in joined:
        joined["usage"] = joined_usage([answer.get("usage") for answer in parsed], num_choices)
    if "kv_transfer_params" in joined:
        joined["kv_transfer_params"] = None
    return orjson.dumps(joined)


def _object(answer: bytes) -> Json:
    try:
        parsed = orjson.loads(answer)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"an answer is not JSON: {error}") from None
    choices = parsed.get("choices") if type(parsed) is dict else None
    if type(choices) is not list or len(choices) != 1 or type(choices[0]) is not dict:
        raise ValueError("an answer does not have one choice")
    return dict(parsed)


def joined_usage(usages: Sequence[object], num_choices: int) -> Json | None:
    """Every prompt counts once however many choices it got, whatever was generated counts all."""
    known = [one for one in usages if type(one) is dict]
    if len(known) != len(usages):
        return None
    first_of_each = known[::num_choices]
    joined = {**known[0]}
    for key, value in known[0].items():
        rows = known if key.startswith("completion_tokens") else first_of_each
        if type(value) is int:
            joined[key] = sum(row.get(key) or 0 for row in rows)
        elif any(type(row.get(key)) is dict for row in rows):
            joined[key] = _added([row.get(key) for row in rows])
    if "total_tokens" in joined:
        joined["total_tokens"] = joined.get("prompt_tokens", 0) + joined.get("completion_tokens", 0)
    return joined


def _added(details: Sequence[Any]) -> Json:
    total: Json = {}
    for one in details:
        for key, value in (one or {}).items():
            total[key] = total.get(key, 0) + value if type(value) is int else value
    return total


class EventSplitter:
    """The events of one stream, out of bytes in any pieces."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that are complete now, each without the empty line that ends it."""
        data = self._rest + data
        events, start = [], 0
        for end in sse.EVENT_END.finditer(data):
            events.append(data[start : end.start()])
            start = end.end()
        self._rest = data[start:]
        return events


class StreamJoiner:
    """The children's events as one stream: indices and ids rewritten, one usage, one end."""

    def __init__(self, child_ids: Sequence[str], num_choices: int, request_id: str) -> None:
        self._child_ids = child_ids
        self._num_choices = num_choices
        self._request_id = request_id
        self._envelope: Json = {}
        self._usages: list[Json | None] = [None] * len(child_ids)
        self._usage_chunk: Json | None = None

    def event(self, index: int, event: bytes) -> bytes:
        """What child `index`'s event is in the joined stream: with its end, or empty where it is not for now."""
        if not event.startswith(b"data:"):
            return b""  # a comment that keeps the connection alive
        data = event[5:].strip()
        if data == b"[DONE]":
            return b""
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            chunk = None
        choices = chunk.get("choices") if type(chunk) is dict else None
        if type(choices) is not list:
            return event + b"\n\n"
        if not self._envelope:
            name = joined_name(chunk.get("id"), self._child_ids[index], self._request_id)
            self._envelope = {"id": name} | ({"created": chunk["created"]} if "created" in chunk else {})
        chunk.update(self._envelope)
        if not choices and chunk.get("usage"):
            self._usages[index] = chunk["usage"]
            self._usage_chunk = self._usage_chunk or chunk
            return b""
        for choice in choices:
            choice["index"] = index
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def end(self) -> bytes:
        """What follows when all have ended: the usage if it was asked for, and the end."""
        if self._usage_chunk is None:
            return sse.DONE
        usage = joined_usage(self._usages, self._num_choices)
        return b"data: " + orjson.dumps({**self._usage_chunk, "usage": usage}) + b"\n\n" + sse.DONE
