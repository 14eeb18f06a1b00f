"""Between prometheus_client's families and the plain lists that `metrics_sum.py` joins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import orjson
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.workers.metrics_sum import Family


def dump(families: Iterable[Metric]) -> bytes:
    """One worker's, as JSON: a list of `Family`."""
    return orjson.dumps(
        [
            [one.name, one.type, one.documentation, [[s.name, s.labels, float(s.value)] for s in one.samples]]
            for one in families
        ]
    )


class _Fixed(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def exposition(families: Iterable[Family], num_serving: int) -> bytes:
    """Joined families as text, with how many workers serve."""
    metrics = []
    for name, kind, text, samples in families:
        metric = Metric(name, text, kind)
        for sample, labels, value in samples:
            metric.add_sample(sample, labels, math.nan if value is None else value)
        metrics.append(metric)
    workers = GaugeMetricFamily("pd_proxy_workers_serving", "Worker processes that serve")
    workers.add_metric([], num_serving)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Fixed([*metrics, workers]))
    return generate_latest(registry)
