"""What the prefix store counts, by tier."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class StoreMetrics:
    """On a sidecar's registry; also the TierObserver of its tiers. Thread-safe."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        tier = ("tier",)
        self._hits = self._counter("hits", "Blocks asked of a tier and got.", tier)
        self._misses = self._counter("misses", "Blocks asked of a tier and not got.", tier)
        self._read_bytes = self._counter("read_bytes", "Bytes of blocks got.", tier)
        self._written_blocks = self._counter("written_blocks", "Blocks taken by a tier.", tier)
        self._written_bytes = self._counter("written_bytes", "Bytes of blocks taken.", tier)
        self._evictions = self._counter("evictions", "Blocks put out to make room.", tier)
        self._errors = self._counter("errors", "What went wrong in a tier.", ("tier", "kind"))
        self._dropped = self._counter("dropped_blocks", "Blocks not kept, by reason.", ("reason",))
        self._loads = self._counter("loads", "Loads that ended, by outcome: ok or the reason.", ("outcome",))
        self._saves = self._counter("saves", "Saves that ended.", ())
        self._load_seconds = self._histogram("load_seconds", "From the engine's load to its end.", ())
        self._read_seconds = self._histogram("read_seconds", "Reading one block.", tier)
        self._write_seconds = self._histogram("write_seconds", "Writing one block.", tier)
        self.blocks = self._gauge("blocks", "Blocks held, as far as known here.", tier)
        self.used_bytes = self._gauge("bytes", "Bytes held, as far as known here.", tier)
        self.up = self._gauge("tier_up", "1 while a tier takes and gives blocks.", tier)
        self.queued_bytes = self._gauge("queued_bytes", "Bytes of blocks on their way to slower tiers.", ())

    def read(self, tier: str, num_bytes: int | None, seconds: float) -> None:
        """One block was asked for; `num_bytes` is None for a miss."""
        if num_bytes is None:
            self._misses.labels(tier).inc()
            return
        self._hits.labels(tier).inc()
        self._read_bytes.labels(tier).inc(num_bytes)
        self._read_seconds.labels(tier).observe(seconds)

    def written(self, tier: str, num_bytes: int, seconds: float) -> None:
        self._written_blocks.labels(tier).inc()
        self._written_bytes.labels(tier).inc(num_bytes)
        self._write_seconds.labels(tier).observe(seconds)

    def dropped(self, reason: str, num_blocks: int) -> None:
        self._dropped.labels(reason).inc(num_blocks)

    def load_ended(self, outcome: str, seconds: float) -> None:
        self._loads.labels(outcome).inc()
        self._load_seconds.observe(seconds)

    def save_ended(self) -> None:
        self._saves.inc()

    def evicted(self, tier: str, num_blocks: int) -> None:
        """See contract.TierObserver."""
        self._evictions.labels(tier).inc(num_blocks)

    def error(self, tier: str, kind: str) -> None:
        """See contract.TierObserver."""
        self._errors.labels(tier, kind).inc()

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"baton_sidecar_store_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(f"baton_sidecar_store_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, labels: tuple[str, ...]) -> Histogram:
        return Histogram(f"baton_sidecar_store_{name}", text, labels, registry=self._registry, buckets=_SECONDS)
