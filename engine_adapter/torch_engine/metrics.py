"""What /metrics shows: vLLM's names for what vLLM has too, `baton_engine_` for the KV hand-off.

Observations are made on the event loop for every token, so histograms are plain bucket counts here and become
Prometheus families only when somebody reads them.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine_adapter.torch_engine.engine import EngineStats
from engine_adapter.torch_engine.kv_transfer import PullResult
from engine_adapter.torch_engine.prefix_store import LoadResult

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip  # noqa: E501
TPOT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)  # fmt: skip  # noqa: E501
E2E_BUCKETS_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip  # noqa: E501
PULL_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
"""vLLM's buckets, so that dashboards fit; below 1 ms added where a CPU and a small model are that fast."""


class BucketCounts:
    """A histogram's counts: `observe` is a bisection and two additions."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        family.add_metric(
            labels, list(zip(bounds, map(float, accumulate(self._counts)), strict=True)), sum_value=self._sum
        )


class ServerMetrics(Collector):
    """The server's own observations, and the engine's counters read at scrape time.

    Event loop only, but for `observe_pull` and `observe_load`, which the engine thread calls.
    """

    def __init__(self, model_name: str, read_engine: Callable[[], EngineStats], *, with_process: bool = True) -> None:
        self.model_name = model_name
        self._labels = [model_name]
        self._read_engine = read_engine
        self._ttft = BucketCounts(TTFT_BUCKETS_S)
        self._token_gap = BucketCounts(TPOT_BUCKETS_S)
        self._e2e = BucketCounts(E2E_BUCKETS_S)
        self._prompt_tokens = BucketCounts(TOKEN_BUCKETS)
        self._generation_tokens = BucketCounts(TOKEN_BUCKETS)
        self._finished: dict[str, int] = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self._pulls = PullCounts()
        self._loads = LoadCounts()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        if with_process:
            ProcessCollector(registry=self._registry)
            PlatformCollector(registry=self._registry)

    def observe_first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def observe_token_gap(self, seconds: float) -> None:
        self._token_gap.observe(seconds)

    def observe_finished(self, reason: str, seconds: float, num_prompt_tokens: int, num_generated: int) -> None:
        self._finished[reason] = self._finished.get(reason, 0) + 1
        self._e2e.observe(seconds)
        self._prompt_tokens.observe(num_prompt_tokens)
        self._generation_tokens.observe(num_generated)

    def observe_aborted(self) -> None:
        self._finished["abort"] += 1

    def observe_pull(self, pull: PullResult) -> None:
        self._pulls.observe(pull)

    def observe_load(self, load: LoadResult) -> None:
        """By the engine thread, as `observe_pull`."""
        self._loads.observe(load)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        stats = self._read_engine()
        yield from self._gauges(stats)
        yield from self._counters(stats)
        yield from self._histograms()
        yield from self._pulls.collect()
        yield from self._loads.collect()

    def _gauges(self, stats: EngineStats) -> Iterable[Metric]:
        for name, text, value in (
            ("vllm:num_requests_running", "Requests in the running batch.", stats.num_running),
            (
                "vllm:num_requests_waiting",
                "Requests not running yet, those that wait for remote KV included.",
                stats.num_waiting + stats.num_waiting_for_remote_kv,
            ),
            ("vllm:kv_cache_usage_perc", "Share of the KV pool in use; 1 is 100 %.", stats.kv_cache_usage),
            (
                "baton_engine_requests_waiting_for_remote_kv",
                "Requests whose KV is coming.",
                stats.num_waiting_for_remote_kv,
            ),
            ("baton_engine_blocks", "KV blocks in the pool.", stats.num_blocks),
            ("baton_engine_free_blocks", "KV blocks free, or cached and evictable.", stats.num_free_blocks),
            ("baton_engine_blocks_held_by_offers", "KV blocks kept for decoders.", stats.num_blocks_held_by_offers),
        ):
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            family.add_metric(self._labels, value)
            yield family
        pool = GaugeMetricFamily(  # vLLM says the pool's size in labels; a proxy reads it there
            "vllm:cache_config_info", "The KV pool.", labels=["model_name", "block_size", "num_gpu_blocks"]
        )
        pool.add_metric([*self._labels, str(stats.block_size), str(stats.num_blocks)], 1)
        yield pool

    def _counters(self, stats: EngineStats) -> Iterable[Metric]:
        sources = {
            "local_compute": stats.num_prompt_tokens_local_compute,
            "local_cache_hit": stats.num_prompt_tokens_local_cache_hit,
            "external_kv_transfer": stats.num_prompt_tokens_external_kv_transfer,
        }
        for name, text, value in (
            ("vllm:prompt_tokens", "Prompt tokens, wherever their KV came from.", sum(sources.values())),
            ("vllm:generation_tokens", "Tokens generated.", stats.num_generation_tokens),
            ("vllm:num_preemptions", "Requests preempted because the pool was full.", stats.num_preemptions),
            ("baton_engine_images_encoded", "Images that the vision tower computed.", stats.num_images_encoded),
        ):
            family = CounterMetricFamily(name, text, labels=["model_name"])
            family.add_metric(self._labels, value)
            yield family
        by_source = CounterMetricFamily(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens by where their KV came from.",
            labels=["model_name", "source"],
        )
        for source, value in sources.items():
            by_source.add_metric([*self._labels, source], value)
        yield by_source
        finished = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by reason.", labels=["model_name", "finished_reason"]
        )
        for reason, value in self._finished.items():
            finished.add_metric([*self._labels, reason], value)
        yield finished

    def _histograms(self) -> Iterable[Metric]:
        for name, text, counts in (
            ("vllm:time_to_first_token_seconds", "From arrival to the first token.", self._ttft),
            ("vllm:time_per_output_token_seconds", "Between tokens; vLLM's older name.", self._token_gap),
            ("vllm:inter_token_latency_seconds", "Between tokens.", self._token_gap),
            ("vllm:e2e_request_latency_seconds", "From arrival to the last token.", self._e2e),
            ("vllm:request_prompt_tokens", "Prompt tokens a request.", self._prompt_tokens),
            ("vllm:request_generation_tokens", "Tokens generated a request.", self._generation_tokens),
        ):
            family = HistogramMetricFamily(name, text, labels=["model_name"])
            counts.add_to(family, self._labels)
            yield family


class PullCounts:
    """KV pulled from other engines, by transport and peer. Written by the engine thread, read by the loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moved: dict[tuple[str, str], list[int]] = {}
        self._seconds: dict[str, BucketCounts] = {}
        self._ended: dict[str, int] = {}

    def observe(self, pull: PullResult) -> None:
        with self._lock:
            outcome = "ok" if pull.ok else pull.reason or "failed"
            self._ended[outcome] = self._ended.get(outcome, 0) + 1
            if not pull.ok:
                return
            moved = self._moved.setdefault((pull.transport, pull.peer), [0, 0])
            moved[0] += pull.num_blocks
            moved[1] += pull.num_bytes
            self._seconds.setdefault(pull.transport, BucketCounts(PULL_BUCKETS_S)).observe(pull.seconds)

    def collect(self) -> Iterable[Metric]:
        ended = CounterMetricFamily("baton_engine_kv_pulls", "KV pulls that ended, by outcome.", labels=["outcome"])
        blocks = CounterMetricFamily("baton_engine_kv_pull_blocks", "KV blocks pulled.", labels=["transport", "peer"])
        moved_bytes = CounterMetricFamily(
            "baton_engine_kv_pull_bytes", "KV bytes pulled.", labels=["transport", "peer"]
        )
        seconds = HistogramMetricFamily("baton_engine_kv_pull_seconds", "Time a pull took.", labels=["transport"])
        with self._lock:
            for outcome, count in self._ended.items():
                ended.add_metric([outcome], count)
            for (transport, peer), (num_blocks, num_bytes) in self._moved.items():
                blocks.add_metric([transport, peer], num_blocks)
                moved_bytes.add_metric([transport, peer], num_bytes)
            for transport, counts in self._seconds.items():
                counts.add_to(seconds, [transport])
        return [ended, blocks, moved_bytes, seconds]


class LoadCounts:
    """Blocks loaded from the prefix store, by tier. Written by the engine thread, read by the loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[str, int] = {}
        self._num_bytes = 0
        self._seconds = BucketCounts(PULL_BUCKETS_S)
        self._ended: dict[str, int] = {}

    def observe(self, load: LoadResult) -> None:
        with self._lock:
            outcome = load.reason or "ok"
            self._ended[outcome] = self._ended.get(outcome, 0) + 1
            self._seconds.observe(load.seconds)
            self._num_bytes += load.num_bytes
            for tier, num_blocks in load.tiers.items():
                self._blocks[tier] = self._blocks.get(tier, 0) + num_blocks

    def collect(self) -> Iterable[Metric]:
        ended = CounterMetricFamily(
            "baton_engine_store_loads", "Prompts that asked the prefix store, by outcome.", labels=["outcome"]
        )
        blocks = CounterMetricFamily(
            "baton_engine_store_load_blocks", "KV blocks loaded from the prefix store.", labels=["tier"]
        )
        moved_bytes = CounterMetricFamily("baton_engine_store_load_bytes", "KV bytes loaded from the prefix store.")
        seconds = HistogramMetricFamily("baton_engine_store_load_seconds", "Time a load took.", labels=[])
        with self._lock:
            for outcome, count in self._ended.items():
                ended.add_metric([outcome], count)
            for tier, num_blocks in self._blocks.items():
                blocks.add_metric([tier], num_blocks)
            moved_bytes.add_metric([], self._num_bytes)
            self._seconds.add_to(seconds, [])
        return [ended, blocks, moved_bytes, seconds]
