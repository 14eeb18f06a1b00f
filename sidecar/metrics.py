"""What the sidecar counts, under the names that dashboards use."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_PEER_LABELS = 1024
"""Peers that get a label of their own; later ones are counted as "other", so that restarts cannot grow the page."""

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class SidecarMetrics:
    """One registry a sidecar, so that several can live in one process (tests)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._peers: set[str] = set()
        labels = ("transport", "peer")
        self._blocks = self._counter("pull_blocks", "KV blocks pulled and confirmed.", labels)
        self._bytes = self._counter("pull_bytes", "Bytes pulled and confirmed.", labels)
        self._pulls = self._counter("pulls", "Pulls that ended, by outcome: ok or the reason.", ("outcome",))
        self._offers_ended = self._counter("offers_ended", "Leases that ended, by outcome.", ("outcome",))
        self._peer_seconds = self._counter("peer_seconds", "Seconds that confirmed pulls took, by peer.", labels)
        self._offers_refused = self._counter("offers_refused", "Offers not taken, by reason.", ("reason",))
        self._claims_refused = self._counter("claims_refused", "Claims refused, by reason.", ("reason",))
        self._hellos_refused = self._counter("hellos_refused", "Peers turned away at the hello.", ("reason",))
        self._seconds = Histogram(
            "baton_sidecar_pull_seconds", "From the engine's pull to its confirmed end.", ("transport",),
            registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip
        self.leases = self._gauge("leases", "Leases out, by state.", ("state",))
        self.open_pulls = self._gauge("open_pulls", "Pulls under way.", ())
        self.open_landings = self._gauge("open_landings", "Blocks that wait for a producer or are filled by it.", ())
        self._landings = self._counter("landings", "Landings that ended, by outcome: ok or the reason.", ("outcome",))
        self.queued_copies = self._gauge("queued_copies", "Copies over shared memory that wait for a thread.", ())
        self.registered_bytes = self._gauge("registered_bytes", "Bytes of the registered pool.", ())
        self._links = self._gauge("peer_links", "Connections to producers, by the transport chosen.", labels)

    def pull_ended(
        self, outcome: str, transport: str, peer: str, num_blocks: int, num_bytes: int, seconds: float
    ) -> None:
        """Count one pull; `outcome` is "ok" or a reason."""
        self._pulls.labels(outcome).inc()
        if outcome == "ok":
            peer = self._peer(peer)
            self._blocks.labels(transport, peer).inc(num_blocks)
            self._bytes.labels(transport, peer).inc(num_bytes)
            self._peer_seconds.labels(transport, peer).inc(seconds)
            self._seconds.labels(transport).observe(seconds)

    def also_read(self, transport: str, peer: str, num_bytes: int) -> None:
        """Count what a pull that ended well has read from another rank than its first."""
        self._bytes.labels(transport, self._peer(peer)).inc(num_bytes)

    def offer_ended(self, outcome: str) -> None:
        self._offers_ended.labels(outcome).inc()

    def landing_ended(self, outcome: str) -> None:
        self._landings.labels(outcome).inc()

    def offer_refused(self, reason: str) -> None:
        self._offers_refused.labels(reason).inc()

    def claim_refused(self, reason: str) -> None:
        self._claims_refused.labels(reason).inc()

    def hello_refused(self, reason: str) -> None:
        self._hellos_refused.labels(reason).inc()

    def link_opened(self, transport: str, peer: str) -> None:
        self._links.labels(transport, self._peer(peer)).inc()

    def link_closed(self, transport: str, peer: str) -> None:
        self._links.labels(transport, self._peer(peer)).dec()

    def page(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self.registry)

    def _peer(self, peer: str) -> str:
        if peer not in self._peers and len(self._peers) >= MAX_PEER_LABELS:
            return "other"
        self._peers.add(peer)
        return peer

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"baton_sidecar_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(f"baton_sidecar_{name}", text, labels, registry=self.registry)
