from __future__ import annotations

import orjson
import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from proxy.workers import metrics
from proxy.workers.metrics_sum import Kept, how, joined, read_kept


def families(num: int, extra: str = "") -> list[Metric]:
    requests = CounterMetricFamily("pd_proxy_requests", "Requests", labels=["route"])
    requests.add_metric(["chat"], num)
    if extra:
        requests.add_metric([extra], 1)
    ttft = HistogramMetricFamily("pd_proxy_ttft_seconds", "TTFT")
    ttft.add_metric([], [("0.1", num), ("1.0", 2 * num), ("+Inf", 3 * num)], 0.5 * num)
    gauges = []
    for name in ("in_flight", "instance_healthy", "loop_lag_seconds", "instance_speed_tokens_per_second"):
        gauge = GaugeMetricFamily(f"pd_proxy_{name}", name)
        gauge.add_metric([], num)
        gauges.append(gauge)
    return [requests, ttft, *gauges]


def values(text: bytes) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_counters_and_histograms_are_added_and_gauges_by_what_they_mean() -> None:
    dumps = [metrics.dump(families(1)), metrics.dump(families(5, 'od"d\n'))]
    found = values(metrics.exposition(joined(map(orjson.loads, dumps)), 2))
    assert found == {
        ("pd_proxy_requests_total", "chat"): 6,
        ("pd_proxy_requests_total", 'od"d\n'): 1,
        ("pd_proxy_ttft_seconds_bucket", "0.1"): 6,
        ("pd_proxy_ttft_seconds_bucket", "1.0"): 12,
        ("pd_proxy_ttft_seconds_bucket", "+Inf"): 18,
        ("pd_proxy_ttft_seconds_count",): 18,
        ("pd_proxy_ttft_seconds_sum",): 3,
        ("pd_proxy_in_flight",): 6,
        ("pd_proxy_instance_healthy",): 1,
        ("pd_proxy_loop_lag_seconds",): 5,
        ("pd_proxy_instance_speed_tokens_per_second",): 3,
        ("pd_proxy_workers_serving",): 2,
    }


def test_one_workers_text_is_what_it_would_say_alone() -> None:
    own = metrics.exposition(joined([orjson.loads(metrics.dump(families(3)))]), 1)
    assert b"# TYPE pd_proxy_requests_total counter" in own and b"# HELP pd_proxy_ttft_seconds TTFT" in own


@pytest.mark.parametrize(
    ("name", "kind", "sample", "rule"),
    [
        ("a", "counter", "a_total", "sum"),
        ("a", "counter", "a_created", "min"),
        ("a_healthy", "gauge", "a_healthy", "min"),
        ("process_start_time_seconds", "gauge", "process_start_time_seconds", "min"),
        ("process_resident_memory_bytes", "gauge", "process_resident_memory_bytes", "sum"),
        ("a_kv_tokens_limit", "gauge", "a_kv_tokens_limit", "max"),
        ("build_info", "gauge", "build_info", "max"),
        ("build", "info", "build_info", "first"),
    ],
)
def test_how_a_sample_is_joined(name: str, kind: str, sample: str, rule: str) -> None:
    assert how(name, kind, sample) == rule
    assert how(name, kind, sample, {"a_healthy": "mean"}) == ("mean" if name == "a_healthy" else rule)


def test_what_a_dead_worker_had_counted_stays_and_its_gauges_go() -> None:
    kept = Kept()
    kept.heard(0, metrics.dump(families(4)))
    kept.heard(0, metrics.dump(families(5)))
    kept.heard(1, metrics.dump(families(100)))
    kept.ended(0)
    kept.ended(0)
    kept.heard(0, metrics.dump(families(1)))  # its successor
    kept.ended(0)
    own = orjson.loads(metrics.dump(families(1)))
    found = values(metrics.exposition(joined([own, *read_kept(kept.dump(), [])]), 2))
    assert found["pd_proxy_requests_total", "chat"] == 7 and found["pd_proxy_in_flight",] == 1
    stuck = values(metrics.exposition(joined([own, *read_kept(kept.dump(), [1, 3])]), 2))
    assert stuck["pd_proxy_requests_total", "chat"] == 107 and stuck["pd_proxy_in_flight",] == 1
    assert read_kept(b"", [1]) == []


def test_a_value_that_json_cannot_say_is_nan() -> None:
    gauge = GaugeMetricFamily("pd_proxy_odd", "odd")
    gauge.add_metric([], float("nan"))
    assert b"pd_proxy_odd NaN" in metrics.exposition(joined([orjson.loads(metrics.dump([gauge]))]), 1)
