"""The HTTP shell: routes, body limits, and every refusal in the OpenAI shape. Nothing about models or engines here.

aiohttp's low-level server is used rather than its Application, so that what HTTP itself refuses (a bad header, a wrong
method) is answered in the same shape as everything else, in one line of log and no traceback.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import ClientPayloadError, StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import RawRequestMessage

from engine_adapter.torch_engine.answering import Arrival
from engine_adapter.torch_engine.api_errors import ApiError, status_error

logger = logging.getLogger(__name__)

Handler = Callable[[Arrival], Awaitable[web.StreamResponse]]
Routes = Mapping[str, Mapping[str, Handler]]
"""Path, then method."""

KEEPALIVE_TIMEOUT_S = 75.0
"""Longer than what the usual proxies and clients wait, so that they close first."""
MAX_REQUEST_ID_CHARS = 256


class OpenAIProtocol(web.RequestHandler):
    """One connection; answers what aiohttp's parser refuses."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        logger.info("request_refused status=%d peer=%s reason=%s", status, request.remote, _first_line(exc or message))
        response = error_response(status_error(status, _first_line(message or exc) or None), request_id=None)
        response.force_close()
        return response


class OpenAIServer(web.Server):
    """A protocol factory for `loop.create_server`. A client that leaves cancels its handler."""

    def __init__(self, routes: Routes, *, max_body_bytes: int) -> None:
        super().__init__(
            self._answer,
            request_factory=self._make_limited_request,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=KEEPALIVE_TIMEOUT_S,
        )
        self._routes = routes
        self._max_body_bytes = max_body_bytes

    def __call__(self) -> OpenAIProtocol:
        return OpenAIProtocol(self, loop=self._loop, **self._kwargs)

    def _make_limited_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        return web.BaseRequest(
            message, payload, protocol, writer, task, self._loop, client_max_size=self._max_body_bytes
        )

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """The named last resort for exceptions: one that nobody foresaw becomes a 500 and a traceback in the log."""
        request_id = request.headers.get("X-Request-Id", "")[:MAX_REQUEST_ID_CHARS] or uuid.uuid4().hex
        try:
            handler = self._handler(request)
            return await handler(Arrival(request, request_id, self._loop.time()))
        except ApiError as error:
            logger.info("request_refused request_id=%s status=%d", request_id, error.status)
            return error_response(error, request_id)
        except web.HTTPRequestEntityTooLarge:
            return error_response(self._too_large(), request_id)
        except (ClientPayloadError, web.RequestPayloadError, HttpProcessingError) as error:
            return error_response(status_error(400, f"the body can't be read: {_first_line(error)}"), request_id)
        except ConnectionError:
            raise
        except Exception:
            logger.exception("request_failed request_id=%s", request_id)
            if request.writer.output_size > 0:
                raise ConnectionError("failed within an answer") from None
            return error_response(status_error(500, "Internal server error"), request_id)

    def _handler(self, request: web.BaseRequest) -> Handler:
        methods = self._routes.get(request.path)
        if methods is None:
            raise status_error(HTTPStatus.NOT_FOUND)
        handler = methods.get(request.method)
        if handler is None:
            raise status_error(HTTPStatus.METHOD_NOT_ALLOWED, f"Method Not Allowed: use {' or '.join(methods)}")
        if (request.content_length or 0) > self._max_body_bytes:
            raise self._too_large()
        return handler

    def _too_large(self) -> ApiError:
        return status_error(413, f"the body is larger than {self._max_body_bytes} bytes")


async def read_json_body(request: web.BaseRequest) -> bytes:
    """The body of a POST. Raises ApiError for another content type, as vLLM does, and for a compressed one."""
    media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(
            "Unsupported Media Type: Only 'application/json' is allowed", error_type="Bad Request", param="Content-Type"
        )
    if request.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise ApiError("a compressed body is not understood", status=415, param="Content-Encoding")
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    return await request.read()


def json_response(content: Any, status: int = 200, request_id: str | None = None) -> web.Response:
    headers = {} if request_id is None else {"X-Request-Id": request_id}
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json", headers=headers)


def error_response(error: ApiError, request_id: str | None) -> web.Response:
    return json_response(error.body(), error.status, request_id)


def _first_line(problem: object) -> str:
    lines = str(problem or "").strip().splitlines()
    return lines[0][:200] if lines else ""
