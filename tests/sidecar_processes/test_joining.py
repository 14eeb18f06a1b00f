"""An engine of two processes: one registers the pool, the other offers its blocks (JoinPool)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sidecar.client import SidecarClient
from sidecar.errors import OfferRefused, SidecarUnavailable
from sidecar.protocol import PullEnded, PullSource, SidecarLost
from tests.sidecar_processes.harness import FakeEngine, Sidecar, a_layout, eventually


def test_what_the_second_process_offers_is_read_and_its_end_told_to_the_first(directory: Path) -> None:
    with (
        Sidecar(directory, "p", "shm") as p,
        Sidecar(directory, "d", "shm") as d,
        FakeEngine(p) as worker,
        FakeEngine(d) as consumer,
    ):
        scheduler = SidecarClient.connect(p.socket_path)
        try:
            epoch = scheduler.join_pool()
            offer = scheduler.offer("r", [3, 4], 20, 30.0)
            assert offer.epoch == epoch
            hello = scheduler.hello
            source = PullSource(hello.host, hello.port, hello.engine_id, offer.transfer_id, offer.token, epoch, 2)
            consumer.client.pull("r", source, [8, 9])
            assert consumer.pull_ended("r").ok
            assert worker.offer_ended(offer.transfer_id) == "consumed"
            assert not scheduler.poll()

            revoked = scheduler.offer("s", [5], 10, 30.0)
            scheduler.revoke(revoked.transfer_id)
            assert worker.offer_ended(revoked.transfer_id) == "revoked"

            scheduler.pull("own", source, [1, 2])
            ended: list[object] = []
            eventually(lambda: _gather(scheduler, ended))
            assert isinstance(ended[0], PullEnded)
            assert not ended[0].ok and "only the process that registered" in ended[0].message
        finally:
            scheduler.close()
        worker.offer([1])  # the first process goes on alone


def test_there_is_nothing_to_join_without_a_pool_and_it_ends_with_the_pool(directory: Path) -> None:
    with Sidecar(directory, "p", "shm") as p:
        scheduler = SidecarClient.connect(p.socket_path)
        with pytest.raises(OfferRefused, match="no pool is registered"):
            scheduler.join_pool()
        with FakeEngine(p):
            scheduler.join_pool()
            scheduler.offer("r", [1], 10, 30.0)
        seen: list[object] = []
        eventually(lambda: _gather(scheduler, seen))
        assert isinstance(seen[0], SidecarLost)
        with pytest.raises(SidecarUnavailable):
            scheduler.offer("s", [1], 10, 30.0)
        scheduler.close()


def test_who_has_joined_cannot_register(directory: Path) -> None:
    with Sidecar(directory, "p", "shm") as p, FakeEngine(p) as worker:
        scheduler = SidecarClient.connect(p.socket_path)
        scheduler.join_pool()
        fd = os.memfd_create("another")
        try:
            os.ftruncate(fd, a_layout().pool_bytes)
            with pytest.raises(SidecarUnavailable):
                scheduler.register_pool(fd, a_layout())
        finally:
            os.close(fd)
            scheduler.close()
        worker.offer([1])  # unharmed


def _gather(client: SidecarClient, events: list[object]) -> bool:
    events += client.poll()
    return bool(events)
