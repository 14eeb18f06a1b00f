"""`/metrics` of a running proxy: what clients did is what it says, and no client makes it grow."""

from __future__ import annotations

import re
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from proxy.metric_families import FAMILIES
from tests.proxy_blackbox.harness import (
    CHAT,
    COMPLETIONS,
    HOST,
    Engines,
    Proxy,
    body_of,
    connected,
    eventually,
    raw_post,
    read_answer,
)

Samples = dict[tuple[str, ...], float]
PACED = {"prefill_s": 0.15, "first_token_s": 0.1, "interval_s": 0.02}


def scraped(proxy: Proxy) -> Samples:
    """By name and the values of the labels, in the order they are declared."""
    answer = proxy.get("/metrics")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        declared = FAMILIES[family.name + ("_total" if family.type == "counter" else "")].labels
        for one in family.samples:
            names = [*declared, *(["le"] if one.name.endswith("_bucket") else [])]
            found[(one.name, *(one.labels[name] for name in names))] = one.value
    return found


def mean_of(samples: Samples, name: str) -> float:
    return samples[f"pd_proxy_{name}_seconds_sum",] / samples[f"pd_proxy_{name}_seconds_count",]


def test_the_stages_of_a_request_add_up(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    engines.configure(**PACED)
    proxy = start_proxy()
    for number in range(3):
        proxy.post(CHAT, body_of(CHAT, f"Say {number}", num_tokens=8, stream=True))
    eventually(proxy.wrong, "the proxy is not idle")
    samples = scraped(proxy)
    assert samples["pd_proxy_requests_total", "chat", "stream", "200", "ok"] == 3
    means = {name: mean_of(samples, name) for name in ("queue", "prefill", "handoff", "ttft", "tpot", "e2e")}
    assert means["prefill"] >= PACED["prefill_s"] and means["handoff"] >= PACED["first_token_s"]
    stages = means["queue"] + means["prefill"] + means["handoff"]
    assert stages * 0.95 <= means["ttft"] <= stages * 1.5 + 0.05
    assert 0.25 * PACED["interval_s"] < means["tpot"] and means["e2e"] > means["ttft"]
    assert samples["pd_proxy_stream_events_total",] >= 3 * 7
    assert samples["pd_proxy_kv_total", "handed_out"] == samples["pd_proxy_kv_total", "consumed"] == 3
    assert samples["pd_proxy_prompt_tokens_total",] > 0
    picks = {role: sum(value for key, value in samples.items() if key[:2] == ("pd_proxy_instance_picks_total", role))
             for role in ("prefill", "decode")}  # fmt: skip
    assert picks == {"prefill": 3, "decode": 3}


def test_what_a_client_sends_makes_no_new_series(start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy()
    for number in range(3):
        proxy.post(f"/v1/nothing/{number}", {"model": f"m{number}"}, X_Request_Id=f"mine-{number}")
        proxy.post(COMPLETIONS, b"{" * (number + 1))
        proxy.post(COMPLETIONS, body_of(COMPLETIONS, model=f"model-{number}"), X_Request_Id=f"mine-{number}")
        with connected(proxy.port) as sock:
            sock.sendall(b"GARBAGE%d\r\n\r\n" % number)
            assert read_answer(sock).status == 400
    samples = scraped(proxy)
    requests = {key[1:]: value for key, value in samples.items() if key[0] == "pd_proxy_requests_total"}
    assert requests == {
        ("passed", "whole", "404", "refused"): 3,
        ("completions", "whole", "400", "refused"): 3,
        ("completions", "whole", "200", "ok"): 3,
        ("none", "whole", "400", "refused"): 3,
    }
    page = proxy.get("/metrics").body.decode()
    assert not re.search(r"mine-\d|model-\d|v1/nothing", page)


def test_connections_and_requests_are_seen_while_they_are_open(
    start_proxy: Callable[..., Proxy], engines: Engines
) -> None:
    engines.configure(prefill_s=3.0)
    proxy = start_proxy()
    with connected(proxy.port) as idle, connected(proxy.port) as busy:
        idle.sendall(b"POST ")
        busy.sendall(raw_post(COMPLETIONS, b'{"model": "mock", "prompt": "x", "max_tokens": 2}'))

        def wrong() -> object:
            samples = scraped(proxy)
            prefilling = [key for key, value in samples.items() if key[0] == "pd_proxy_instance_requests" and value]
            waits = [key for key, value in samples.items() if key[0] == "pd_proxy_instance_queue_seconds" and value]
            seen = (samples["pd_proxy_client_connections",], samples["pd_proxy_requests_in_flight",])
            roles = sorted({key[1] for key in prefilling}), sorted({key[1] for key in waits})
            return seen != (2, 1) or roles != (["decode", "prefill"], ["decode", "prefill"])

        eventually(wrong, "they are not seen")
        assert read_answer(busy).status == 200
    eventually(lambda: scraped(proxy)["pd_proxy_client_connections",], "connections are left")


def test_an_instance_that_is_out_is_seen(start_proxy: Callable[..., Proxy], engines: Engines) -> None:
    proxy = start_proxy("--health-interval-s", "0.1", "--health-retry-interval-s", "0.1")
    port = engines.prefill[0]
    engines.stop(port)
    key = f"{HOST}:{port}"
    eventually(lambda: scraped(proxy)["pd_proxy_instance_healthy", "prefill", key], "it is not out", 15)
    samples = scraped(proxy)
    assert samples["pd_proxy_instances", "prefill", "out"] == samples["pd_proxy_instances", "prefill", "ready"] == 1
    proxy.post("/instances/add", {"type": "decode", "instances": "127.0.0.1:1"})
    assert scraped(proxy)["pd_proxy_instances", "decode", "waiting"] == 1
    engines.start(port)
    eventually(lambda: not scraped(proxy)["pd_proxy_instance_healthy", "prefill", key], "it is not back", 15)


def test_the_process_and_its_loop(start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy()
    eventually(lambda: not scraped(proxy)["pd_proxy_loop_lag_seconds_count",], "no lag was measured")
    samples = scraped(proxy)
    assert samples["process_resident_memory_bytes",] > 10e6 and samples["process_open_fds",] > 5
    (build,) = (key for key in samples if key[0] == "pd_proxy_build_info")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", build[1]) and samples[build] == 1
