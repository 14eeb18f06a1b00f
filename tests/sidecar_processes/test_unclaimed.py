"""A lease is copied before it is claimed: whatever becomes of it meanwhile, nothing false is reported.

Over shm nobody is asked at all, over tcp the producer looks at its board before and after.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from sidecar.protocol import OfferEnded, PullEnded, SidecarLost, pack_block_ids
from tests.sidecar_processes.harness import FakeEngine, Sidecar, a_layout

BLOCK_BYTES = 64 << 10
NUM_BLOCKS = 512
LAYOUT = a_layout(NUM_BLOCKS, BLOCK_BYTES)
ALL = list(range(NUM_BLOCKS))
GARBAGE = 255


BOTH = pytest.mark.parametrize("ends", ["shm", "tcp"], indirect=True)


@pytest.fixture
def ends(request: pytest.FixtureRequest, directory: Path) -> Iterator[tuple[Sidecar, FakeEngine, FakeEngine]]:
    transport = getattr(request, "param", "shm")
    with (
        Sidecar(directory, "p", transport) as p,
        Sidecar(directory, "d", transport) as d,
        FakeEngine(p, LAYOUT, seed=1) as producer,
        FakeEngine(d, LAYOUT, seed=2) as consumer,
    ):
        assert consumer.pull(producer.offer([0])[1], [0]).ok  # the first contact: from now on the board is at hand
        yield p, producer, consumer


def write(engine: FakeEngine, byte: int) -> None:
    """Into every block, a block at a time and from the last on, to meet a copy half way."""
    block = bytes([byte]) * BLOCK_BYTES
    for number in reversed(ALL):
        engine.pool[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES] = block


def assert_holds(engine: FakeEngine, byte: int) -> None:
    assert engine.pool[:] == bytes([byte]) * LAYOUT.pool_bytes


def test_the_producer_sidecar_is_not_asked_before_the_pull_has_ended(
    ends: tuple[Sidecar, FakeEngine, FakeEngine],
) -> None:
    sidecar, producer, consumer = ends
    offer, source = producer.offer(ALL)
    sidecar.process.send_signal(signal.SIGSTOP)
    try:
        assert consumer.pull(source, ALL).ok
    finally:
        sidecar.process.send_signal(signal.SIGCONT)
    assert consumer.pool[:] == producer.pool[:]
    assert producer.offer_ended(offer.transfer_id) == "consumed"
    assert consumer.pull(source, ALL).reason == "released"


@pytest.mark.parametrize("direct", [False, True])
def test_ranks_that_hold_the_same_heads_all_read_a_lease(directory: Path, direct: bool) -> None:
    """As with MLA, whose latent every rank holds: whoever is first must not end the lease for the others."""
    one_head = {"num_kv_heads": 1, "total_kv_heads": 1}
    layouts = [a_layout(tp_size=2, tp_rank=rank, **one_head) for rank in (0, 1)]
    with (
        Sidecar(directory, "p", "shm") as p,
        Sidecar(directory, "d0", "shm", "--engine-id", "d") as d0,
        Sidecar(directory, "d1", "shm", "--engine-id", "d", "--rank", "1") as d1,
        FakeEngine(p, a_layout(**one_head), seed=1) as producer,
        FakeEngine(d0, layouts[0], seed=2, direct=direct) as first,
        FakeEngine(d1, layouts[1], seed=3, direct=direct) as second,
    ):
        for number in range(2):  # the second finds the board at hand
            offer, source = producer.offer([1, 2])
            for rank in (first, second):
                assert rank.pull(source, [4, 3], pull_id=f"request-{number}").ok
                assert [rank.block(4), rank.block(3)] == [producer.block(1), producer.block(2)]
                for engine in (rank, producer, producer):  # till what is told of the read has been heard
                    engine.offer([0])
            assert producer.offer_ended(offer.transfer_id) == "consumed"


@pytest.mark.parametrize("ends", ["tcp"], indirect=True)
def test_over_tcp_a_producer_sidecar_that_is_stopped_is_given_up_before_its_data_is(
    ends: tuple[Sidecar, FakeEngine, FakeEngine],
) -> None:
    """Nothing was claimed, so nothing beats for a lease; the sidecar is asked whether it is there all the same."""
    sidecar, producer, consumer = ends
    _, source = producer.offer(ALL)
    sidecar.process.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        consumer.client.pull("waits", source, ALL)
        assert consumer.pull_ended("waits").reason == "unreachable"
        assert time.monotonic() - started < 9.5  # the stall limit of a data connection is 10 s
    finally:
        sidecar.process.send_signal(signal.SIGCONT)


@BOTH
def test_an_offer_that_expires_while_its_sidecar_is_stopped_is_not_read(
    ends: tuple[Sidecar, FakeEngine, FakeEngine],
) -> None:
    sidecar, producer, consumer = ends
    before = consumer.pool[:]
    _, source = producer.offer(ALL, ttl_s=0.2)
    sidecar.process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(0.3)
        consumer.client.pull("late", source, ALL)
        time.sleep(0.2)
        assert consumer.count("late") == 0 and consumer.pool[:] == before
    finally:
        sidecar.process.send_signal(signal.SIGCONT)
    assert consumer.pull_ended("late").reason == "expired"


@BOTH
def test_blocks_that_are_used_again_while_they_are_copied_are_never_reported(
    ends: tuple[Sidecar, FakeEngine, FakeEngine],
) -> None:
    """The engine revokes at any moment, and writes as soon as it hears that the lease has ended."""
    _, producer, consumer = ends
    dice, outcomes = random.Random(3), set()
    for number in range(60):
        value = number % 200
        write(producer, value)
        offer, source = producer.offer(ALL)
        consumer.client.pull(f"pull-{number}", source, ALL)
        until = time.monotonic() + dice.uniform(0, 0.008 if number % 2 else 0.04)
        while time.monotonic() < until:
            pass
        producer.client.revoke(offer.transfer_id)
        producer.offer_ended(offer.transfer_id)
        write(producer, GARBAGE)
        ended = consumer.pull_ended(f"pull-{number}")
        outcomes.add(ended.ok)
        if ended.ok:
            assert_holds(consumer, value)
        else:
            assert ended.reason == "released"
    assert True in outcomes


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_producer_sidecar_that_is_killed_while_its_blocks_are_copied(directory: Path, transport: str) -> None:
    """Its engine writes into them as soon as it hears; then another sidecar listens at the same address."""
    with Sidecar(directory, "d", transport) as d, FakeEngine(d, LAYOUT, seed=2) as consumer:
        listen = "127.0.0.1:0"
        for number in range(6):
            with Sidecar(directory, "p", transport, listen=listen) as p, FakeEngine(p, LAYOUT, seed=1) as producer:
                listen = p.listen
                assert consumer.pull(producer.offer([0])[1], [0]).ok
                write(producer, number)
                _, source = producer.offer(ALL)
                consumer.client.pull(f"pull-{number}", source, ALL)
                time.sleep(0.001 * number)
                p.kill()
                producer.wait(lambda event: isinstance(event, SidecarLost))
                write(producer, GARBAGE)
                ended = consumer.pull_ended(f"pull-{number}")
                if ended.ok:
                    assert_holds(consumer, number)
                with (
                    Sidecar(directory, "p", transport, listen=listen) as other,
                    FakeEngine(other, LAYOUT, seed=4) as restarted,
                ):
                    before = consumer.pool[:]
                    assert consumer.pull(source, ALL).reason == "stale_epoch"
                    assert consumer.pool[:] == before
                    assert consumer.pull(restarted.offer(ALL)[1], ALL).ok
                    assert consumer.pool[:] == restarted.pool[:]


@BOTH
def test_a_producer_engine_that_registers_anew_or_goes_voids_what_it_had_offered(
    ends: tuple[Sidecar, FakeEngine, FakeEngine],
) -> None:
    _, producer, consumer = ends
    before = consumer.pool[:]
    _, source = producer.offer(ALL)
    producer.client.register_pool(producer.fd, LAYOUT)
    assert consumer.pull(source, ALL).reason == "stale_epoch"
    assert consumer.pool[:] == before


@BOTH
@pytest.mark.parametrize(
    ("named", "ok"), [([2, 1], True), ([1], True), ([1, 2, 3], True), ([9999, 1], True), ([], True)], ids=str
)
def test_a_source_that_names_other_blocks_than_the_lease_has_is_read_by_the_lease(
    ends: tuple[Sidecar, FakeEngine, FakeEngine], named: list[int], ok: bool
) -> None:
    _, producer, consumer = ends
    _, source = producer.offer([1, 2])
    false = msgspec.structs.replace(source, packed_block_ids=pack_block_ids(named))
    assert consumer.pull(false, [7, 8]).ok is ok
    assert [consumer.block(7), consumer.block(8)] == [producer.block(1), producer.block(2)]


@BOTH
def test_two_who_read_one_lease_both_have_what_was_leased(ends: tuple[Sidecar, FakeEngine, FakeEngine]) -> None:
    """No claim keeps them apart; the lease ends once, as consumed."""
    _, producer, consumer = ends
    offer, source = producer.offer(ALL[:200])
    for name, local in (("one", ALL[:200]), ("two", ALL[200:400])):
        consumer.client.pull(name, source, local)
    ended: list[PullEnded] = [consumer.pull_ended(name) for name in ("one", "two")]
    assert any(end.ok for end in ended)
    for end, first in zip(ended, (0, 200), strict=True):
        if end.ok:
            assert (
                consumer.pool[first * BLOCK_BYTES : (first + 200) * BLOCK_BYTES] == producer.pool[: 200 * BLOCK_BYTES]
            )
        else:
            assert end.reason in ("released", "wrong_engine")
    assert producer.offer_ended(offer.transfer_id) == "consumed"
    count = sum(isinstance(event, OfferEnded) and event.transfer_id == offer.transfer_id for event in producer.events)
    assert count == 1


@BOTH
def test_leases_whose_blocks_are_not_named_are_claimed_as_ever(ends: tuple[Sidecar, FakeEngine, FakeEngine]) -> None:
    sidecar, producer, consumer = ends
    offer, source = producer.offer(ALL, names_blocks=False)
    sidecar.process.send_signal(signal.SIGSTOP)
    try:
        consumer.client.pull("asks", source, ALL)
        time.sleep(0.2)
        assert consumer.count("asks") == 0
    finally:
        sidecar.process.send_signal(signal.SIGCONT)
    assert consumer.pull_ended("asks").ok
    assert producer.offer_ended(offer.transfer_id) == "consumed"
