"""POST /v1/chat/completions, and what the chat template is given."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web

from engine_adapter.torch_engine.answering import Arrival, answer
from engine_adapter.torch_engine.api_errors import ApiError
from engine_adapter.torch_engine.hand_off import answer_release, asks_for_release, rejecting_releases_kv
from engine_adapter.torch_engine.model_service import ModelService
from engine_adapter.torch_engine.openai_requests import ChatMessage, ChatRequest, parse_body
from engine_adapter.torch_engine.openai_responses import ChatShape, Envelope, TokenSpelling


async def create_chat_completion(service: ModelService, arrival: Arrival, raw: bytes) -> web.StreamResponse:
    """Raises ApiError for whatever is refused before the first byte of an answer."""
    body = parse_body(ChatRequest, raw)
    async with rejecting_releases_kv(service, body):
        service.admit(body.model)
        response_id = f"chatcmpl-{arrival.request_id}"
        shape = ChatShape(
            envelope=Envelope(response_id, body.model or service.model_name, int(time.time())),
            spelling=TokenSpelling(
                service.tokenizer.token_text, service.tokenizer.token_bytes, bool(body.return_tokens_as_token_ids)
            ),
            with_logprobs=bool(body.logprobs),
            with_token_ids=bool(body.return_token_ids),
        )
        if asks_for_release(body):
            return await answer_release(service, arrival, body, shape)
        text = render_prompt(service, body.messages, body, documents=body.documents)
        prompt = await service.prompt(text, body, add_special_tokens=body.add_special_tokens)
        return await answer(service, arrival, body, [prompt], response_id, shape)


def render_prompt(
    service: ModelService, messages: Sequence[ChatMessage], request: Any, *, documents: Any = None
) -> str:
    """The chat template's text for a chat or tokenize request. Raises ApiError."""
    kwargs: dict[str, Any] = {
        **(request.chat_template_kwargs or {}),
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": request.continue_final_message,
    }
    if request.chat_template is not None:
        kwargs["chat_template"] = request.chat_template
    if documents is not None:
        kwargs["documents"] = documents
    conversation = [template_message(message, position) for position, message in enumerate(messages)]
    return service.tokenizer.render_chat(conversation, tools=request.tools or None, **kwargs)


def template_message(message: ChatMessage, position: int) -> dict[str, Any]:
    """A message as templates read it: one string of content, tool call arguments as objects. Raises ApiError."""
    fields = message.model_dump(exclude_unset=True)
    fields["content"] = _content_text(message.content, position)
    if message.tool_calls:
        fields["tool_calls"] = [_tool_call(call, position) for call in message.tool_calls]
    return fields


def _content_text(content: str | list[Any] | None, position: int) -> str:
    """Text parts are joined by line breaks, as vLLM does for templates that want a string."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        field = f"messages.{position}.content.{number}"
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ApiError(f"{field} must be an object with a type", error_type="Bad Request", param=field)
        elif part["type"] not in ("text", "input_text"):
            raise ApiError(f"{field}: this model takes text only, not {part['type'][:40]!r}", param=field)
        elif not isinstance(part.get("text"), str):
            raise ApiError(f"{field}.text must be a string", error_type="Bad Request", param=f"{field}.text")
        else:
            texts.append(part["text"])
    return "\n".join(texts)


def _tool_call(call: dict[str, Any], position: int) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = orjson.loads(function["arguments"] or "{}")
    except orjson.JSONDecodeError:
        field = f"messages.{position}.tool_calls"
        raise ApiError(f"{field}: function.arguments must be valid JSON", param=field) from None
    return {**call, "function": {**function, "arguments": arguments}}
