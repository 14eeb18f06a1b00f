"""Everything but the hot routes, on aiohttp: health, models, metrics, fan-outs, membership."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from proxy.config import Address, ProxyConfig
from proxy.errors import BadRequest, ProxyError, UpstreamFailure, error_body
from proxy.health_probe import Prober
from proxy.instance import Fleet, Instance, Role
from proxy.kv_ledger import KvLedger, KvState
from proxy.metrics import CONTENT_TYPE, ProxyMetrics
from proxy.openai_api import ROUTES
from proxy.reclaim import Reclaimer

log = logging.getLogger(__name__)

MODELS_TIMEOUT_S = 3.0
FAN_OUT_TIMEOUT_S = 30.0
MAX_ADMIN_BODY_BYTES = 1 << 20
_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:/\[\]]+)):(?P<port>\d{1,5})")


def parse_address(text: str) -> Address:
    """`host:port` or `[v6]:port`. Raises BadRequest."""
    match = _ADDRESS.fullmatch(text.strip())
    if not match or not 0 < int(match["port"]) < 65536:
        raise BadRequest(f"'{text}' is not host:port (IPv6 as [address]:port).", "instances")
    return Address(match["v6"] or match["host"], int(match["port"]))


class ControlApi:
    def __init__(
        self,
        config: ProxyConfig,
        fleet: Fleet,
        ledger: KvLedger,
        reclaimer: Reclaimer,
        prober: Prober,
        metrics: ProxyMetrics,
        num_in_flight: Callable[[], int],
        bearer_line: bytes,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._ledger = ledger
        self._reclaimer = reclaimer
        self._prober = prober
        self._metrics = metrics
        self._num_in_flight = num_in_flight
        self._bearer_line = bearer_line

    def application(self) -> web.Application:
        app = web.Application(middlewares=[openai_errors], client_max_size=MAX_ADMIN_BODY_BYTES)
        app.on_response_prepare.append(close_after)
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/healthcheck", self.healthcheck),
                web.get("/v1/models", self.models),
                web.get("/metrics", self.metrics),
                web.get("/version", self.version),
                web.get("/instances", self.instances),
                web.post("/instances/add", self.add),
                web.post("/instances/remove", self.remove),
                web.post("/reset_prefix_cache", self.reset_prefix_cache),
            ]
        )
        return app

    async def health(self, _: web.Request) -> web.Response:
        """200 while a request could be served: each role has an instance that is enabled and well."""
        missing = [
            role.value
            for role, members in self._fleet.members.items()
            if not any(one.enabled and one.health.healthy for one in members)
        ]
        if missing:
            raise ProxyError(
                503, f"No healthy {' and no healthy '.join(missing)} instance.",
                error_type="service_unavailable", retry_after_s=1,
            )  # fmt: skip
        return web.Response()

    async def healthcheck(self, _: web.Request) -> web.Response:
        members = self._fleet.members
        return _json(
            {
                "status": "ok",
                "prefill_instances": len(members[Role.PREFILL]),
                "decode_instances": len(members[Role.DECODE]),
                "request_num": self._num_in_flight(),
            }
        )

    async def models(self, request: web.Request) -> web.Response:
        """The first instance's answer that is a success, verbatim; prefillers are asked first."""
        bearer = request.headers.get("Authorization")
        line = f"Authorization: {bearer}\r\n".encode("latin-1") if bearer else self._bearer_line
        failed = []
        for instance in self._fleet.all:
            try:
                answer = await instance.pool.call(b"GET /v1/models HTTP/1.1\r\n" + line, timeout_s=MODELS_TIMEOUT_S)
            except UpstreamFailure as failure:
                failed.append(failure.message)
                continue
            if answer.status < 300:
                return web.Response(body=answer.body, content_type="application/json")
            failed.append(f"{instance.key}: status {answer.status}")
        raise ProxyError(
            503, "No instance could list its models: " + ("; ".join(failed) or "there is none") + ".",
            error_type="service_unavailable", retry_after_s=1,
        )  # fmt: skip

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    async def version(self, _: web.Request) -> web.Response:
        return _json({"version": importlib.metadata.version("pd-baton")})

    async def reset_prefix_cache(self, request: web.Request) -> web.Response:
        """Fanned out to every instance at its root path, query included; says who failed."""
        query = f"?{request.query_string}" if request.query_string else ""
        head = f"POST /reset_prefix_cache{query} HTTP/1.1\r\n".encode("latin-1") + self._bearer_line

        async def reset(instance: Instance) -> str | None:
            try:
                answer = await instance.pool.call(head, timeout_s=FAN_OUT_TIMEOUT_S)
            except UpstreamFailure:
                return f"http://{instance.key}/reset_prefix_cache"
            return None if answer.status < 300 else f"http://{instance.key}/reset_prefix_cache"

        failed = [url for url in await asyncio.gather(*map(reset, self._fleet.all)) if url]
        return _json({"failed": failed}, 500) if failed else web.Response()

    # --- membership

    async def instances(self, _: web.Request) -> web.Response:
        ledger = self._ledger
        return _json(
            {
                "instances": [_describe(one) for one in self._fleet.all],
                "waiting": [f"{role.value} {address}" for role, address in self._prober.waiting],
                "num_in_flight": self._num_in_flight(),
                "num_reservations": sum(one.load.num_requests for one in self._fleet.all),
                "kv_ledger": {
                    "num_entries": len(ledger.open),
                    "held": ledger.count(KvState.HELD),
                    "reclaiming": ledger.count(KvState.RECLAIMING),
                    "totals": {state.value: count for state, count in ledger.totals.items()},
                },
                "num_reclaims_open": self._reclaimer.num_open,
            }
        )

    async def add(self, request: web.Request) -> web.Response:
        role, addresses = await _membership_request(request)
        for address in addresses:
            known = self._fleet.find(role, address)
            if known is not None:
                known.enabled = True  # a drained instance comes back; one that is in stays in
            else:
                self._prober.admit_when_ready(role, address)
        return self._membership_reply(f"Adding {role.value} instances", addresses)

    async def remove(self, request: web.Request) -> web.Response:
        """No new work from now on; the instance leaves when the last request on it has ended."""
        role, addresses = await _membership_request(request)
        for address in addresses:
            waiting = self._prober.waiting.get((role, address))
            if waiting is not None:
                waiting.cancel()
            known = self._fleet.find(role, address)
            if known is not None:
                known.enabled = False
        self._fleet.drop_drained()
        self._prober.follow()
        return self._membership_reply(f"Removing {role.value} instances", addresses)

    def _membership_reply(self, message: str, addresses: list[Address]) -> web.Response:
        members = self._fleet.members
        return _json(
            {
                "message": f"{message}: {', '.join(map(str, addresses))}.",
                "current_prefill_instances": [one.key for one in members[Role.PREFILL]],
                "current_decode_instances": [one.key for one in members[Role.DECODE]],
            }
        )


def _describe(one: Instance) -> dict[str, Any]:
    return {
        "role": one.role.value,
        "address": one.key,
        "enabled": one.enabled,
        "healthy": one.health.healthy,
        "last_error": one.health.last_error,
        "load": {
            "num_requests": one.load.num_requests,
            "num_tokens": one.load.num_tokens,
            "speed_tokens_per_s": round(one.load.speed, 1),
            "total_requests": one.load.total_requests,
        },
        "connections": {"active": len(one.pool.active), "idle": len(one.pool.idle)},
    }


async def _membership_request(request: web.Request) -> tuple[Role, list[Address]]:
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.") from None
    if not isinstance(body, dict):
        raise BadRequest("The request body must be a JSON object.")
    try:
        role = Role(str(body.get("type")))
    except ValueError:
        raise BadRequest("'type' must be 'prefill' or 'decode'.", "type") from None
    given = body.get("instances")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise BadRequest("'instances' must be host:port or a list of them.", "instances")
    return role, [parse_address(text) for text in texts]


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


async def close_after(_: web.Request, response: web.StreamResponse) -> None:
    """A connection is handed over for one request: the next one may be for a hot route, which isn't served here."""
    response.force_close()
    response.headers["Connection"] = "close"  # aiohttp has written its own headers before this is called


class ControlProtocol(web.RequestHandler):
    """A connection that was handed over. What aiohttp's parser refuses is answered in the OpenAI shape, untraced."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        if status >= 500:
            log.error("event=control_failed path=%s", request.path, exc_info=exc)
            text = "Internal error in the proxy."
        else:
            text = (str(message or exc or "Malformed request.").splitlines() or [""])[0]
        kind = "internal_server_error" if status >= 500 else "invalid_request_error"
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
        kind = "not_found_error" if error.status == 404 else "invalid_request_error"
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
