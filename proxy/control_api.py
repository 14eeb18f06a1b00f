"""Everything but the hot routes, on aiohttp: health, models, metrics. Membership, fan-outs and the routes that are
passed to an instance have files of their own and are put together here."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import orjson
from aiohttp import hdrs, web

from proxy.control_http import bearer_line, close_after, json_answer, openai_errors
from proxy.errors import ProxyError, UpstreamFailure
from proxy.fan_out import FanOut
from proxy.instance import Fleet, Role
from proxy.instances_api import InstancesApi
from proxy.metaserver import Metaserver
from proxy.metrics import CONTENT_TYPE, ProxyMetrics
from proxy.pass_through import PassThrough
from proxy.status_page import status_page
from proxy.workers.crew import Crew

MODELS_TIMEOUT_S = 3.0
MAX_ADMIN_BODY_BYTES = 1 << 20


class ControlApi:
    def __init__(
        self,
        fleet: Fleet,
        metrics: ProxyMetrics,
        num_in_flight: Callable[[], int],
        own_bearer: bytes,
        instances: InstancesApi,
        fan_out: FanOut,
        pass_through: PassThrough,
        metaserver: Metaserver,
        crew: Crew | None = None,
    ) -> None:
        self._crew = crew
        self._fleet = fleet
        self._metrics = metrics
        self._num_in_flight = num_in_flight
        self._own_bearer = own_bearer
        self._instances = instances
        self._fan_out = fan_out
        self._pass_through = pass_through
        self._metaserver = metaserver

    def application(self) -> web.Application:
        app = web.Application(middlewares=[openai_errors], client_max_size=MAX_ADMIN_BODY_BYTES)
        app.on_response_prepare.append(close_after)
        app.add_routes(
            [
                web.get("/", status_page),
                web.get("/status", status_page),
                web.get("/health", self.health),
                web.get("/ping", self.health),
                web.post("/ping", self.health),
                web.get("/healthcheck", self.healthcheck),
                web.get("/v1/models", self.models),
                web.get("/metrics", self.metrics),
                web.get("/version", self.version),
                *self._instances.routes(),
                *self._fan_out.routes(),
                *self._metaserver.routes(),
            ]
        )
        self._catch_all(app)
        return app

    def _catch_all(self, app: web.Application) -> None:
        """Whatever is not a route of ours is the instances'; a route of ours by another method is refused here."""
        ours: dict[str, set[str]] = {}
        for route in app.router.routes():
            if route.resource is not None:
                ours.setdefault(route.resource.canonical, set()).add(route.method)

        async def other(request: web.Request) -> web.StreamResponse:
            if request.path in ours:
                raise web.HTTPMethodNotAllowed(request.method, sorted(ours[request.path]))
            return await self._pass_through.serve(request)

        app.router.add_route(hdrs.METH_ANY, "/{path:.*}", other)

    async def health(self, _: web.Request) -> web.Response:
        """200 while a request could be served: each role has an instance that is enabled and well. The body is empty,
        unless a worker process is missing."""
        missing = [
            role.value
            for role, members in self._fleet.members.items()
            if not any(one.enabled and one.health.healthy for one in members)
        ]
        if missing:
            raise ProxyError(
                503, f"No healthy {' and no healthy '.join(missing)} instance.",
                error_type="ServiceUnavailableError", retry_after_s=1,
            )  # fmt: skip
        if self._crew is not None and (gone := self._crew.missing()):
            return json_answer({"status": "degraded", "workers_missing": gone})
        return web.Response()

    async def healthcheck(self, _: web.Request) -> web.Response:
        members, crew = self._fleet.members, self._crew
        shown = {
            "status": "ok",
            "prefill_instances": len(members[Role.PREFILL]),
            "decode_instances": len(members[Role.DECODE]),
            "request_num": self._num_in_flight(),
        }
        if crew is not None:
            shown["status"] = "degraded" if crew.missing() else "ok"
            shown["request_num"] = (await crew.instances())["num_in_flight"]
        return json_answer(shown)

    async def _first(self, request: web.Request, path: bytes) -> bytes | list[str]:
        """The body of the first instance that answers `path` with success, or why each did not."""
        head = b"GET %b HTTP/1.1\r\n%b" % (path, bearer_line(request, self._own_bearer))
        failed = []
        for instance in sorted(self._fleet.all, key=lambda one: not one.enabled):
            try:
                answer = await instance.pool.call(head, timeout_s=MODELS_TIMEOUT_S)
            except UpstreamFailure as failure:
                failed.append(failure.message)
                continue
            if answer.status < 300:
                return answer.body
            failed.append(f"{instance.key}: status {answer.status}")
        return failed

    async def models(self, request: web.Request) -> web.Response:
        """The first instance's answer that is a success, verbatim; prefillers are asked first."""
        found = await self._first(request, b"/v1/models")
        if isinstance(found, list):
            raise ProxyError(
                503, "No instance could list its models: " + ("; ".join(found) or "there is none") + ".",
                error_type="ServiceUnavailableError", retry_after_s=1,
            )  # fmt: skip
        return web.Response(body=found, content_type="application/json")

    async def metrics(self, _: web.Request) -> web.Response:
        body = self._metrics.exposition() if self._crew is None else await self._crew.exposition()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def version(self, request: web.Request) -> web.Response:
        """The engines' own answer, with the proxy's version beside it."""
        found = await self._first(request, b"/version")
        try:
            engine = orjson.loads(found) if isinstance(found, bytes) else {}
        except orjson.JSONDecodeError:
            engine = {}
        own = {"proxy_version": importlib.metadata.version("pd-baton")}
        return json_answer({**engine, **own} if isinstance(engine, dict) else own)
