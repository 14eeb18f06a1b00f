"""A protocol mock of a vLLM-like engine, of any contract: very cheap, strict about its callers, scriptable.

    python -m bench.mock_engine --prefill-ports 9101 9102 --decode-ports 9201 9202
    python -m bench.mock_engine --port 9201 --role decode

One process serves any number of instances; port 0 takes a free one; `ready control=P prefill=P,P decode=P,P`
says which. Answers are deterministic (`bench.mock_answers`), what a caller does wrong is kept as a violation, KV handed
out and not yet consumed or released as outstanding (`bench.mock_ledger`). A request may carry `"mock": {"prefill_s",
"first_token_s", "interval_s", "num_tokens"}` to shape its own answer.

`--contract` is how KV is handed over (`bench.mock_pairs`, `bench.mock_layerwise`). Bootstrap and KV ports are the
engine's own port.

Every port, and the control port that no fault touches, serves GET /health, /v1/models, /metrics, the routes of
`bench.mock_routes`, /mock/state, /mock/requests and POST /mock/fault {"port" | "role", "kind", ...}
(`bench.mock_faults`), /mock/instance {"port", "action": "stop" | "start" | "unhealthy" | "healthy"}, or {"port",
"action": "answer", "route", "status"}, /mock/config {"prefill_s", ..., "flavour"}, /mock/reset.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from typing import Any

import orjson
import uvloop

from bench import mock_routes
from bench.mock_faults import Fault
from bench.mock_http import Connection, Request, error_response, json_response
from bench.mock_instance import MockInstance, Pace
from bench.mock_layerwise import Decodes, LayerwiseInstance
from bench.mock_ledger import KvLedger
from bench.mock_pairs import Meetings, MooncakeInstance, P2pNcclInstance, PairInstance, SglangInstance

FORGET_EVERY_S = 5.0
PAIRS: dict[str, type[PairInstance]] = {
    "mooncake": MooncakeInstance,
    "sglang": SglangInstance,
    "p2p-nccl": P2pNcclInstance,
}


class MockFleet:
    """All instances of the process, their shared ledger, and the control endpoints."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.ledger = KvLedger(options.flavour, strict=not options.lenient)
        self.options = options
        self.meetings = Meetings(self.ledger)
        self.decodes = Decodes(self.ledger)
        self.gauges: dict[str, float] = {}
        self.pace = Pace(options.prefill_s, options.first_token_s, options.interval_s)
        self.instances = [
            *(self._instance(port, "prefill") for port in options.prefill_ports),
            *(self._instance(port, "decode") for port in options.decode_ports),
            *(self._instance(port, "prefill", host) for host, port in map(_address, options.prefill_at)),
            *(self._instance(port, "decode", host) for host, port in map(_address, options.decode_at)),
            *(self._instance(port, options.role) for port in options.port),
        ]
        self.control = self._instance(options.control_port, "control")
        self._tasks: set[asyncio.Task[None]] = set()

    def _instance(self, port: int, role: str, host: str = "") -> MockInstance:
        options = self.options
        given = (
            host or options.host, port, role, self.ledger, options.model, self.pace, not options.no_record,
            self._control, options.num_tokens,
        )  # fmt: skip
        if options.contract == "layerwise":
            return LayerwiseInstance(*given, decodes=self.decodes)
        if options.contract in PAIRS:
            return PAIRS[options.contract](*given, meetings=self.meetings, num_ranks=options.num_ranks)
        return MockInstance(*given)

    async def run(self) -> None:
        for instance in [*self.instances, self.control]:
            await instance.start()
        ports = {
            role: ",".join(str(i.port) for i in self.instances if i.role == role) for role in ("prefill", "decode")
        }
        print(f"ready control={self.control.port} prefill={ports['prefill']} decode={ports['decode']}", flush=True)
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        while not stopped.is_set():
            try:
                await asyncio.wait_for(stopped.wait(), FORGET_EVERY_S)
            except TimeoutError:
                if self.options.no_record:
                    self.ledger.forget_ended()
        for instance in [*self.instances, self.control]:
            await instance.close()

    def _control(self, connection: Connection, request: Request) -> None:
        instance = next((i for i in self.instances if connection in i.connections), self.control)
        if mock_routes.is_engine_route(request.path):
            connection.answer(mock_routes.answer(instance, request, self.options.model))
            return
        if request.method == "GET":
            connection.answer(self._get(instance, request.path))
            return
        try:
            fields = orjson.loads(request.body or b"{}")
            action = self._post(request.path, fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            connection.answer(error_response(400, f"{type(error).__name__}: {error}"))
            return
        if action is None:
            connection.answer(json_response(200, b'{"ok":true}'))
            return
        task = asyncio.ensure_future(self._answer_after(connection, action()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer_after(self, connection: Connection, action: Awaitable[None]) -> None:
        await action
        connection.answer(json_response(200, b'{"ok":true}'))

    def _get(self, instance: MockInstance, path: str) -> bytes:
        if path == "/health":
            return json_response(200, b"") if instance.healthy else error_response(503, "unhealthy")
        if path == "/v1/models":
            instance.counts["models"] += 1
            card = {
                "id": self.options.model,
                "object": "model",
                "created": 0,
                "owned_by": "mock",
                "max_model_len": 1 << 20,
            }
            return json_response(200, orjson.dumps({"object": "list", "data": [card]}))
        if path == "/metrics":
            lines = f"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running {len(instance.running)}\n"
            for name, value in self.gauges.items():
                lines += f"{name} {value}\n"
            return json_response(200, lines.encode(), "text/plain; version=0.0.4")
        if path == "/mock/state":
            states = [i.state() for i in self.instances]
            return json_response(200, orjson.dumps({"instances": states, "kv": self.ledger.state()}))
        if path == "/mock/requests":
            return json_response(200, orjson.dumps({str(i.port): list(i.recorded) for i in self.instances}))
        return error_response(404, f"no {path}")

    def _post(self, path: str, fields: dict[str, Any]) -> Callable[[], Awaitable[None]] | None:
        if path == "/mock/fault":
            shared = fields.pop("shared", False)
            fault = Fault.parse(fields)
            for instance in self._named(fields):
                instance.faults.append(fault if shared else replace(fault))
        elif path == "/mock/instance":
            (instance,) = self._named(fields)
            action = fields["action"]
            if action == "answer":  # a route of mock_routes, from now on with this status
                instance.statuses[fields["route"]] = fields["status"]
            elif action in ("healthy", "unhealthy"):
                instance.healthy = action == "healthy"
            elif action in ("freeze", "thaw"):
                (instance.freeze if action == "freeze" else instance.thaw)()
            elif action == "mute":
                instance.mute = True
            else:
                return {"stop": instance.stop, "start": instance.start, "deaf": instance.go_deaf}[action]
        elif path == "/mock/config":
            self.ledger.flavour = fields.pop("flavour", self.ledger.flavour)
            self.options.num_tokens = fields.pop("num_tokens", self.options.num_tokens)
            self.gauges = fields.pop("gauges", self.gauges)
            self.pace = replace(self.pace, **fields)
            for instance in self.instances:
                instance.pace, instance.num_tokens = self.pace, self.options.num_tokens
        elif path == "/mock/reset":
            return self._reset
        else:
            raise KeyError(path)
        return None

    async def _reset(self) -> None:
        """Forget everything, start what was stopped, cut what still runs."""
        for instance in self.instances:
            instance.faults.clear()
            instance.counts.clear()
            instance.recorded.clear()
            instance.statuses.clear()
            instance.healthy = True
            instance.mute = False
            instance.thaw()
            for connection in list(instance.running):
                connection.reset()
            await instance.start()
        self.meetings.by_name.clear()
        self.decodes.waiting.clear()
        self.ledger.handed_out.clear()
        self.ledger.counts.clear()
        self.ledger.violations.clear()
        self._post(
            "/mock/config", {**asdict(Pace()), "flavour": self.options.flavour, "num_tokens": None, "gauges": {}}
        )

    def _named(self, fields: dict[str, Any]) -> list[MockInstance]:
        found = [i for i in self.instances if i.port == fields.get("port") or i.role == fields.get("role")]
        if not found:
            raise ValueError(f"no instance with port {fields.get('port')} or role {fields.get('role')}")
        return found


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench.mock_engine", description=__doc__.partition("\n")[0])
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, nargs="*", default=[], help="ports of instances with the role --role")
    options.add_argument("--role", choices=("prefill", "decode", "both"), default="both")
    options.add_argument("--prefill-ports", type=int, nargs="*", default=[])
    options.add_argument("--decode-ports", type=int, nargs="*", default=[])
    options.add_argument("--prefill-at", nargs="*", default=[], help="host:port of prefillers on other addresses")
    options.add_argument("--decode-at", nargs="*", default=[])
    options.add_argument("--control-port", type=int, default=0)
    options.add_argument("--model", default="mock")
    options.add_argument("--contract", choices=("pull", "layerwise", *PAIRS), default="pull")
    options.add_argument("--num-ranks", type=int, default=1, help="data-parallel ranks of a prefiller (mooncake)")
    options.add_argument("--flavour", choices=("baton", "nixl"), default="baton", help="who refuses a second claim")
    options.add_argument("--prefill-s", type=float, default=0.0, help="seconds a prefill takes")
    options.add_argument("--first-token-s", type=float, default=0.0)
    options.add_argument("--interval-s", type=float, default=0.0, help="seconds between tokens, 0 as fast as can be")
    options.add_argument("--num-tokens", type=int, help="tokens of every answer, instead of the request's max_tokens")
    options.add_argument("--lenient", action="store_true", help="don't check the contract (for other proxies)")
    options.add_argument("--no-record", action="store_true", help="keep no requests (for benchmarks)")
    return options


def main() -> None:
    options = parser().parse_args()
    if not (options.port or options.prefill_ports or options.decode_ports or options.prefill_at or options.decode_at):
        parser().error("no instance: give --port, --prefill-ports or --decode-ports")
    uvloop.run(MockFleet(options).run())


if __name__ == "__main__":
    main()
