"""Small pulls on one host are copied by the engine's own client: as fast as a copy, and never false."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from sidecar.direct import MAX_BYTES, DirectReads
from sidecar.errors import SidecarUnavailable
from sidecar.protocol import PullSource, SidecarLost, pack_block_ids
from tests.sidecar_processes.harness import FakeEngine, Sidecar, a_layout, eventually, paused

BLOCK_BYTES = 64 << 10
NUM_BLOCKS = 160
LAYOUT = a_layout(NUM_BLOCKS, BLOCK_BYTES)
SMALL = list(range(64))
ALL = list(range(NUM_BLOCKS))
GARBAGE = 255
assert len(SMALL) * BLOCK_BYTES <= MAX_BYTES < NUM_BLOCKS * BLOCK_BYTES

pytestmark = pytest.mark.skipif(not DirectReads.possible(), reason="the C library was not built here")


class Ends(NamedTuple):
    p: Sidecar
    d: Sidecar
    producer: FakeEngine
    consumer: FakeEngine


@pytest.fixture
def ends(directory: Path) -> Iterator[Ends]:
    with (
        Sidecar(directory, "p", "shm") as p,
        Sidecar(directory, "d", "shm") as d,
        FakeEngine(p, LAYOUT, seed=1) as producer,
        FakeEngine(d, LAYOUT, seed=2, direct=True) as consumer,
    ):
        meet(producer, consumer)
        yield Ends(p, d, producer, consumer)


def meet(producer: FakeEngine, consumer: FakeEngine) -> None:
    """The first contact, from which on the producer's pool is at hand."""
    assert consumer.pull(producer.offer([0])[1], [0]).ok


def ends_without_sidecars(ends: Ends, source: PullSource, local: list[int]) -> bool:
    """Whether a pull ends while both sidecars are stopped."""
    with paused(ends.p.process.pid, ends.d.process.pid):
        ends.consumer.client.pull(source.transfer_id, source, local)
        time.sleep(0.1)
        return ends.consumer.count(source.transfer_id) == 1


def write(engine: FakeEngine, byte: int) -> None:
    """Into every small block, from the last on, to meet a copy half way."""
    block = bytes([byte]) * BLOCK_BYTES
    for number in reversed(SMALL):
        engine.pool[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES] = block


def small(engine: FakeEngine) -> bytes:
    return engine.pool[: len(SMALL) * BLOCK_BYTES]


def mappings(engine: FakeEngine) -> int:
    """Of the producer's pool, in this process, beyond its own."""
    with open("/proc/self/maps") as maps:
        return sum("memfd:pool-p" in line and "r--s" in line for line in maps)


def test_a_small_pull_needs_no_sidecar(ends: Ends) -> None:
    offer, source = ends.producer.offer(SMALL)
    local = [NUM_BLOCKS - 1 - number for number in SMALL]
    assert ends_without_sidecars(ends, source, local)
    ended = ends.consumer.pull_ended(offer.transfer_id)
    assert (ended.ok, ended.num_blocks, ended.num_bytes) == (True, len(SMALL), len(SMALL) * BLOCK_BYTES)
    assert ended.transport == "shm" and ended.peer == f"p@{source.host}:{source.port}" and ended.seconds > 0
    assert [ends.consumer.block(block_id) for block_id in local] == [ends.producer.block(n) for n in SMALL]
    assert ends.producer.offer_ended(offer.transfer_id) == "consumed"
    blocks = f'baton_sidecar_pull_blocks_total{{peer="{ended.peer}",transport="shm"}}'
    eventually(lambda: ends.d.metric(blocks) == len(SMALL) + 1, 10)
    assert ends.d.metric('baton_sidecar_pulls_total{outcome="ok"}') == 2
    assert ends.consumer.pull(source, local).reason == "released"


def test_part_of_a_lease_is_read_directly(ends: Ends) -> None:
    offer, source = ends.producer.offer([5, 9, 7, 3])
    ended = ends.consumer.pull(source, [1, 0], first_block=2)
    assert (ended.ok, ended.num_blocks) == (True, 2)
    assert [ends.consumer.block(1), ends.consumer.block(0)] == [ends.producer.block(7), ends.producer.block(3)]
    assert ends.producer.offer_ended(offer.transfer_id) == "consumed"


def test_what_is_larger_is_the_sidecars(ends: Ends) -> None:
    _, source = ends.producer.offer(ALL)
    assert not ends_without_sidecars(ends, source, ALL)
    assert ends.consumer.pull_ended(source.transfer_id).ok
    assert ends.consumer.pool[:] == ends.producer.pool[:]


@pytest.mark.parametrize(
    ("local", "changes", "reason"),
    [
        ([1, 1], {}, "invalid"),
        ([1, NUM_BLOCKS], {}, "invalid"),
        ([1, 2, 3], {}, "invalid"),
        ([1, 2], {"token": "0" * 32}, "wrong_token"),
        ([1, 2], {"transfer_id": "none"}, "unknown"),
        ([1, 2], {"epoch": "none"}, "stale_epoch"),
    ],
    ids=str,
)
def test_what_the_sidecar_refuses_is_refused(
    ends: Ends, local: list[int], changes: dict[str, str], reason: str
) -> None:
    _, source = ends.producer.offer([4, 5])
    before = ends.consumer.pool[:]
    assert ends.consumer.pull(msgspec.structs.replace(source, **changes), local).reason == reason
    assert ends.consumer.pool[:] == before


@pytest.mark.parametrize("named", [[5, 4], [4], [4, 5, 6], [9999, 4], []], ids=str)
def test_other_blocks_than_were_leased_are_never_read(ends: Ends, named: list[int]) -> None:
    _, source = ends.producer.offer([4, 5])
    false = msgspec.structs.replace(source, packed_block_ids=pack_block_ids(named))
    assert ends.consumer.pull(false, [7, 8]).ok
    assert [ends.consumer.block(7), ends.consumer.block(8)] == [ends.producer.block(4), ends.producer.block(5)]


def test_an_offer_that_expires_while_its_sidecar_is_stopped_is_not_read(ends: Ends) -> None:
    before = ends.consumer.pool[:]
    _, source = ends.producer.offer(SMALL, ttl_s=0.2)
    with paused(ends.p.process.pid):
        time.sleep(0.3)
        ends.consumer.client.pull("late", source, SMALL)
        time.sleep(0.2)
        assert ends.consumer.count("late") == 0 and ends.consumer.pool[:] == before
    assert ends.consumer.pull_ended("late").reason == "expired"


def test_blocks_that_are_used_again_while_they_are_copied_are_never_reported(ends: Ends) -> None:
    """The engine revokes at any moment, and writes as soon as it hears that the lease has ended."""
    dice, outcomes = random.Random(3), set()
    for number in range(80):
        write(ends.producer, number)
        offer, source = ends.producer.offer(SMALL)
        begun = threading.Event()

        def pull(source: PullSource = source, name: str = f"pull-{number}", begun: threading.Event = begun) -> None:
            begun.set()
            ends.consumer.client.pull(name, source, SMALL)

        thread = threading.Thread(target=pull)
        thread.start()
        begun.wait()
        until = time.monotonic() + dice.uniform(0, 0.0015)
        while time.monotonic() < until:
            time.sleep(0)
        ends.producer.client.revoke(offer.transfer_id)
        ends.producer.offer_ended(offer.transfer_id)
        write(ends.producer, GARBAGE)
        thread.join()
        ended = ends.consumer.pull_ended(f"pull-{number}")
        outcomes.add(ended.ok)
        if ended.ok:
            assert small(ends.consumer) == bytes([number]) * len(SMALL) * BLOCK_BYTES
        else:
            assert ended.reason == "released"
    assert True in outcomes


def test_a_producer_sidecar_that_is_killed_voids_its_leases(directory: Path) -> None:
    """Its engine writes as soon as it hears; then another sidecar listens at the same address."""
    with Sidecar(directory, "d", "shm") as d, FakeEngine(d, LAYOUT, seed=2, direct=True) as consumer:
        listen = "127.0.0.1:0"
        for number in range(3):
            with Sidecar(directory, "p", "shm", listen=listen) as p, FakeEngine(p, LAYOUT, seed=number) as producer:
                listen = p.listen
                meet(producer, consumer)
                _, source = producer.offer(SMALL)
                p.kill()
                producer.wait(lambda event: isinstance(event, SidecarLost))
                write(producer, GARBAGE)
                before = consumer.pool[:]
                with (
                    Sidecar(directory, "p", "shm", listen=listen) as other,
                    FakeEngine(other, LAYOUT, seed=9) as restarted,
                ):
                    assert consumer.pull(source, SMALL).reason == "stale_epoch"
                    assert consumer.pool[:] == before
                    meet(restarted, consumer)
                    assert consumer.pull(restarted.offer(SMALL)[1], SMALL).ok
                    assert small(consumer) == small(restarted)
        eventually(lambda: mappings(consumer) == 0, 10)


def test_pools_are_let_go_of(ends: Ends) -> None:
    """When the producer's engine leaves, when ours registers anew, and when it closes."""
    assert mappings(ends.consumer) == 1
    ends.consumer.client.register_pool(ends.consumer.fd, LAYOUT, address=ends.consumer.address)
    assert mappings(ends.consumer) == 0
    meet(ends.producer, ends.consumer)
    assert mappings(ends.consumer) == 1
    ends.producer.client.register_pool(ends.producer.fd, LAYOUT)
    eventually(lambda: mappings(ends.consumer) == 0, 10)
    meet(ends.producer, ends.consumer)
    assert mappings(ends.consumer) == 1
    ends.consumer.client.close()
    assert mappings(ends.consumer) == 0


def test_without_its_own_sidecar_nothing_is_read(ends: Ends) -> None:
    _, source = ends.producer.offer(SMALL)
    ends.d.kill()
    ends.consumer.wait(lambda event: isinstance(event, SidecarLost))
    before = ends.consumer.pool[:]
    with pytest.raises(SidecarUnavailable):
        ends.consumer.client.pull("alone", source, SMALL)
    assert ends.consumer.pool[:] == before and ends.consumer.count("alone") == 0


@pytest.mark.parametrize("why", ["the producer's pool may shrink", "copying is limited", "the address is not given"])
def test_who_is_given_no_pool_has_its_sidecar_copy(directory: Path, why: str) -> None:
    flags = ("--copy-bytes-per-s", str(100 << 20)) if why == "copying is limited" else ()
    with (
        Sidecar(directory, "p", "shm") as p,
        Sidecar(directory, "d", "shm", *flags) as d,
        FakeEngine(p, LAYOUT, seed=1, sealable="shrink" not in why) as producer,
        FakeEngine(d, LAYOUT, seed=2, direct="address" not in why) as consumer,
    ):
        meet(producer, consumer)
        _, source = producer.offer(SMALL)
        assert not ends_without_sidecars(Ends(p, d, producer, consumer), source, SMALL)
        assert consumer.pull_ended(source.transfer_id).ok
        assert small(consumer) == small(producer)
        assert mappings(consumer) == 0


def test_a_stopped_sidecar_hears_of_direct_reads_when_it_goes_on(ends: Ends) -> None:
    offers = [ends.producer.offer([number])[0] for number in range(20)]
    ends.d.process.send_signal(signal.SIGSTOP)
    for number, offer in enumerate(offers):
        hello = ends.producer.client.hello
        source = PullSource(
            hello.host, hello.port, hello.engine_id, offer.transfer_id, offer.token, offer.epoch, 1,
            pack_block_ids([number]),
        )  # fmt: skip
        assert ends.consumer.pull(source, [number]).ok
    ends.d.process.send_signal(signal.SIGCONT)
    assert [ends.producer.offer_ended(offer.transfer_id) for offer in offers] == ["consumed"] * 20


def test_a_sidecar_that_does_not_hear_of_direct_reads_is_found_out(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else would tell an engine whose pulls all end without it. One that answers is never doubted."""
    monkeypatch.setattr("sidecar.client.CALL_TIMEOUT_S", 0.5)
    monkeypatch.setattr("sidecar.direct.ASK_EVERY_S", 0.2)

    def doubted_within(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            _, source = ends.producer.offer([1])
            assert ends.consumer.pull(source, [1]).ok
            if ends.consumer.client.unresponsive:
                return True
            time.sleep(0.02)
        return False

    assert not doubted_within(2)
    with paused(ends.d.process.pid):
        assert doubted_within(10)
    eventually(lambda: not ends.consumer.client.unresponsive, 10)
