"""The story of a generating request, the same for completions and chat: plan, run, and say it, streamed or whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from aiohttp import web

from engine_adapter.kv_transfer_params import wants_remote_prefill
from engine_adapter.torch_engine.api_errors import ApiError
from engine_adapter.torch_engine.choice import Choice, ChoiceDelta, Prompt
from engine_adapter.torch_engine.generation import Generation
from engine_adapter.torch_engine.model_service import ModelService
from engine_adapter.torch_engine.openai_requests import GenerationRequest
from engine_adapter.torch_engine.openai_responses import Json, usage
from engine_adapter.torch_engine.streaming import EventStream


class AnswerShape(Protocol):
    """What tells a completion's answer from a chat's."""

    def opening(self, choices: Sequence[Choice]) -> list[Json]:
        """Chunks before the first delta."""

    def chunk(self, delta: ChoiceDelta) -> Json: ...

    def usage_chunk(self, counts: Json) -> Json: ...

    def answer(self, choices: Sequence[Choice], counts: Json, kv_transfer_params: Json | None) -> Json: ...


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the HTTP side knows of a request."""

    http_request: web.BaseRequest
    request_id: str
    """X-Request-Id, the client's or ours."""
    at: float
    """Event loop time."""

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Request-Id": self.request_id}


async def answer(
    service: ModelService,
    arrival: Arrival,
    body: GenerationRequest,
    prompts: Sequence[Prompt],
    response_id: str,
    shape: AnswerShape,
) -> web.StreamResponse:
    """Run a request to its end. Raises ApiError as long as nothing has been sent."""
    service.num_in_flight += 1
    try:
        async with service.generate(body, prompts, response_id, arrival.at) as generation:
            if body.stream:
                return await _stream(arrival, body, prompts, shape, generation)
            await generation.run_to_end()
            whole = shape.answer(
                generation.choices, _usage(body, prompts, generation.choices), _offered(generation.choices)
            )
            response = await send_json(arrival, whole)
            generation.mark_delivered()
            return response
    finally:
        service.num_in_flight -= 1


async def send_json(arrival: Arrival, content: dict[str, Any]) -> web.Response:
    """Write a whole answer now, so that the caller knows it left. Raises ConnectionError where the client is gone."""
    response = web.Response(body=orjson.dumps(content), content_type="application/json", headers=arrival.headers)
    await response.prepare(arrival.http_request)
    await response.write_eof()
    return response


async def _stream(
    arrival: Arrival,
    body: GenerationRequest,
    prompts: Sequence[Prompt],
    shape: AnswerShape,
    generation: Generation,
) -> web.StreamResponse:
    stream = EventStream(arrival.http_request, arrival.headers)
    try:
        while not generation.finished:
            deltas = await generation.next_deltas()
            events = [] if stream.started else shape.opening(generation.choices)
            for delta in deltas:
                chunk = shape.chunk(delta)
                if body.continuous_usage:
                    chunk["usage"] = usage(len(delta.choice.prompt.token_ids), delta.num_tokens)
                events.append(chunk)
            await stream.send(events)
        if body.include_usage:
            await stream.send([shape.usage_chunk(_usage(body, prompts, generation.choices))])
    except ApiError as error:
        if not stream.started:
            raise
        await stream.fail(error)
    return await stream.end()


def _usage(body: GenerationRequest, prompts: Sequence[Prompt], choices: Sequence[Choice]) -> Json:
    """Every prompt once, however many continuations it got.

    Cached tokens are the prefiller's where the prompt was computed elsewhere, as in vLLM.
    """
    num_cached_tokens = choices[0].num_cached_tokens
    params = body.kv_transfer_params
    if params is not None and wants_remote_prefill(params):
        elsewhere = params.get("remote_prefill_cached_tokens")
        if isinstance(elsewhere, int):
            num_cached_tokens = elsewhere
    return usage(
        sum(len(prompt.token_ids) for prompt in prompts),
        sum(len(choice.token_ids) for choice in choices),
        num_cached_tokens,
    )


def _offered(choices: Sequence[Choice]) -> Json | None:
    return next((choice.kv_transfer_params for choice in choices if choice.kv_transfer_params is not None), None)
