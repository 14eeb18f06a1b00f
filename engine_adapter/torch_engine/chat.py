"""POST /v1/chat/completions, and what the chat template is given."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web

from engine_adapter.kv_transfer_params import wants_remote_prefill
from engine_adapter.torch_engine.answering import Arrival, answer
from engine_adapter.torch_engine.api_errors import ApiError
from engine_adapter.torch_engine.choice import Prompt
from engine_adapter.torch_engine.content_parts import ImageSource, Part, read_parts
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
        prompt = await chat_prompt(service, body)
        return await answer(service, arrival, body, [prompt], response_id, shape)


async def chat_prompt(service: ModelService, body: ChatRequest) -> Prompt:
    """Raises ApiError."""
    text, sources = render_prompt(service, body.messages, body, documents=body.documents)
    if not sources:
        return await service.prompt(text, body, add_special_tokens=body.add_special_tokens)
    service.num_in_flight += 1  # an instance that drains waits for what has been fetched for
    try:
        token_ids, images = await service.image_prompt(
            text,
            sources,
            add_special_tokens=body.add_special_tokens,
            prepare=not wants_remote_prefill(body.kv_transfer_params),
        )
    finally:
        service.num_in_flight -= 1
    if body.truncate_prompt_tokens is not None and 0 <= body.truncate_prompt_tokens < len(token_ids):
        raise ApiError("a prompt with images can't be truncated", param="truncate_prompt_tokens")
    return Prompt(token_ids, text, images)


def render_prompt(
    service: ModelService, messages: Sequence[ChatMessage], request: Any, *, documents: Any = None
) -> tuple[str, list[ImageSource]]:
    """The chat template's text for a chat or tokenize request, and the images it speaks of. Raises ApiError."""
    kwargs: dict[str, Any] = {
        **(request.chat_template_kwargs or {}),
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": request.continue_final_message,
    }
    if request.chat_template is not None:
        kwargs["chat_template"] = request.chat_template
    if documents is not None:
        kwargs["documents"] = documents
    sees, name = service.image_reader is not None, service.model_name
    parts = [read_parts(message.content, number, name, sees=sees) for number, message in enumerate(messages)]
    conversation = [
        template_message(message, number, parts[number], sees=sees) for number, message in enumerate(messages)
    ]
    text = service.tokenizer.render_chat(conversation, tools=request.tools or None, **kwargs)
    return text, [part for of_message in parts for part in of_message if isinstance(part, ImageSource)]


def template_message(message: ChatMessage, position: int, parts: list[Part], *, sees: bool) -> dict[str, Any]:
    """A message as templates read it: content as one string, tool call arguments as objects. Raises ApiError.

    Text parts are joined by line breaks, as vLLM does for templates that want a string. The template of a model that
    sees gets a list of parts as a list.
    """
    fields = message.model_dump(exclude_unset=True)
    if sees and isinstance(message.content, list):
        fields["content"] = [
            {"type": "image"} if isinstance(part, ImageSource) else {"type": "text", "text": part} for part in parts
        ]
    else:
        fields["content"] = "\n".join(part for part in parts if isinstance(part, str))
    if message.tool_calls:
        fields["tool_calls"] = [_tool_call(call, position) for call in message.tool_calls]
    return fields


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
