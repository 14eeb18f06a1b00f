"""The HTTP side of a KV hand-off that comes to nothing: release on request, and release of what a refusal orphans."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from engine_adapter.kv_transfer_params import wants_remote_prefill
from engine_adapter.torch_engine.answering import AnswerShape, Arrival, send_json
from engine_adapter.torch_engine.api_errors import ApiError
from engine_adapter.torch_engine.choice import Choice, Prompt
from engine_adapter.torch_engine.detokenizer import ByteTextDecoder, Detokenizer
from engine_adapter.torch_engine.model_service import ModelService
from engine_adapter.torch_engine.openai_requests import GenerationRequest
from engine_adapter.torch_engine.openai_responses import usage

logger = logging.getLogger(__name__)


def asks_for_release(body: GenerationRequest) -> bool:
    """True where nobody wants this KV any more: it is to be dropped, nothing to be generated."""
    return bool((body.kv_transfer_params or {}).get("release_only"))


async def answer_release(
    service: ModelService, arrival: Arrival, body: GenerationRequest, shape: AnswerShape
) -> web.StreamResponse:
    """Drop the KV and answer at once, with an empty completion that cost no token."""
    service.release_kv(body.kv_transfer_params or {})
    choice = Choice(0, Prompt([]), "", Detokenizer(ByteTextDecoder(lambda _: b"")), finish_reason="stop")
    return await send_json(arrival, shape.answer([choice], usage(0, 0), None))


@asynccontextmanager
async def rejecting_releases_kv(service: ModelService, body: GenerationRequest) -> AsyncIterator[None]:
    """A request refused for its own fault (4xx) is not sent again, so its KV is nobody's: the producer is told.

    vLLM does the same (kv-contracts 1.6). Any other failure leaves the KV for the next decoder that is asked.
    """
    try:
        yield
    except ApiError as refusal:
        params = body.kv_transfer_params
        if params is not None and wants_remote_prefill(params) and refusal.status < 500 and service.runs:
            try:
                service.release_kv(params)
            except ApiError as error:
                logger.info("orphan_not_released reason=%s", error.message)
        raise
