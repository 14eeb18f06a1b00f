"""Which path is answered by what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from aiohttp import web

from engine_adapter.torch_engine.answering import Arrival
from engine_adapter.torch_engine.chat import create_chat_completion
from engine_adapter.torch_engine.completions import create_completion
from engine_adapter.torch_engine.http_server import Handler, Routes, json_response, read_json_body
from engine_adapter.torch_engine.metrics import CONTENT_TYPE
from engine_adapter.torch_engine.model_service import ModelService
from engine_adapter.torch_engine.tokenization import detokenize, tokenize

JsonAnswer = Callable[[ModelService, bytes], Awaitable[dict[str, Any]]]
StreamAnswer = Callable[[ModelService, Arrival, bytes], Awaitable[web.StreamResponse]]


def routes(service: ModelService, healthy: Callable[[], bool], server_facts: dict[str, Any]) -> Routes:
    """The routes of one served model. `healthy` is asked at every probe; `server_facts` is what /server_info says."""

    async def health(arrival: Arrival) -> web.Response:
        return web.Response(status=200 if healthy() else 503)

    async def metrics(arrival: Arrival) -> web.Response:
        return web.Response(body=service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    return {
        "/v1/completions": {"POST": _generating(service, create_completion)},
        "/v1/chat/completions": {"POST": _generating(service, create_chat_completion)},
        "/v1/models": {"GET": _saying(lambda: model_list(service))},
        "/tokenize": {"POST": _computing(service, tokenize)},
        "/detokenize": {"POST": _computing(service, detokenize)},
        "/health": {"GET": health},
        "/ping": {"GET": health, "POST": health},
        "/metrics": {"GET": metrics},
        "/version": {"GET": _saying(lambda: {"version": version("pd-baton")})},
        "/server_info": {"GET": _saying(lambda: server_facts)},
    }


def model_list(service: ModelService) -> dict[str, Any]:
    model = {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "baton",
        "root": service.model_root,
        "parent": None,
        "max_model_len": service.engine.max_model_len,
        "permission": [],
    }
    return {"object": "list", "data": [model]}


def _generating(service: ModelService, create: StreamAnswer) -> Handler:
    async def handle(arrival: Arrival) -> web.StreamResponse:
        return await create(service, arrival, await read_json_body(arrival.http_request))

    return handle


def _computing(service: ModelService, compute: JsonAnswer) -> Handler:
    async def handle(arrival: Arrival) -> web.StreamResponse:
        content = await compute(service, await read_json_body(arrival.http_request))
        return json_response(content, request_id=arrival.request_id)

    return handle


def _saying(say: Callable[[], dict[str, Any]]) -> Handler:
    async def handle(arrival: Arrival) -> web.StreamResponse:
        return json_response(say(), request_id=arrival.request_id)

    return handle
