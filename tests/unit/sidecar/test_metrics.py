from __future__ import annotations

from sidecar.metrics import MAX_PEER_LABELS, SidecarMetrics


def test_names_that_dashboards_use() -> None:
    metrics = SidecarMetrics()
    metrics.pull_ended("ok", "shm", "p@h:1", 3, 3000, 0.004)
    metrics.pull_ended("expired", "shm", "p@h:1", 0, 0, 0.1)
    metrics.offer_ended("consumed")
    metrics.claim_refused("wrong_token")
    metrics.offer_refused("invalid")
    metrics.queued_copies.set(4)
    metrics.leases.labels("offered").set(2)
    metrics.registered_bytes.set(7)
    page = metrics.page().decode()
    for line in (
        'baton_sidecar_pull_blocks_total{peer="p@h:1",transport="shm"} 3.0',
        'baton_sidecar_pull_bytes_total{peer="p@h:1",transport="shm"} 3000.0',
        'baton_sidecar_pull_seconds_count{transport="shm"} 1.0',
        'baton_sidecar_pull_seconds_bucket{le="0.005",transport="shm"} 1.0',
        'baton_sidecar_peer_seconds_total{peer="p@h:1",transport="shm"} 0.004',
        'baton_sidecar_offers_refused_total{reason="invalid"} 1.0',
        "baton_sidecar_queued_copies 4.0",
        'baton_sidecar_pulls_total{outcome="ok"} 1.0',
        'baton_sidecar_pulls_total{outcome="expired"} 1.0',
        'baton_sidecar_offers_ended_total{outcome="consumed"} 1.0',
        'baton_sidecar_claims_refused_total{reason="wrong_token"} 1.0',
        'baton_sidecar_leases{state="offered"} 2.0',
        "baton_sidecar_registered_bytes 7.0",
    ):
        assert line in page.splitlines()


def test_restarting_peers_cannot_grow_the_page_without_end() -> None:
    metrics = SidecarMetrics()
    for number in range(MAX_PEER_LABELS + 5):
        metrics.pull_ended("ok", "shm", f"p@h:{number}", 1, 1, 0.1)
    page = metrics.page().decode()
    assert 'baton_sidecar_pull_bytes_total{peer="other",transport="shm"} 5.0' in page
    assert f'peer="p@h:{MAX_PEER_LABELS}"' not in page
