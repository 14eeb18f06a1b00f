from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.drain import wait_until
from tests.unit.proxy.client import COMPLETIONS, Answer, Client, ask, fields_of, request_bytes
from tests.unit.proxy.conftest import Setup, Start
from tests.unit.proxy.stand_in import Engine


async def get(setup: Setup, path: str, **headers: str) -> Answer:
    client = await Client.connect(setup.port)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    client.writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
    answer = await client.answer()
    client.close()
    return answer


async def get_json(setup: Setup, path: str) -> Any:
    answer = await get(setup, path)
    assert answer.status == 200
    return json.loads(answer.body)


async def test_healthcheck_has_the_seeds_keys(start: Start) -> None:
    setup = await start(2, 3)
    assert await get_json(setup, "/healthcheck") == {
        "status": "ok", "prefill_instances": 2, "decode_instances": 3, "request_num": 0,
    }  # fmt: skip


async def test_models_are_the_first_instances_answer_verbatim(start: Start) -> None:
    setup = await start(2, 1)
    assert (await get_json(setup, "/v1/models"))["at"] == setup.p.port
    await setup.p.stop()
    assert (await get_json(setup, "/v1/models"))["at"] == setup.prefillers[1].port
    for engine in setup.engines[1:]:
        await engine.stop()
    answer = await get(setup, "/v1/models")
    assert answer.status == 503 and str(setup.p.port) in answer.error["message"]


async def test_the_client_key_is_passed_on_for_models(start: Start) -> None:
    setup = await start()
    await get(setup, "/v1/models", Authorization="Bearer own")
    assert setup.p.probes[-1].headers["authorization"] == "Bearer own"


async def test_health_follows_the_instances_and_a_restart_is_noticed(start: Start) -> None:
    setup = await start(health_interval_s=0.05, health_retry_interval_s=0.05)
    assert (await get(setup, "/health")).status == 200
    await setup.d.stop()
    health = setup.app.fleet.all[1].health
    assert await wait_until(lambda: not health.healthy, 3)
    answer = await get(setup, "/health")
    assert (answer.status, answer.headers["retry-after"]) == (503, "1") and "decode" in answer.error["message"]
    await setup.d.start()
    assert await wait_until(lambda: health.healthy, 3)
    assert (await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))).status == 200


async def test_an_engine_that_says_it_is_ill_is_out(start: Start) -> None:
    setup = await start(1, 2, health_interval_s=0.05, health_retry_interval_s=0.05)
    setup.d.health_status = 503
    assert await wait_until(lambda: not setup.app.fleet.all[1].health.healthy, 3)
    for _ in range(4):
        await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    assert not setup.d.requests and len(setup.decoders[1].requests) == 4
    setup.d.health_status = 404  # an engine without /health is an engine
    assert await wait_until(lambda: setup.app.fleet.all[1].health.healthy, 3)


async def test_reset_prefix_cache_goes_to_all_and_says_who_failed(start: Start) -> None:
    setup = await start(2, 1)
    answer = await ask(setup.port, "/reset_prefix_cache?reset_running=1", b"")
    assert answer.status == 200
    assert all(one.probes[-1].target == "/reset_prefix_cache?reset_running=1" for one in setup.engines)
    await setup.prefillers[1].stop()
    answer = await ask(setup.port, "/reset_prefix_cache", b"")
    failed = f"http://127.0.0.1:{setup.prefillers[1].port}/reset_prefix_cache"
    told = json.loads(answer.body)
    assert (answer.status, told["failed"], list(told["reasons"])) == (500, [failed], [failed])
    assert len(told["succeeded"]) == 2


async def test_instances_shows_that_nothing_is_open(start: Start) -> None:
    setup = await start()
    await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    await setup.settled()
    seen = await get_json(setup, "/instances")
    assert (seen["num_in_flight"], seen["num_reservations"], seen["kv_ledger"]["num_entries"]) == (0, 0, 0)
    assert seen["kv_ledger"]["totals"]["consumed"] == 1
    assert all(one["connections"]["active"] == 0 and one["connections"]["idle"] for one in seen["instances"])


async def test_instances_shows_what_is_open(start: Start) -> None:
    setup = await start()
    setup.p.gate = asyncio.Event()
    asking = asyncio.ensure_future(ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS)))
    assert await wait_until(lambda: bool(setup.p.requests), 3)
    seen = await get_json(setup, "/instances")
    assert (seen["num_in_flight"], seen["num_reservations"]) == (1, 2)
    assert seen["instances"][0]["load"]["num_requests"] == 1 and seen["instances"][0]["connections"]["active"] == 1
    setup.p.gate.set()
    assert (await asking).status == 200


async def test_an_instance_is_added_drained_and_taken_back(start: Start) -> None:
    setup = await start(1, 1, max_waiting_retries=20, waiting_retry_interval=0.05)
    more = Engine("decode")
    await more.start()
    address = f"127.0.0.1:{more.port}"
    await more.stop()  # not ready yet
    body = {"type": "decode", "instances": address}
    answer = await ask(setup.port, "/instances/add", body)
    assert answer.status == 200 and set(json.loads(answer.body)) == {
        "message", "current_prefill_instances", "current_decode_instances",
    }  # fmt: skip
    await more.start()
    assert await wait_until(lambda: len(setup.app.fleet.all) == 3, 3)
    for _ in range(4):
        await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    assert more.requests
    more.gate = asyncio.Event()
    setup.d.gate = asyncio.Event()
    client = await Client.connect(setup.port)
    other = await Client.connect(setup.port)
    for one in (client, other):  # a stream open on each decoder
        one.writer.write(request_bytes(COMPLETIONS, fields_of(COMPLETIONS, stream=True)))
        assert (await one.head())[0] == 200
    await ask(setup.port, "/instances/remove", body)
    assert (await get_json(setup, "/instances"))["instances"][-1]["enabled"] is False
    assert len(setup.app.fleet.all) == 3  # it still serves what it has
    await ask(setup.port, "/instances/add", body)
    assert (await get_json(setup, "/instances"))["instances"][-1]["enabled"] is True
    await ask(setup.port, "/instances/remove", body)
    more.gate.set()
    setup.d.gate.set()
    assert await wait_until(lambda: len(setup.app.fleet.all) == 2, 3)
    client.close()
    other.close()
    await more.stop()


async def test_an_instance_that_never_answers_is_dropped(start: Start) -> None:
    setup = await start(max_waiting_retries=2, waiting_retry_interval=0.02)
    await ask(setup.port, "/instances/add", {"type": "prefill", "instances": ["[::1]:9"]})
    assert setup.app.membership.waiting
    assert await wait_until(lambda: not setup.app.membership.waiting, 3)
    assert len(setup.app.fleet.all) == 2


async def test_there_is_a_limit_to_how_many_there_are(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.membership.MAX_INSTANCES", 3)
    setup = await start(waiting_retry_interval=60)
    body = {"type": "prefill", "instances": "127.0.0.1:9"}
    assert (await ask(setup.port, "/instances/add", body)).status == 200
    assert (await ask(setup.port, "/instances/add", body)).status == 200, "it waits already"
    answer = await ask(setup.port, "/instances/add", {**body, "instances": "127.0.0.1:10"})
    assert answer.status == 409 and "3 instances already" in answer.error["message"]
    assert len(setup.app.membership.waiting) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        ({"type": "both", "instances": "a:1"}, "type"),
        ({"type": "decode"}, "instances"),
        ({"type": "decode", "instances": ["a"]}, "instances"),
        ({"type": "decode", "instances": ["::1:80"]}, "instances"),
        ({"type": "decode", "instances": ["a:99999"]}, "instances"),
    ],
)
async def test_a_bad_membership_request_is_400(start: Start, body: Any, param: str | None) -> None:
    setup = await start()
    answer = await ask(setup.port, "/instances/add", body)
    assert (answer.status, answer.error["param"]) == (400, param)


async def test_metrics_are_what_happened(start: Start) -> None:
    setup = await start()
    await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS, stream=True))
    setup.p.script = ["status:400"]
    await ask(setup.port, COMPLETIONS, fields_of(COMPLETIONS))
    await setup.settled()
    answer = await get(setup, "/metrics")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }
    assert samples["pd_proxy_requests_total", "200", "completions", "ok", "stream"] == 1
    assert samples["pd_proxy_requests_total", "400", "client_error", "completions", "whole"] == 1
    assert samples["pd_proxy_kv_total", "handed_out"] == samples["pd_proxy_kv_total", "consumed"] == 1
    assert samples["pd_proxy_retries_total", "client_error", "pass_on", "prefill"] == 1
    for name in ("queue", "prefill", "handoff", "ttft", "tpot", "e2e"):
        assert samples[f"pd_proxy_{name}_seconds_count",] >= 1
        assert samples[f"pd_proxy_{name}_seconds_bucket", "+Inf"] == samples[f"pd_proxy_{name}_seconds_count",]
    key = f"127.0.0.1:{setup.p.port}"
    assert samples["pd_proxy_instance_healthy", key, "prefill"] == 1
    assert samples["pd_proxy_instance_load_tokens", key, "prefill"] == 0
    assert samples["pd_proxy_instance_picks_total", key, "prefill"] == 2
