from __future__ import annotations

import io
import json
import shlex
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from engine_adapter.cluster import demo
from engine_adapter.cluster.config import parse
from engine_adapter.cluster.errors import ClusterError, StartFailed
from engine_adapter.cluster.plan import Plan, Site, plan
from engine_adapter.cluster.screen import Screen
from engine_adapter.cluster.warmup import warm_up

EXPOSITION = """# HELP baton_sidecar_pull_bytes_total x
baton_sidecar_pull_blocks_total{peer="c-prefill-0@127.0.0.1:17002",transport="shm"} %d.0
baton_sidecar_pull_bytes_total{peer="c-prefill-0@127.0.0.1:17002",transport="shm"} %d.0
baton_sidecar_pull_seconds_sum{transport="shm"} 0.5
"""
KEY = ("c-prefill-0@127.0.0.1:17002", "c-decode-0@127.0.0.1:9", "shm")


class Cluster:
    """One server that is proxy, engines and sidecars at once, and counts as they do."""

    def __init__(self) -> None:
        self.num_moved = 0
        self.bodies: list[dict[str, object]] = []
        self.failures: list[tuple[int, str]] = []
        self.moves = True
        self.app = web.Application()
        self.app.router.add_post("/v1/completions", self.completion)
        self.app.router.add_post("/v1/chat/completions", self.chat)
        self.app.router.add_get("/metrics", self.metrics)
        self.port = 0

    def plan(self) -> Plan:
        text = (
            f'[cluster]\nname = "c"\n[model]\npath = "m"\n[proxy]\nport = {self.port}\n'
            '[[instance]]\nrole = "prefill"\n[[instance]]\nrole = "decode"\n'
        )
        return plan(parse(text, "f"), Site("m", "/s", 1, (self.port,) * 6))

    async def completion(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        if self.failures:
            status, text = self.failures.pop(0)
            return web.Response(status=status, text=text)
        return web.json_response({})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        if self.failures:
            status, text = self.failures.pop(0)
            return web.Response(status=status, text=text)
        self.num_moved += self.moves
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for delta in ({"role": "assistant", "content": ""}, {"content": "Two "}, {"content": "runners"}):
            await stream.write(b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n")
        usage = {"prompt_tokens": 50, "completion_tokens": 2}
        await stream.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        await stream.write(b"data: [DONE]\n\n")
        return stream

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=EXPOSITION % (7 + 3 * self.num_moved, 1000 + 48 * self.num_moved))


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    runner = web.AppRunner(made.app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.port = runner.addresses[0][1]
    yield made
    await runner.cleanup()


async def test_every_engine_is_warmed_up_and_the_way_through_the_proxy(cluster: Cluster) -> None:
    await warm_up(cluster.plan())
    assert len(cluster.bodies) == 3
    assert all(body["model"] == "m" for body in cluster.bodies)


async def test_a_proxy_that_does_not_see_its_instances_yet_is_asked_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = cluster.plan()
    monkeypatch.setattr(type(plan), "of_kind", lambda self, kind: () if kind == "engine" else (self.processes[-1],))
    cluster.failures = [(503, "no healthy prefiller")]
    await warm_up(plan)
    assert len(cluster.bodies) == 2


async def test_an_engine_that_refuses_its_warm_up_is_quoted(cluster: Cluster) -> None:
    cluster.failures = [(500, "out of memory")] * 2
    with pytest.raises(StartFailed, match=r"warm-up prompt to .*-0 \(127.*\) failed: status 500: out of memory"):
        await warm_up(cluster.plan())


async def test_the_answer_is_shown_as_it_comes_then_the_table_and_the_curl_line(cluster: Cluster) -> None:
    stream = io.StringIO()
    await demo.show(cluster.plan(), Screen(stream), prompt="Run!", random_weights=True)
    text = stream.getvalue()
    assert "user: Run!\nassistant: Two runners\n" in text
    rows = dict(line.split(None, 1) if line[:2] != "  " else (line.strip().split(None, 1)) for line in text.splitlines()
                if line.startswith(("TTFT", "TPOT", "KV", "  from", "  to", "  over")))  # fmt: skip
    assert rows["KV"] == "moved          48 bytes in 3 blocks"
    assert rows["from"] == "c-prefill-0@127.0.0.1:17002"
    assert rows["over"] == "shm"
    assert rows["TTFT"].endswith(" ms")
    assert "prompt tokens     50\ngenerated tokens  2\n" in text
    assert "weights are random" in text
    (curl,) = (line for line in text.splitlines() if line.startswith("  curl"))
    words = shlex.split(curl)
    assert words[2] == f"http://127.0.0.1:{cluster.port}/v1/chat/completions"
    assert json.loads(words[-1])["model"] == "m"
    assert cluster.bodies[0]["stream_options"] == {"include_usage": True}


async def test_an_answer_without_moved_kv_is_a_failure(cluster: Cluster) -> None:
    cluster.moves = False
    with pytest.raises(ClusterError, match="no sidecar moved KV"):
        await demo.show(cluster.plan(), Screen(io.StringIO()), random_weights=False)


async def test_an_error_status_is_quoted(cluster: Cluster) -> None:
    cluster.failures = [(503, "nobody is well")]
    with pytest.raises(ClusterError, match="the proxy answered 503: nobody is well"):
        await demo.show(cluster.plan(), Screen(io.StringIO()), random_weights=False)


def test_what_a_sidecar_pulled_is_read_from_its_metrics() -> None:
    assert demo.parse_moved(EXPOSITION % (3, 48), "c-decode-0@127.0.0.1:9") == {KEY: {"blocks": 3, "bytes": 48}}
    assert demo.parse_moved("# nothing yet\n", "x") == {}


def test_tpot_is_the_time_between_tokens() -> None:
    assert demo.Answer(num_tokens=5, ttft_s=1.0, last_s=3.0).tpot_s == 0.5
    assert demo.Answer(num_tokens=1, ttft_s=1.0, last_s=1.0).tpot_s == 0.0
