"""What every control route shares: JSON answers, errors in the OpenAI shape, and the protocol of a connection that the
frontend handed over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from proxy.errors import BadRequest, ProxyError, error_body
from proxy.openai_api import ROUTES

log = logging.getLogger(__name__)


def json_answer(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


async def json_object(request: web.Request) -> dict[str, Any]:
    """The request's body. Raises BadRequest."""
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.") from None
    if not isinstance(body, dict):
        raise BadRequest("The request body must be a JSON object.")
    return body


def bearer_line(request: web.Request, own: bytes) -> bytes:
    """The client's Authorization as a header line, or else the proxy's `own`."""
    given = request.headers.get("Authorization")
    return f"Authorization: {given}\r\n".encode() if given else own


async def close_after(request: web.Request, response: web.StreamResponse) -> None:
    """A connection is handed over for one request: the next one may be for a hot route, which isn't served here."""
    response.force_close()
    protocol = request.protocol
    assert isinstance(protocol, ControlProtocol)
    protocol.answer_has_begun = True
    for name in ("X-Request-Id", "traceparent"):  # the frontend has seen to it that there is one
        response.headers[name] = request.headers.get(name, "")
    response.headers["Connection"] = "close"  # aiohttp has written its own headers before this is called


class ControlProtocol(web.RequestHandler):
    """A connection that was handed over. What aiohttp's parser refuses is answered in the OpenAI shape, untraced."""

    answer_has_begun = False

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        self.answer_has_begun = True
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        if status >= 500:
            log.error("event=control_failed path=%s", request.path, exc_info=exc)
            text = "Internal error in the proxy."
        else:
            text = (str(message or exc or "Malformed request.").splitlines() or [""])[0]
        kind = "InternalServerError" if status >= 500 else "BadRequestError"
        body = error_body(status, text, kind)
        response = web.Response(body=body, status=status, content_type="application/json")
        response.force_close()
        return response


def control_protocols(server: web.Server, loop: asyncio.AbstractEventLoop) -> Callable[[], ControlProtocol]:
    """What makes the protocol for a connection that is handed over; `server` is the runner's, which knows them all."""
    return lambda: ControlProtocol(server, loop=loop, **server._kwargs)


@web.middleware
async def openai_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Errors leave in the OpenAI shape, 404 and 405 included."""
    try:
        if request.path.encode() in ROUTES:
            raise web.HTTPMethodNotAllowed(request.method, ["POST"])
        return await handler(request)
    except ProxyError as error:
        headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else None
        return web.Response(body=error.body(), status=error.status, content_type="application/json", headers=headers)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        kind = "NotFoundError" if error.status == 404 else error.reason
        message = {
            404: f"There is no {request.path} here.",
            405: f"{request.method} is not allowed on {request.path}.",
        }.get(error.status, error.reason)
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return web.Response(
            body=error_body(error.status, message, kind),
            status=error.status,
            content_type="application/json",
            headers=headers,
        )
