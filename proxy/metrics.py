"""What the proxy counts, and its exposition under `pd_proxy_*`.

Counting is on the hot path, so counters are plain integers and histograms a bisect and two additions
(prometheus_client's own take a lock and five times as long); prometheus_client renders them when somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from proxy.instance import Fleet
from proxy.kv_ledger import KvLedger, KvState

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """Cumulative buckets at exposition only."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.total += seconds

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        bounds = [*map(str, _SECONDS), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(self.counts)), strict=True))
        family = HistogramMetricFamily(name, text)
        family.add_metric([], buckets, self.total)
        return family


class ProxyMetrics(Collector):
    """`requests` is keyed by (route, "stream"|"whole", status, outcome); `retries` by (leg, failure, action)."""

    def __init__(
        self, fleet: Fleet, kv_ledger: KvLedger, num_in_flight: Callable[[], int], num_waiting: Callable[[], int]
    ) -> None:
        self.requests: Counter[tuple[str, str, int, str]] = Counter()
        self.retries: Counter[tuple[str, str, str]] = Counter()
        self.recomputes: Counter[str] = Counter()
        self.metaserver_calls: Counter[str] = Counter()
        self.continuations: Counter[tuple[str, str]] = Counter()
        self.queue = Histogram()
        self.prefill = Histogram()
        self.handoff = Histogram()
        self.ttft = Histogram()
        self.tpot = Histogram()
        self.e2e = Histogram()
        self._fleet = fleet
        self._kv_ledger = kv_ledger
        self._num_in_flight = num_in_flight
        self._num_waiting = num_waiting
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

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
        yield _counters(
            "pd_proxy_requests", "Requests that ended", ["route", "mode", "status", "outcome"], self.requests.items()
        )
        yield _counters(
            "pd_proxy_retries", "What followed failures", ["leg", "failure", "action"], self.retries.items()
        )
        yield _counters(
            "pd_proxy_decoder_recomputes",
            "Requests whose prompt the decoder computed itself",
            ["reason"],
            (((reason,), count) for reason, count in self.recomputes.items()),
        )
        yield _counters(
            "pd_proxy_metaserver_calls",
            "Calls of layerwise decoders by what they were answered",
            ["outcome"],
            (((outcome,), count) for outcome, count in self.metaserver_calls.items()),
        )
        yield _counters(
            "pd_proxy_continuations",
            "Answers whose decoder was lost or gave up in the middle, by what came of it",
            ["reason", "outcome"],
            self.continuations.items(),
        )
        yield self.queue.family("pd_proxy_queue_seconds", "From the request's last byte to sending its first leg")
        yield self.prefill.family("pd_proxy_prefill_seconds", "From sending a prefill to its answer")
        yield self.handoff.family("pd_proxy_handoff_seconds", "From the prefill's answer to the decoder's first event")
        yield self.ttft.family("pd_proxy_ttft_seconds", "From the request's last byte to the first event, streams only")
        yield self.tpot.family("pd_proxy_tpot_seconds", "Mean time between the events of a stream")
        yield self.e2e.family("pd_proxy_e2e_seconds", "From the request's last byte to the answer's")
        yield from self._kv_families()
        yield from self._instance_families()
        in_flight = GaugeMetricFamily("pd_proxy_requests_in_flight", "Requests being served")
        in_flight.add_metric([], self._num_in_flight())
        yield in_flight
        waiting = GaugeMetricFamily("pd_proxy_requests_waiting", "Requests that wait for room on a decoder")
        waiting.add_metric([], self._num_waiting())
        yield waiting

    def _kv_families(self) -> Iterator[Metric]:
        ledger = self._kv_ledger
        ends = [(("handed_out",), ledger.totals[KvState.HELD])]
        ended = (KvState.CONSUMED, KvState.RECLAIMED, KvState.ORPHANED)
        ends.extend(((state.value,), ledger.totals[state]) for state in ended)
        yield _counters("pd_proxy_kv", "KV hand-outs by what became of them", ["event"], ends)
        held = GaugeMetricFamily("pd_proxy_kv_open", "KV handed out that no decoder is known to have", labels=["state"])
        for state in (KvState.HELD, KvState.RECLAIMING):
            held.add_metric([state.value], ledger.count(state))
        yield held

    def _instance_families(self) -> Iterator[Metric]:
        labels = ["role", "instance"]
        rows = [([one.role.value, one.key], one) for one in self._fleet.all]
        values: tuple[tuple[str, str, list[float]], ...] = (
            ("requests", "Requests open on the instance", [one.load.num_requests for _, one in rows]),
            ("load_tokens", "Work open on the instance", [one.load.num_tokens for _, one in rows]),
            ("kv_tokens", "Tokens of KV reserved on a decoder", [one.load.kv_tokens for _, one in rows]),
            (
                "kv_tokens_limit",
                "Tokens of KV it can hold; 0: unknown",
                [one.load.max_kv_tokens for _, one in rows],
            ),
            ("speed_tokens_per_second", "Speed it has shown", [one.load.speed for _, one in rows]),
            ("healthy", "1 if the evidence says it is well", [float(one.health.healthy) for _, one in rows]),
            ("enabled", "1 if the operator wants it used", [float(one.enabled) for _, one in rows]),
            ("connections_active", "Connections with a request", [len(one.pool.active) for _, one in rows]),
            ("connections_idle", "Connections kept for later", [len(one.pool.idle) for _, one in rows]),
        )
        for name, text, column in values:
            gauge = GaugeMetricFamily(f"pd_proxy_instance_{name}", text, labels=labels)
            for (label_values, _), value in zip(rows, column, strict=True):
                gauge.add_metric(label_values, value)
            yield gauge
        picks = CounterMetricFamily("pd_proxy_instance_picks", "How often it was chosen", labels=labels)
        for label_values, one in rows:
            picks.add_metric(label_values, one.load.total_requests)
        yield picks


def _counters(
    name: str, text: str, labels: list[str], rows: Iterable[tuple[tuple[object, ...], int]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in rows:
        family.add_metric([str(value) for value in values], count)
    return family
