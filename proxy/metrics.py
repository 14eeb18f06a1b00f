"""What the proxy counts, and its exposition (`metric_families.py` has the names).

Counting is on the hot path, so counters are plain integers and histograms a bisect and two additions
(prometheus_client's own take a lock and five times as long); prometheus_client renders them when somebody asks.
"""

from __future__ import annotations

import importlib.metadata
import platform
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from proxy.instance import Fleet, Instance, Role
from proxy.kv_ledger import KvLedger, KvState
from proxy.metric_families import OURS, bounds_of

CONTENT_TYPE = CONTENT_TYPE_LATEST
STATES = ("ready", "out", "draining", "waiting")

Row = tuple[tuple[object, ...], float]
"""Label values in the order of the family's labels, and the value."""


class Histogram:
    """Of one family, without labels. Cumulative buckets at exposition only."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, name: str) -> None:
        self.bounds = bounds_of(name)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        bounds = [*map(str, self.bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))


class Readings(NamedTuple):
    """What is read off the other parts when somebody asks."""

    num_in_flight: Callable[[], int]
    num_waiting: Callable[[], int]
    num_connections: Callable[[], int]
    num_joining: Callable[[Role], int]
    """Instances that were added and have not answered yet."""
    num_rejected: Callable[[], Mapping[str, int]]


class ProxyMetrics(Collector):
    """`requests` is keyed by (route, "stream"|"whole", status, outcome); `retries` by (leg, failure, action)."""

    def __init__(self, fleet: Fleet, kv_ledger: KvLedger, readings: Readings) -> None:
        self.requests: Counter[tuple[str, str, int, str]] = Counter()
        self.retries: Counter[tuple[str, str, str]] = Counter()
        self.recomputes: Counter[str] = Counter()
        self.metaserver_calls: Counter[str] = Counter()
        self.continuations: Counter[tuple[str, str]] = Counter()
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.stream_events = self.lent_stream_events = 0
        self.queue = Histogram("pd_proxy_queue_seconds")
        self.prefill = Histogram("pd_proxy_prefill_seconds")
        self.handoff = Histogram("pd_proxy_handoff_seconds")
        self.ttft = Histogram("pd_proxy_ttft_seconds")
        self.tpot = Histogram("pd_proxy_tpot_seconds")
        self.e2e = Histogram("pd_proxy_e2e_seconds")
        self.loop_lag = Histogram("pd_proxy_loop_lag_seconds")
        self._fleet = fleet
        self._kv_ledger = kv_ledger
        self._readings = readings
        self._build = (importlib.metadata.version("pd-baton"), platform.python_version())
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def recompute(self, reason: str) -> None:
        self.recomputes[reason] += 1

    def refused(self, status: int) -> None:
        """A request that could not be read (bad head, over a limit)."""
        self.requests["none", "whole", status, "refused"] += 1

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def collected(self) -> Iterable[Metric]:
        """Every family as it stands now: what other worker processes add theirs to."""
        return self._registry.collect()

    def collect(self) -> Iterator[Metric]:
        histograms = {
            "queue": self.queue, "prefill": self.prefill, "handoff": self.handoff, "ttft": self.ttft,
            "tpot": self.tpot, "e2e": self.e2e, "loop_lag": self.loop_lag,
        }  # fmt: skip
        rows = {**self._counts(), **self._gauges(), **self._of_instances()}
        for name, family in OURS.items():
            if family.kind == "histogram":
                of_it = histograms[name.removeprefix("pd_proxy_").removesuffix("_seconds")]
                shown = HistogramMetricFamily(name, family.text)
                shown.add_metric([], of_it.buckets(), of_it.total)
                yield shown
                continue
            kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = kind(name.removesuffix("_total"), family.text, labels=family.labels)
            for values, value in rows[name]:
                metric.add_metric([str(one) for one in values], value)
            yield metric

    def _counts(self) -> dict[str, Iterable[Row]]:
        totals = self._kv_ledger.totals
        ended = (KvState.CONSUMED, KvState.RECLAIMED, KvState.ORPHANED)
        return {
            "pd_proxy_requests_total": self.requests.items(),
            "pd_proxy_retries_total": self.retries.items(),
            "pd_proxy_continuations_total": self.continuations.items(),
            "pd_proxy_decoder_recomputes_total": _single(self.recomputes),
            "pd_proxy_metaserver_calls_total": _single(self.metaserver_calls),
            "pd_proxy_admission_rejected_total": _single(self._readings.num_rejected()),
            "pd_proxy_prompt_tokens_total": _one(self.prompt_tokens),
            "pd_proxy_cached_prompt_tokens_total": _one(self.cached_prompt_tokens),
            "pd_proxy_stream_events_total": _one(self.stream_events),
            "pd_proxy_lent_stream_events_total": _one(self.lent_stream_events),
            "pd_proxy_kv_total": _single(
                {"handed_out": totals[KvState.HELD], **{state.value: totals[state] for state in ended}}
            ),
        }

    def _gauges(self) -> dict[str, Iterable[Row]]:
        readings, ledger = self._readings, self._kv_ledger
        return {
            "pd_proxy_requests_in_flight": _one(readings.num_in_flight()),
            "pd_proxy_requests_waiting": _one(readings.num_waiting()),
            "pd_proxy_client_connections": _one(readings.num_connections()),
            "pd_proxy_kv_open": _single(
                {state.value: ledger.count(state) for state in (KvState.HELD, KvState.RECLAIMING)}
            ),
            "pd_proxy_instances": list(self._states()),
            "pd_proxy_build_info": [(self._build, 1)],
        }

    def _states(self) -> Iterator[Row]:
        for role, members in self._fleet.members.items():
            counts = Counter(_state(one) for one in members)
            counts["waiting"] = self._readings.num_joining(role)
            for state in STATES:
                yield (role.value, state), counts[state]

    def _of_instances(self) -> dict[str, Iterable[Row]]:
        fleet = self._fleet.all
        held = Counter(entry.prefiller for entry in self._kv_ledger.open)

        def of_each(value: Callable[[Instance], float], role: Role | None = None) -> list[Row]:
            return [((one.role.value, one.key), value(one)) for one in fleet if role in (None, one.role)]

        shown: dict[str, Iterable[Row]] = {
            "requests": of_each(lambda one: one.load.num_requests),
            "load_tokens": of_each(lambda one: one.load.num_tokens),
            "queue_seconds": of_each(lambda one: one.load.num_tokens / one.load.speed),
            "kv_held": of_each(lambda one: held[one.key], Role.PREFILL),
            "kv_tokens": of_each(lambda one: one.load.kv_tokens),
            "kv_tokens_limit": of_each(lambda one: one.load.max_kv_tokens),
            "speed_tokens_per_second": of_each(lambda one: one.load.speed),
            "healthy": of_each(lambda one: one.health.healthy),
            "enabled": of_each(lambda one: one.enabled),
            "connections_active": of_each(lambda one: len(one.pool.active)),
            "connections_idle": of_each(lambda one: len(one.pool.idle)),
            "picks_total": of_each(lambda one: one.load.total_requests),
            "failures_total": [
                ((one.role.value, one.key, failure), count) for one in fleet for failure, count in one.failures.items()
            ],
        }
        return {f"pd_proxy_instance_{name}": rows for name, rows in shown.items()}


def _state(one: Instance) -> str:
    if not one.enabled:
        return "draining"
    return "ready" if one.health.healthy else "out"


def _one(value: float) -> list[Row]:
    return [((), value)]


def _single(counts: Mapping[str, int]) -> list[Row]:
    """Rows of a family with one label."""
    return [((value,), count) for value, count in counts.items()]
