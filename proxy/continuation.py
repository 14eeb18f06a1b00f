"""Going on with an answer on another decoder, or on the same one after it gave up the KV (`stop_reason: "recomputed"`).

`Delivered` is what the client (or, of a whole answer, the proxy) has. `Continuation` is the call that asks for the
rest, and the edit that makes the rest the same answer. Token ids are the prompt where the engine returned them, of a
chat too, which then goes on as a completion (no chat route takes ids, and no completion images). Otherwise text is: a
completion's prompt with the text behind it, a chat's with the text as its last message and vLLM's
`continue_final_message`. What was generated is taken off both limits and off `min_tokens`.

Greedy answers go on as they would have. Sampled ones go on as a valid sample, not as the lost one: no engine returns
the state of its sampler. Where the rest could not be right in this sense, `NotExact` says why.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from proxy.image_parts import has_images
from proxy.openai_api import ApiCall
from proxy.sse import EVENT_END, name_of

Json = dict[str, Any]
COMPLETION_DEFAULT_TOKENS = 16  # OpenAI's and vLLM's, where a completion has no max_tokens at all
RECOMPUTED = b'"recomputed"'
_LAST_NAMES = frozenset((b"message_stop", b"response.completed", b"response.incomplete"))
# Fields whose effect depends on what was generated before, or on a state that is lost with the decoder.
_STATEFUL = (
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "presence_penalty"),
    *("frequency_penalty", "use_beam_search", "prompt_embeds", "suffix", "echo", "truncate_prompt_tokens"),
)


_OF_CHATS_ONLY = (
    *("messages", "max_completion_tokens", "chat_template", "chat_template_kwargs", "add_generation_prompt"),
    *("continue_final_message", "documents", "logprobs", "top_logprobs", "tools", "tool_choice", "response_format"),
    *("parallel_tool_calls", "reasoning_effort", "include_reasoning"),
)


class NotExact(Exception):
    """The answer cannot be continued; `reason` is a label for logs and metrics."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class Delivered:
    """One choice, as far as it came."""

    text: str = ""
    token_ids: list[int] | None = None
    """All of them, or None if the engine did not return the ids of all."""
    num_read_ids: int = 0
    """How many ids the text is made of; what comes after them was withheld (half a character)."""
    prompt_token_ids: list[int] | None = None
    ids_of_text: list[int] | None = None
    """A tokenizer's, where the engine returned none and the prompt is token ids (`needs_ids`)."""
    num_tokens: int = 0
    is_counted: bool = False
    """The engine has counted `num_tokens`; otherwise there are at least so many, for an event can carry several."""
    finish_reason: str | None = None
    done: bool = False
    first: Json = field(default_factory=dict)
    """The first event, for what all have in common; empty if there was none."""

    def add(self, choice: Json, said: Json) -> None:
        """`said` is a choice's delta or message, or the choice itself. Raises NotExact."""
        if choice.get("index") or choice.get("logprobs"):
            raise NotExact("logprobs" if choice.get("logprobs") else "several_choices")
        for key in ("tool_calls", "function_call", "reasoning", "reasoning_content", "refusal", "audio"):
            if said.get(key):
                raise NotExact("tool_call" if key in ("tool_calls", "function_call") else "reasoning")
        text = said.get("content") or said.get("text") or ""
        if type(text) is not str:
            raise NotExact("not_text")
        ids = choice.get("token_ids")
        if text or ids:
            self._add_tokens(text, ids)
        self.prompt_token_ids = choice.get("prompt_token_ids") or self.prompt_token_ids
        self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _add_tokens(self, text: str, ids: list[int] | None) -> None:
        if not self.num_tokens:
            self.token_ids = []
        if not ids:
            self.token_ids = None
        if self.token_ids is not None:
            self.token_ids += ids or ()
            self.num_read_ids = len(self.token_ids) if text else self.num_read_ids
        self.text += text
        self.num_tokens += len(ids) if ids else 1

    def count(self, answer: Json) -> None:
        """Take the engine's own count, where it comes with the answer or (continuous) with its events."""
        num_tokens = (answer.get("usage") or {}).get("completion_tokens")
        if self.token_ids is not None and self.num_tokens:
            self.is_counted = True
        elif type(num_tokens) is int:
            self.num_tokens, self.is_counted = num_tokens, True
        else:
            self.is_counted = False


def delivered_in(payload: bytes) -> Delivered:
    """What the whole events of a stream say. Raises NotExact."""
    found, start = Delivered(), 0
    for end in EVENT_END.finditer(payload):
        event, start = payload[start : end.start()], end.end()
        if not event.startswith(b"data:"):
            found.done = found.done or (event.startswith(b"event:") and name_of(event) in _LAST_NAMES)
            continue
        said = event[5:].strip()
        if said == b"[DONE]":
            found.done = True
            continue
        parsed = parsed_object(said)
        if parsed is None or "error" in parsed:
            raise NotExact("error_event")
        found.first = found.first or parsed
        found.prompt_token_ids = parsed.get("prompt_token_ids") or found.prompt_token_ids
        choices = parsed.get("choices") or []
        if len(choices) > 1:
            raise NotExact("several_choices")
        for choice in choices:
            found.add(choice, choice.get("delta") or choice)
        if choices:
            found.count(parsed)
    return found


def delivered_whole(answer: Json) -> Delivered:
    """What a whole answer that was given up says. Raises NotExact."""
    choices = answer.get("choices") or []
    if len(choices) != 1:
        raise NotExact("several_choices")
    found = Delivered(first=answer, prompt_token_ids=answer.get("prompt_token_ids"))
    found.add(choices[0], choices[0].get("message") or choices[0])
    found.finish_reason = None
    found.count(answer)
    return found


def parsed_object(data: bytes) -> Json | None:
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return parsed if type(parsed) is dict else None


def is_recomputed(answer: Json) -> bool:
    return any(choice.get("stop_reason") == "recomputed" for choice in answer.get("choices") or ())


class Continuation:
    """`call` asks for the rest of `original`, of which `delivered` is there. Raises NotExact.

    `num_prompt_tokens` is the engine's count for the original prompt, or None where no prefill said it."""

    __slots__ = ("_is_turned", "_num_dropped_ids", "call", "delivered", "num_prompt_tokens", "num_tokens", "original")

    def __init__(self, original: ApiCall, delivered: Delivered, num_prompt_tokens: int | None) -> None:
        check_call(original)
        self.original = original
        self.delivered = delivered
        self.num_prompt_tokens = num_prompt_tokens
        self._num_dropped_ids = 0
        self._is_turned = False
        if not delivered.num_tokens:
            self.num_tokens = 0
            self.call = original
            return
        self.num_tokens = delivered.num_tokens
        fields = dict(original.fields)
        self._set_prompt(fields)
        self.call = self._with_limits(fields)

    def _set_prompt(self, fields: Json) -> None:
        delivered, stops = self.delivered, _stops_of(fields)
        prompt: Any = fields.get("prompt")
        chat = self.original.route == "chat"
        keeps_chat = chat and (stops or fields.get("tools") or has_images(fields.get("messages")))
        if delivered.token_ids is not None and not keeps_chat:
            before = prompt if _is_ids(prompt) else delivered.prompt_token_ids
            if before is not None:
                self._is_turned = chat
                self._continue_ids(fields, before, stops)
                return
        text = delivered.text
        if "\ufffd" in text or (delivered.token_ids is not None and delivered.num_read_ids < len(delivered.token_ids)):
            raise NotExact("half_a_character")
        if any(text.endswith(stop[:length]) for stop in stops for length in range(1, len(stop))):
            raise NotExact("stop_string")
        if chat:
            fields["messages"] = _with_said(fields, text)
            fields.update(add_generation_prompt=False, continue_final_message=True)
        elif type(prompt) is str:
            fields["prompt"] = prompt + text
        elif delivered.ids_of_text is not None and _is_ids(prompt):
            fields["prompt"] = [*prompt, *delivered.ids_of_text]
        else:
            raise NotExact("no_token_ids")

    def _continue_ids(self, fields: Json, before: list[int], stops: list[str]) -> None:
        """Ids whose text was withheld are generated again: a detokenizer that starts behind them would lose it."""
        delivered = self.delivered
        assert delivered.token_ids is not None
        self._num_dropped_ids = len(delivered.token_ids) - delivered.num_read_ids
        if stops or (self._num_dropped_ids and not _is_greedy(fields)):
            raise NotExact("stop_string" if stops else "half_a_character")
        self.num_tokens = delivered.num_read_ids
        fields["prompt"] = [*before, *delivered.token_ids[: delivered.num_read_ids]]

    def _with_limits(self, fields: Json) -> ApiCall:
        num_tokens, route = self.num_tokens, self.original.route
        if route == "completions" and "max_tokens" not in fields:
            fields["max_tokens"] = COMPLETION_DEFAULT_TOKENS
        for key in ("max_tokens", "max_completion_tokens"):
            if type(limit := self.original.fields.get(key, fields.get(key))) is int:
                if limit <= num_tokens:
                    raise NotExact("nothing_left")
                fields[key] = limit - num_tokens
            elif limit is not None:
                raise NotExact("limits")  # "5" is a number to vLLM, and so is 5.0
        if type(least := self.original.fields.get("min_tokens")) is int:
            fields["min_tokens"] = max(0, least - num_tokens)
        limit = fields.get("max_completion_tokens") or fields.get("max_tokens")
        if self._is_turned:
            for key in _OF_CHATS_ONLY:
                fields.pop(key, None)
            fields["max_tokens"], route = limit, "completions"
        num_prompt_tokens = self.original.num_prompt_tokens + num_tokens
        body = orjson.dumps(fields)
        return replace(
            self.original,
            route=route,
            body=body,
            outline=fields,
            long=None,
            max_new_tokens=limit,
            num_prompt_tokens=num_prompt_tokens,
        )

    def recount(self, num_tokens: int) -> None:
        """The prefiller counted `num_tokens` of prompt more than at first: that is how many there were, unless the
        engine itself counted them or there were more events (text can be written with fewer tokens than it was).
        Raises NotExact."""
        if num_tokens > self.num_tokens > 0 and not self.delivered.is_counted:
            self.num_tokens = num_tokens
            self.call = self._with_limits(dict(self.call.fields))

    # --- the rest's events, made the same answer

    def edited(self, answer: Json) -> Json | None:
        """An event of the rest as the client is to get it; None if it has it already."""
        first = self.delivered.first
        for key in ("id", "created", "model", "object"):
            if key in first and key in answer:
                answer[key] = first[key]
        if first and answer.pop("prompt_token_ids", None) is not None:
            answer["prompt_token_ids"] = None
        if usage := answer.get("usage"):
            self._correct(usage)
        choices = answer.get("choices")
        if not choices or not first:
            return answer
        says = bool(usage)
        for choice in choices:
            says = self._edit_choice(choice) or says
        return answer if says else None

    def _edit_choice(self, choice: Json) -> bool:
        """Whether it says anything that is new to the client."""
        if self._is_turned:
            choice["delta"] = {"content": choice.pop("text", "")}
            choice.pop("prompt_token_ids", None)
        elif "prompt_token_ids" in choice:
            choice["prompt_token_ids"] = None
        delta = choice.get("delta")
        if delta:
            delta.pop("role", None)
        if (ids := choice.get("token_ids")) and self._num_dropped_ids:
            num_known = min(self._num_dropped_ids, len(ids))
            self._num_dropped_ids -= num_known
            choice["token_ids"] = ids[num_known:]
        said = choice if delta is None else delta
        told = any(value for key, value in said.items() if key not in ("index", "logprobs", "finish_reason"))
        return told or choice.get("finish_reason") is not None or bool(choice.get("token_ids"))

    def _correct(self, usage: Json) -> None:
        """What was generated before counts as generated, not as prompt."""
        num_new = usage.get("completion_tokens") or 0
        num_prompt = self.num_prompt_tokens
        if num_prompt is None:
            num_prompt = (usage.get("prompt_tokens") or 0) - self.num_tokens
        usage["prompt_tokens"] = num_prompt
        usage["completion_tokens"] = self.num_tokens + num_new
        usage["total_tokens"] = num_prompt + self.num_tokens + num_new

    def joined(self, answer: Json) -> Json:
        """The whole answer out of `delivered` and its rest, edited in place."""
        delivered = self.delivered
        choice = answer["choices"][0]
        if self._is_turned:
            choice["message"] = {**delivered.first["choices"][0]["message"], "content": choice.pop("text")}
            choice.pop("prompt_token_ids", None)
            answer["prompt_token_ids"] = delivered.prompt_token_ids
        said = choice.get("message") or choice
        key = "content" if "content" in said else "text"
        said[key] = delivered.text + (said.get(key) or "")
        if delivered.token_ids is not None and choice.get("token_ids") is not None:
            choice["token_ids"] = delivered.token_ids[: delivered.num_read_ids] + choice["token_ids"]
        holder = choice if self.original.route == "completions" else answer
        if holder.get("prompt_token_ids") is not None:
            holder["prompt_token_ids"] = delivered.prompt_token_ids
        for name in ("id", "created", "model", "object"):
            if name in delivered.first:
                answer[name] = delivered.first[name]
        if usage := answer.get("usage"):
            self._correct(usage)
        return answer


def needs_ids(call: ApiCall, delivered: Delivered) -> bool:
    """Whether text cannot be put behind the prompt, which is token ids."""
    return call.route == "completions" and _is_ids(call.outline.get("prompt")) and delivered.token_ids is None


def check_call(call: ApiCall) -> None:
    """Raises NotExact for a request whose answers are never continued."""
    fields = call.outline
    get = fields.get
    if call.route not in ("completions", "chat"):
        raise NotExact("route")
    if call.own_kv_transfer_params:
        raise NotExact("own_kv_transfer_params")
    if call.num_prompts > 1 or call.num_choices > 1 or (get("best_of") or 1) != 1:
        raise NotExact("several_choices")
    if get("logprobs") not in (None, False) or type(get("logprobs")) is int or get("prompt_logprobs") is not None:
        raise NotExact("logprobs")
    form = get("response_format")
    if form is not None and not (type(form) is dict and form.get("type") == "text"):
        raise NotExact("guided_decoding")
    if get("tools") and get("tool_choice") not in (None, "auto", "none"):
        raise NotExact("guided_decoding")
    for key in _STATEFUL:
        if get(key):
            raise NotExact("guided_decoding" if key.startswith(("guided", "structured")) else key)


def _with_said(fields: Json, text: str) -> list[Any]:
    """The messages with `text` as the end of the last one, which is the assistant's."""
    messages = fields["messages"]
    if fields.get("continue_final_message"):
        last = messages[-1]
        if type(last) is not dict or type(last.get("content")) is not str:
            raise NotExact("content_parts")
        return [*messages[:-1], {**last, "content": last["content"] + text}]
    if fields.get("add_generation_prompt") is False:
        raise NotExact("no_generation_prompt")
    return [*messages, {"role": "assistant", "content": text}]


def _stops_of(fields: Json) -> list[str]:
    stop = fields.get("stop")
    return [one for one in (stop if type(stop) is list else [stop]) if type(one) is str and one]


def _is_ids(prompt: Any) -> bool:
    return type(prompt) is list and bool(prompt) and type(prompt[0]) is int


def _is_greedy(fields: Json) -> bool:
    return fields.get("temperature") == 0
