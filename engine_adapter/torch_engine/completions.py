"""POST /v1/completions."""

from __future__ import annotations

import time

from aiohttp import web

from engine_adapter.torch_engine.answering import Arrival, answer
from engine_adapter.torch_engine.api_errors import ApiError
from engine_adapter.torch_engine.hand_off import answer_release, asks_for_release, rejecting_releases_kv
from engine_adapter.torch_engine.model_service import ModelService
from engine_adapter.torch_engine.openai_requests import CompletionRequest, parse_body
from engine_adapter.torch_engine.openai_responses import CompletionShape, Envelope, TokenSpelling

MAX_CHOICES = 2048
"""Continuations one request may ask for, over all its prompts."""


async def create_completion(service: ModelService, arrival: Arrival, raw: bytes) -> web.StreamResponse:
    """Raises ApiError for whatever is refused before the first byte of an answer."""
    body = parse_body(CompletionRequest, raw)
    async with rejecting_releases_kv(service, body):
        service.admit(body.model)
        response_id = f"cmpl-{arrival.request_id}"
        shape = CompletionShape(
            envelope=Envelope(response_id, body.model or service.model_name, int(time.time())),
            spelling=TokenSpelling(
                service.tokenizer.token_text, service.tokenizer.token_bytes, bool(body.return_tokens_as_token_ids)
            ),
            with_logprobs=body.logprobs is not None,
            with_token_ids=bool(body.return_token_ids),
            echo=bool(body.echo),
            echo_only=body.echo_only,
            prompt_text_of=service.prompt_text,
        )
        if asks_for_release(body):
            return await answer_release(service, arrival, body, shape)
        sources = body.prompts()
        if len(sources) * body.num_choices > MAX_CHOICES:
            raise ApiError(f"{len(sources)} prompts with n={body.num_choices} are more than {MAX_CHOICES} choices")
        prompts = [await service.prompt(source, body, add_special_tokens=body.add_special_tokens) for source in sources]
        return await answer(service, arrival, body, prompts, response_id, shape)
