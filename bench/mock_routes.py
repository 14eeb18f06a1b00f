"""The routes of a mock engine beside the hot ones and its own control: each answers with what it was sent."""

from __future__ import annotations

import orjson

from bench.mock_http import Request, error_response, json_response
from bench.mock_instance import MockInstance

OWN = ("/mock/", "/health", "/metrics")
ROUTES = {
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/score": "POST",
    "/reset_prefix_cache": "POST",
    "/start_profile": "POST",
    "/stop_profile": "POST",
    "/version": "GET",
}


def is_engine_route(path: str) -> bool:
    """Whether `answer` is to be asked: neither control of the mock nor what it serves in its own way."""
    return path != "/v1/models" and not path.startswith(OWN)


def answer(instance: MockInstance, request: Request, model: str) -> bytes:
    """A route that is not there is answered as FastAPI does, a model that is not there as vLLM does."""
    path = request.path
    instance.counts[path] += 1
    status = instance.statuses.get(path, 0)
    if path.startswith("/v1/models/"):
        name = path.removeprefix("/v1/models/")
        if name != model:
            return error_response(404, f"The model `{name}` does not exist.", "NotFoundError")
        return json_response(200, orjson.dumps({"id": model, "object": "model"}))
    if path not in ROUTES or status == 404:
        return json_response(404, b'{"detail":"Not Found"}')
    if request.method != ROUTES[path] or status == 405:
        return json_response(405, b'{"detail":"Method Not Allowed"}')
    if status:
        return error_response(status, "as told")
    said = {
        "role": instance.role,
        "port": instance.port,
        "version": "mock",
        "method": request.method,
        "target": request.target,
        "headers": {name.decode("latin-1"): value.decode("latin-1") for name, value in request.headers.items()},
        "body": request.body.decode("latin-1"),
    }
    return json_response(200, orjson.dumps(said))
