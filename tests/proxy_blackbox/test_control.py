"""The routes beside the hot ones, on the same port."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.proxy_blackbox.harness import CHAT, COMPLETIONS, HOST, Engines, Proxy, body_of, eventually, text_for


def test_healthcheck_has_the_keys_of_the_ascend_proxy(proxy: Proxy) -> None:
    answer = proxy.get("/healthcheck")
    assert answer.status == 200
    assert answer.json == {"status": "ok", "prefill_instances": 2, "decode_instances": 2, "request_num": 0}


def test_models_are_an_instances_own_answer(proxy: Proxy) -> None:
    answer = proxy.get("/v1/models")
    assert answer.status == 200 and answer.json["data"][0]["id"] == "mock"


def test_health_says_whether_a_request_could_be_served(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy("--health-interval-s", "0.1", "--health-retry-interval-s", "0.1")
    assert proxy.get("/health").status == 200
    for port in engines.decode:
        engines.stop(port)
    eventually(lambda: proxy.get("/health").status != 503, "still healthy without a decoder")
    assert proxy.get("/health").error and proxy.get("/healthcheck").status == 200
    for port in engines.decode:
        engines.start(port)
    eventually(lambda: proxy.get("/health").status != 200, "still unhealthy with decoders")


def test_metrics_parse_and_count(proxy: Proxy) -> None:
    def total(**labels: str) -> float:
        text = proxy.get("/metrics").body.decode()
        families = {family.name: family for family in text_string_to_metric_families(text)}
        requests = next(family for name, family in families.items() if name.endswith("requests"))
        return sum(
            s.value for s in requests.samples if s.name.endswith("_total") and labels.items() <= s.labels.items()
        )

    before, failed = total(), total(status="400")
    for path in (CHAT, COMPLETIONS):
        for stream in (False, True):
            assert proxy.post(path, body_of(path, stream=stream)).status == 200
    proxy.post(CHAT, {"messages": 5})
    assert total() == before + 5
    assert total(status="400") == failed + 1


def test_metrics_are_served_as_prometheus_asks(proxy: Proxy) -> None:
    answer = proxy.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(answer.body.decode()))
    assert len(families) > 5 and all(family.documentation for family in families)
    kinds = {family.type for family in families}
    assert {"counter", "gauge", "histogram"} <= kinds


def test_instances_show_the_loads_while_requests_run(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    import threading

    proxy = start_proxy()
    fields = body_of(CHAT, mock={"prefill_s": 0.5})
    thread = threading.Thread(target=proxy.post, args=(CHAT, fields))
    thread.start()
    try:
        eventually(lambda: not engines.count("prefill", "prefills"), "no prefill began")
        loads = {(one["role"], one["load"]["num_requests"]) for one in proxy.get("/instances").json["instances"]}
        assert {("prefill", 1), ("decode", 1)} <= loads, "a decoder is reserved before prefill starts"
        assert proxy.get("/healthcheck").json["request_num"] == 1
    finally:
        thread.join()


def test_instances_are_added_and_removed(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy("--waiting-retry-interval", "0.1")
    gone = f"{HOST}:{engines.decode[0]}"

    def change(what: str, **fields: Any) -> Any:
        return proxy.post(f"/instances/{what}", fields)

    removed = change("remove", type="decode", instances=[gone]).json
    assert removed["message"] and removed["current_decode_instances"] == [f"{HOST}:{engines.decode[1]}"]
    assert len(removed["current_prefill_instances"]) == 2
    for number in range(4):
        assert proxy.post(CHAT, body_of(CHAT, f"{number}")).status == 200
    assert engines.state()["instances"][2]["counts"].get("requests", 0) == 0
    change("add", type="decode", instances=gone)
    eventually(lambda: proxy.get("/healthcheck").json["decode_instances"] != 2, "the decoder was not added")
    fields = body_of(CHAT)
    assert proxy.post(CHAT, fields).text == text_for(fields)


@pytest.mark.parametrize(
    "fields", [{"type": "both", "instances": "a:1"}, {"type": "decode", "instances": "a"}, {"type": "decode"}, {}]
)
def test_wrong_membership_requests_are_400(proxy: Proxy, fields: dict[str, Any]) -> None:
    for what in ("add", "remove"):
        assert proxy.post(f"/instances/{what}", fields).error


def test_the_engines_get_the_configured_key_and_clients_keep_theirs(
    start_proxy: Callable[..., Proxy], engines: Engines
) -> None:
    proxy = start_proxy(OPENAI_API_KEY="of-the-proxy")
    proxy.post(CHAT, body_of(CHAT))
    proxy.post(CHAT, body_of(CHAT), Authorization="Bearer of-the-client")
    keys = [one["headers"]["authorization"] for leg in ("prefill", "decode") for one in engines.requests(leg)]
    assert sorted(keys) == ["Bearer of-the-client"] * 2 + ["Bearer of-the-proxy"] * 2
