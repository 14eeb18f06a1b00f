"""Routes that mean every instance: asked of all that are enabled at once, and those that failed are named."""

from __future__ import annotations

import asyncio

from aiohttp import web

from proxy.control_http import bearer_line, json_answer
from proxy.errors import UpstreamFailure
from proxy.instance import Fleet, Instance

PATHS = ("/reset_prefix_cache", "/start_profile", "/stop_profile")
FAN_OUT_TIMEOUT_S = 30.0


class FanOut:
    def __init__(self, fleet: Fleet, own_bearer: bytes) -> None:
        self._fleet = fleet
        self._own_bearer = own_bearer

    def routes(self) -> list[web.RouteDef]:
        return [web.post(path, self.serve) for path in PATHS]

    async def serve(self, request: web.Request) -> web.Response:
        """200 if all succeeded; else 500, and `failed` has their URLs, as the seeds' proxy answers (2.1)."""
        query = f"?{request.query_string}" if request.query_string else ""
        body = await request.read()
        head = f"POST {request.path}{query} HTTP/1.1\r\n".encode() + bearer_line(request, self._own_bearer)
        if body:
            head += f"Content-Type: {request.content_type}\r\n".encode()
        asked = [one for one in self._fleet.all if one.enabled]
        reasons = await asyncio.gather(*(self._ask(one, head, body) for one in asked))
        wrong = {f"http://{one.key}{request.path}": why for one, why in zip(asked, reasons, strict=True) if why}
        told = {
            "succeeded": [one.key for one, why in zip(asked, reasons, strict=True) if not why],
            "failed": list(wrong),
            "reasons": wrong,
        }
        return json_answer(told, 500 if wrong else 200)

    async def _ask(self, instance: Instance, head: bytes, body: bytes) -> str:
        """Why it failed, or nothing."""
        try:
            answer = await instance.pool.call(head, body, timeout_s=FAN_OUT_TIMEOUT_S)
        except UpstreamFailure as failure:
            return failure.message
        return "" if answer.status < 300 else f"status {answer.status}"
