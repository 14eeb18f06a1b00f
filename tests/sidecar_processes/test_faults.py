"""Processes that die, hang, restart or give up in the middle: bounded, told apart, and never a late byte."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidecar.protocol import PullSource, SidecarLost
from tests.sidecar_processes.conftest import NEEDS_MOONCAKE, QUICK_CLAIMS, SLOW_COPY
from tests.sidecar_processes.harness import EngineProcess, FakeEngine, Sidecar, a_layout, eventually, paused

BLOCKS = list(range(128))
"""One mebibyte: four seconds of a slow copy."""

Start = Callable[..., Sidecar]


@pytest.fixture
def start(directory: Path, transport: str) -> Iterator[Start]:
    """Start sidecars of this transport; all are stopped in the end."""
    with contextlib.ExitStack() as stack:

        def start_one(name: str, *flags: str, **options: str) -> Sidecar:
            return stack.enter_context(Sidecar(directory, name, transport, *flags, **options))

        yield start_one


def begin_slow_pull(producer: FakeEngine, consumer: FakeEngine, ttl_s: float = 30.0) -> tuple[str, PullSource]:
    """A pull named "slow" whose copy is under way for sure; the transfer id and its source."""
    assert consumer.pull(producer.offer([255])[1], [255]).ok
    offer, source = producer.offer(BLOCKS, ttl_s)
    consumer.fill(0)
    consumer.client.pull("slow", source, BLOCKS)
    eventually(lambda: any(consumer.pool[:: 8192 // 2]))
    return offer.transfer_id, source


def assert_nothing_is_written_any_more(consumer: FakeEngine, seconds: float = 0.7) -> None:
    """The blocks are put to another use; they must keep what is put there."""
    consumer.fill(42)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert consumer.pool[:] == bytes([42]) * len(consumer.pool)
        time.sleep(0.02)


def test_an_abandoned_pull_stops_and_drops_its_lease(start: Start) -> None:
    with FakeEngine(start("p")) as producer, FakeEngine(start("d", *SLOW_COPY)) as consumer:
        transfer_id, source = begin_slow_pull(producer, consumer)
        asked_at = time.monotonic()
        consumer.client.abandon("slow")
        ended = consumer.pull_ended("slow", 2.0)
        assert (ended.ok, ended.reason) == (False, "abandoned") and time.monotonic() - asked_at < 1.5
        assert_nothing_is_written_any_more(consumer)
        assert producer.offer_ended(transfer_id, 2.0) == "dropped"
        assert consumer.count("slow") == 1
        assert consumer.pull(source, BLOCKS).reason == "released"


def test_a_pull_beyond_its_deadline_stops_and_gives_the_lease_back(start: Start) -> None:
    with FakeEngine(start("p")) as producer, FakeEngine(start("d", *SLOW_COPY)) as consumer:
        assert consumer.pull(producer.offer([255])[1], [255]).ok
        _, source = producer.offer(BLOCKS)
        asked_at = time.monotonic()
        ended = consumer.pull(source, BLOCKS, deadline_s=0.5)
        assert (ended.ok, ended.reason) == (False, "timeout") and 0.4 < time.monotonic() - asked_at < 2.0
        assert_nothing_is_written_any_more(consumer)
        ended = consumer.pull(source, BLOCKS[:8])
        assert ended.ok, ended


def test_a_lease_claimed_by_one_engine_is_refused_to_another_until_it_dies(start: Start) -> None:
    first_sidecar = start("first", *SLOW_COPY)
    with (
        FakeEngine(start("p")) as producer,
        FakeEngine(start("second")) as second,
        FakeEngine(first_sidecar) as first,
    ):
        _, source = begin_slow_pull(producer, first)
        before = second.pool[:]
        ended = second.pull(source, BLOCKS)
        assert (ended.ok, ended.reason) == (False, "wrong_engine") and "first" in ended.message
        second.client.drop(source)  # not its to drop either
        assert second.pool[:] == before
        first_sidecar.kill()
        eventually(lambda: second.pull(source, BLOCKS).ok, 3.0)
        assert [second.block(b) for b in BLOCKS] == [producer.block(b) for b in BLOCKS]


def test_expiry_during_a_stalled_copy_invalidates_it(start: Start) -> None:
    """The consumer's sidecar sleeps through its lease; the blocks may be anything by the time it wakes."""
    consumer_sidecar = start("d", *SLOW_COPY, *QUICK_CLAIMS)
    with FakeEngine(start("p", *QUICK_CLAIMS)) as producer, FakeEngine(consumer_sidecar) as consumer:
        transfer_id, _ = begin_slow_pull(producer, consumer, ttl_s=0.3)
        time.sleep(1.0)  # heartbeats carry it past its offer's time
        assert consumer.count("slow") == 0 and not any(
            getattr(event, "transfer_id", "") == transfer_id for event in producer.client.poll()
        )
        with paused(consumer_sidecar.process.pid):
            assert producer.offer_ended(transfer_id, 3.0) == "expired"
        ended = consumer.pull_ended("slow", 8.0)
        assert (ended.ok, ended.reason) == (False, "expired")
        assert_nothing_is_written_any_more(consumer)


def test_a_killed_producer_sidecar_fails_its_pulls_at_once_and_comes_back(start: Start) -> None:
    producer_sidecar = start("p")
    with FakeEngine(producer_sidecar) as producer, FakeEngine(start("d", *SLOW_COPY)) as consumer:
        _, source = begin_slow_pull(producer, consumer)
        killed_at = time.monotonic()
        producer_sidecar.kill()
        ended = consumer.pull_ended("slow", 3.0)
        assert not ended.ok and ended.reason in ("unreachable", "transport") and time.monotonic() - killed_at < 2.5
        assert_nothing_is_written_any_more(consumer)
        assert isinstance(producer.wait(lambda event: isinstance(event, SidecarLost), 2.0), SidecarLost)

        with FakeEngine(start("p", listen=producer_sidecar.listen)) as again:
            before = consumer.pool[:]
            assert consumer.pull(source, BLOCKS).reason == "stale_epoch"
            assert consumer.pool[:] == before
            assert consumer.pull(again.offer([7])[1], [8]).ok
            assert consumer.block(8) == again.block(7)


def test_a_killed_consumer_sidecar_is_reported_by_the_client_once_nothing_writes(start: Start) -> None:
    consumer_sidecar = start("d", *SLOW_COPY)
    with FakeEngine(start("p")) as producer, FakeEngine(consumer_sidecar) as consumer:
        _, source = begin_slow_pull(producer, consumer)
        consumer.client.pull("second", source, [200])
        consumer_sidecar.process.kill()
        ended = consumer.pull_ended("slow", 3.0)
        assert_nothing_is_written_any_more(consumer)
        assert (ended.ok, ended.reason) == (False, "sidecar_lost")
        assert consumer.count("slow") == 1 and consumer.count("second") == 1
        assert isinstance(consumer.events[-1], SidecarLost)
        consumer_sidecar.process.wait()
        with FakeEngine(start("d")) as again:
            assert again.pull(source, BLOCKS).ok  # the lease went back when its claimant died
            assert again.block(0) == producer.block(0)


def test_a_killed_producer_engine_voids_its_leases_and_its_sidecar_goes_on(start: Start) -> None:
    producer_sidecar = start("p")
    with EngineProcess(producer_sidecar) as engine, FakeEngine(start("d", *SLOW_COPY)) as consumer:
        source = engine.offer(BLOCKS, 30)
        consumer.client.pull("slow", source, BLOCKS)
        consumer.fill(0)
        eventually(lambda: any(consumer.pool[:: 8192 // 2]))
        killed_at = time.monotonic()
        engine.kill()
        ended = consumer.pull_ended("slow", 3.0)
        assert not ended.ok and time.monotonic() - killed_at < 1.0
        assert_nothing_is_written_any_more(consumer)
        assert consumer.pull(source, BLOCKS).reason == "stale_epoch"
        eventually(lambda: producer_sidecar.usage()[2] == 0)
        status, health = producer_sidecar.get("/healthz")
        assert status == 503 and '"engine_registered": false' in health and '"engine": "the engine is gone' in health
        with FakeEngine(producer_sidecar) as again:
            assert consumer.pull(source, BLOCKS).reason == "stale_epoch"
            assert consumer.pull(again.offer([1])[1], [2]).ok


def test_a_killed_consumer_engine_gives_its_lease_back_and_its_sidecar_goes_on(start: Start) -> None:
    producer_sidecar, consumer_sidecar = start("p"), start("d", *SLOW_COPY)
    with (
        EngineProcess(consumer_sidecar) as engine,
        FakeEngine(producer_sidecar) as producer,
        FakeEngine(start("other")) as other,
    ):
        _, source = producer.offer(BLOCKS)
        engine.pull(source, BLOCKS)
        eventually(lambda: producer_sidecar.metric('baton_sidecar_leases{state="claimed"}') == 1)
        assert other.pull(source, [0]).reason == "wrong_engine"
        engine.kill()
        eventually(lambda: other.pull(source, BLOCKS).ok, 3.0)
        eventually(lambda: consumer_sidecar.usage()[2] == 0 and not consumer_sidecar.children())
        with FakeEngine(consumer_sidecar) as again:
            assert again.pull(producer.offer([1])[1], [2]).ok


def test_a_stopped_producer_ends_a_pull_in_bounded_time_and_writes_no_late_byte(start: Start) -> None:
    """Also the serving Mooncake process is stopped in the middle of a transfer, and resumed when the blocks have
    been put to another use."""
    producer_sidecar = start("p")
    with (
        FakeEngine(producer_sidecar) as producer,
        FakeEngine(start("d", *SLOW_COPY, "--answer-timeout-s", "2")) as consumer,
    ):
        begin_slow_pull(producer, consumer)
        consumer.client.pull("after", producer.offer([1])[1], [1], deadline_s=1.5)
        with paused(producer_sidecar.process.pid, *producer_sidecar.children()):
            stopped_at = time.monotonic()
            consumer.client.pull("during", producer_sidecar_source(producer), [2], deadline_s=1.0)
            assert consumer.pull_ended("during", 4.0).reason in ("timeout", "unreachable")
            assert time.monotonic() - stopped_at < 3.5
            ended = consumer.pull_ended("slow", 10.0)
            assert not ended.ok and ended.reason in ("unreachable", "transport", "timeout")
            assert time.monotonic() - stopped_at < 6.0  # answer_timeout_s and a heartbeat
            consumer.fill(42)
        assert_nothing_is_written_any_more(consumer)
        eventually(lambda: consumer.pull(producer.offer([1])[1], [1]).ok)


def producer_sidecar_source(producer: FakeEngine) -> PullSource:
    """A source that names the producer, made without asking its (stopped) sidecar."""
    hello = producer.client.hello
    return PullSource(hello.host, hello.port, hello.engine_id, "made-up", "token", producer.epoch, 1)


def test_a_hung_first_contact_does_not_hold_up_another_peer(start: Start) -> None:
    hung_sidecar = start("hung")
    with FakeEngine(hung_sidecar) as hung, FakeEngine(start("well")) as well, FakeEngine(start("d")) as consumer:
        _, source = hung.offer([1])
        with paused(hung_sidecar.process.pid, *hung_sidecar.children()):
            consumer.client.pull("hung", source, [1], deadline_s=8)
            started_at = time.monotonic()
            assert consumer.pull(well.offer([1])[1], [2]).ok
            assert time.monotonic() - started_at < 2.5
            assert consumer.pull_ended("hung", 10).reason in ("unreachable", "timeout")
        assert consumer.block(2) == well.block(1)


def test_a_drop_for_a_dead_producer_is_tried_and_given_up(start: Start) -> None:
    producer_sidecar = start("p")
    with FakeEngine(start("d")) as consumer:
        with FakeEngine(producer_sidecar) as producer:
            _, source = producer.offer([1])
            producer_sidecar.kill()
        consumer.client.drop(source)
        assert consumer.pull(source, [1]).reason == "unreachable"


def test_what_was_opened_is_closed_again(start: Start) -> None:
    """Descriptors, threads, mappings and processes of a consumer after peers that came, died and came back."""
    consumer_sidecar = start("d")
    with FakeEngine(consumer_sidecar) as consumer:
        usages: list[tuple[int, ...]] = []
        eventually(lambda: "mooncake" not in consumer.client.hello.transports or bool(consumer_sidecar.children()))
        serving = len(consumer_sidecar.children())
        for _ in range(3):
            with (
                Sidecar(Path(consumer_sidecar.socket_path).parent, "p", consumer.client.hello.transports[0]) as peer,
                FakeEngine(peer) as producer,
            ):
                for number in range(5):
                    assert consumer.pull(producer.offer([number])[1], [number]).ok
                peer.kill()
            eventually(lambda: consumer_sidecar.usage()[2] == 1 and len(consumer_sidecar.children()) == serving)
            if usages:  # what the first peer left open for good is what any number of them may
                eventually(lambda: consumer_sidecar.usage()[0] <= usages[0][0])
            usages.append(consumer_sidecar.usage())
        assert all(last <= first for first, last in zip(usages[1], usages[2], strict=True)), usages


@pytest.mark.parametrize("transport", [pytest.param("mooncake", marks=NEEDS_MOONCAKE)])
@pytest.mark.parametrize("victim", ["reading", "serving"])
def test_a_killed_mooncake_process_fails_its_pulls_and_is_replaced(start: Start, victim: str) -> None:
    producer_sidecar, consumer_sidecar = start("p"), start("d", *SLOW_COPY)
    with FakeEngine(producer_sidecar) as producer, FakeEngine(consumer_sidecar) as consumer:
        eventually(lambda: bool(consumer_sidecar.children()))  # its own serving process comes a moment after the pool
        own = consumer_sidecar.children()
        _, source = begin_slow_pull(producer, consumer)
        [child] = producer_sidecar.children() if victim == "serving" else set(consumer_sidecar.children()) - set(own)
        os.kill(child, signal.SIGKILL)
        ended = consumer.pull_ended("slow", 8.0)
        assert (ended.ok, ended.reason) == (False, "transport")
        assert_nothing_is_written_any_more(consumer)
        eventually(lambda: consumer.pull(source, BLOCKS[:8]).ok)
        assert consumer.block(3) == producer.block(3)


def test_an_engine_that_restarts_at_once_is_let_in_when_its_predecessor_is_gone(start: Start) -> None:
    consumer_sidecar = start("d", *SLOW_COPY)
    with FakeEngine(start("p")) as producer:
        for number in range(5):
            with FakeEngine(consumer_sidecar) as consumer:
                assert consumer.pull(producer.offer([number])[1], [number]).ok
                consumer.client.pull("slow", producer.offer(BLOCKS)[1], BLOCKS)


@pytest.mark.parametrize("transport", [pytest.param("mooncake", marks=NEEDS_MOONCAKE)])
def test_no_late_byte_of_a_batch_in_flight_when_mooncake_s_peer_is_stopped_and_resumed(start: Start) -> None:
    """Mooncake itself would go on writing into blocks after it has reported the failure (measured)."""
    num_blocks = 1024
    layout = a_layout(num_blocks, 65536)
    producer_sidecar = start("p")
    with FakeEngine(producer_sidecar, layout) as producer, FakeEngine(start("d"), layout) as consumer:
        assert consumer.pull(producer.offer([0])[1], [0]).ok
        consumer.fill(0)
        _, source = producer.offer(list(range(num_blocks)))
        [serving] = producer_sidecar.children()
        consumer.client.pull("cut", source, list(range(num_blocks)), deadline_s=1.0)
        while not consumer.pool[65535]:  # spins: the whole transfer takes some 50 ms
            pass
        with paused(serving):
            ended = consumer.pull_ended("cut", 5.0)
            assert (ended.ok, ended.reason) == (False, "timeout"), "it was too fast to be stopped in the middle"
            consumer.fill(42)
        time.sleep(0.5)
        assert consumer.pool[:] == bytes([42]) * len(consumer.pool)
        eventually(lambda: consumer.pull(producer.offer([7])[1], [8]).ok)
        assert consumer.block(8) == producer.block(7)
