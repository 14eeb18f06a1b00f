"""Layerwise push between real sidecars: blocks are landed first and filled while their producer computes."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from sidecar.errors import OfferRefused
from sidecar.protocol import Landing, Offer, PushTarget, Ready
from tests.sidecar_processes.conftest import NEEDS_MOONCAKE, QUICK_CLAIMS, SLOW_COPY, Pair
from tests.sidecar_processes.harness import (
    FakeEngine,
    Sidecar,
    a_layout,
    eventually,
    paused,
)

LAYERS = 2
NOTHING = Ready(0, 0, 0)


def layer_of(engine: FakeEngine, block_id: int, layer: int) -> bytes:
    size = engine.layout.block_bytes // LAYERS
    return engine.block(block_id)[layer * size : (layer + 1) * size]


def land(
    engine: FakeEngine, pull_id: str, blocks: list[int], first_block: int = 0, deadline_s: float = 30.0
) -> Landing:
    landing = engine.client.land(pull_id, blocks, first_block=first_block, deadline_s=deadline_s)
    assert landing is not None
    return landing


def target_of(engine: FakeEngine, landing: Landing, **changes: str) -> PushTarget:
    hello = engine.client.hello
    fields = {
        "host": hello.host, "port": hello.port, "engine_id": hello.engine_id, "landing_id": landing.landing_id,
        "token": landing.token, "epoch": landing.epoch,
    }  # fmt: skip
    return PushTarget(**(fields | changes))


def push(
    engine: FakeEngine, target: PushTarget, blocks: list[int], ready: Ready = NOTHING, ttl_s: float = 30.0,
    num_blocks: int = 0,
) -> Offer:  # fmt: skip
    return engine.client.push("request", blocks, 16 * len(blocks), ttl_s, target, ready, num_blocks)


def open_landings(sidecar: Sidecar) -> float:
    return sidecar.metric("baton_sidecar_open_landings")


def test_layers_arrive_as_they_are_computed(pair: Pair) -> None:
    theirs, ours = random.Random(3).sample(range(256), 12), random.Random(4).sample(range(256), 12)
    landing = land(pair.consumer, "a", ours)
    offer = push(pair.producer, target_of(pair.consumer, landing), theirs)
    pair.producer.client.mark_ready(offer.transfer_id, Ready(0, 8, 1))
    expected = [layer_of(pair.producer, block, 0) for block in theirs[:8]]
    eventually(lambda: [layer_of(pair.consumer, block, 0) for block in ours[:8]] == expected)
    assert layer_of(pair.consumer, ours[0], 1) != layer_of(pair.producer, theirs[0], 1)
    assert pair.consumer.count("a") == 0
    pair.producer.client.mark_ready(offer.transfer_id, Ready(8, 12, 1))
    eventually(lambda: pair.consumer.block(ours[3]) == pair.producer.block(theirs[3]))
    pair.producer.client.mark_ready(offer.transfer_id, Ready(8, 12, 2))
    ended = pair.consumer.pull_ended("a")
    assert ended.ok and ended.num_blocks == 12 and ended.num_bytes == 12 * pair.producer.layout.block_bytes
    assert [pair.consumer.block(b) for b in ours] == [pair.producer.block(b) for b in theirs]
    assert pair.producer.offer_ended(offer.transfer_id) == "consumed"
    assert pair.consumer.count("a") == 1 and open_landings(pair.consumer_sidecar) == 0


def test_what_is_computed_before_the_claim_and_only_missing_blocks(pair: Pair) -> None:
    landing = land(pair.consumer, "b", [10, 11, 12], first_block=2)
    before = pair.consumer.block(9)
    offer = push(pair.producer, target_of(pair.consumer, landing), [50, 51, 52, 53, 54], Ready(5, 5, 0))
    ended = pair.consumer.pull_ended("b")
    assert ended.ok and ended.num_bytes == 3 * pair.producer.layout.block_bytes
    assert [pair.consumer.block(b) for b in (10, 11, 12)] == [pair.producer.block(b) for b in (52, 53, 54)]
    assert pair.consumer.block(9) == before
    assert pair.producer.offer_ended(offer.transfer_id) == "consumed"


@pytest.mark.parametrize("grows", [False, True], ids=["at once", "chunk by chunk"])
def test_random_marks_never_copy_what_is_not_computed(pair: Pair, grows: bool) -> None:
    """Blocks are filled with their pattern only just before they are marked, also those that come with a mark."""
    rng = random.Random(5)
    for turn in range(6):
        num = rng.randint(1, 40)
        theirs, ours = rng.sample(range(256), num), rng.sample(range(256), num)
        landing = land(pair.consumer, f"r{turn}{grows}", ours)
        size = pair.producer.layout.block_bytes
        for block in theirs:
            pair.producer.pool[block * size : (block + 1) * size] = bytes(size)
        num_known = rng.randint(0, num) if grows else num
        offer = push(
            pair.producer, target_of(pair.consumer, landing), theirs[:num_known], num_blocks=num if grows else 0
        )
        expected = {block: rng.randbytes(size) for block in theirs}
        start = 0
        while start < num:
            end = rng.randint(start + 1, num)
            for layer in range(LAYERS):
                for block in theirs[start:end]:
                    at = block * size + layer * size // LAYERS
                    part = expected[block][layer * size // LAYERS : (layer + 1) * size // LAYERS]
                    pair.producer.pool[at : at + size // LAYERS] = part
                if rng.random() < 0.7 or (end == num and layer == LAYERS - 1):
                    more = theirs[num_known:end]
                    pair.producer.client.mark_ready(offer.transfer_id, Ready(start, end, layer + 1), more)
                    num_known = max(num_known, end)
            start = end
        assert pair.consumer.pull_ended(f"r{turn}{grows}").ok
        assert [pair.consumer.block(b) for b in ours] == [expected[b] for b in theirs]


def test_a_landing_nobody_fills_ends_by_its_deadline(pair: Pair) -> None:
    landing = land(pair.consumer, "late", [1, 2], deadline_s=0.3)
    ended = pair.consumer.pull_ended("late")
    assert (ended.ok, ended.reason) == (False, "timeout")
    before = pair.consumer.pool[:]
    offer = push(pair.producer, target_of(pair.consumer, landing), [1, 2], Ready(2, 2, 0))
    assert pair.producer.offer_ended(offer.transfer_id) == "dropped"  # its consumer has given up
    assert pair.consumer.pool[:] == before


def test_a_landing_that_is_abandoned_lets_go_of_its_producer(pair: Pair) -> None:
    landing = land(pair.consumer, "left", [1, 2])
    offer = push(pair.producer, target_of(pair.consumer, landing), [1, 2], Ready(0, 2, 1))
    eventually(lambda: pair.producer_sidecar.metric('baton_sidecar_leases{state="claimed"}') == 1)
    pair.consumer.client.abandon("left")
    assert pair.consumer.pull_ended("left").reason == "abandoned"
    assert pair.producer.offer_ended(offer.transfer_id) == "dropped"
    land(pair.consumer, "left before", [1, 2])
    pair.consumer.client.abandon("left before")
    assert pair.consumer.pull_ended("left before").reason == "abandoned"


@pytest.mark.parametrize(
    "changes", [{"token": "f" * 32}, {"landing_id": "none"}, {"epoch": "other"}, {"engine_id": "other"}]
)
def test_a_foreign_writer_is_refused(pair: Pair, changes: dict[str, str]) -> None:
    landing = land(pair.consumer, f"mine {changes}", [1, 2])
    before = pair.consumer.pool[:]
    offer = push(pair.producer, target_of(pair.consumer, landing, **changes), [1, 2], Ready(2, 2, 0))
    assert pair.producer.offer_ended(offer.transfer_id) == ("revoked" if "token" in changes else "dropped")
    assert pair.consumer.pool[:] == before and pair.consumer.count(f"mine {changes}") == 0
    offer = push(pair.producer, target_of(pair.consumer, landing), [1, 2], Ready(2, 2, 0))  # the right one still may
    assert pair.consumer.pull_ended(f"mine {changes}").ok
    offer = push(pair.producer, target_of(pair.consumer, landing), [3, 4], Ready(2, 2, 0))  # and nobody after it
    assert pair.producer.offer_ended(offer.transfer_id) == "dropped"


def test_too_few_blocks_are_refused(pair: Pair) -> None:
    landing = land(pair.consumer, "three", [1, 2, 3])
    offer = push(pair.producer, target_of(pair.consumer, landing), [1, 2], Ready(2, 2, 0))
    assert pair.producer.offer_ended(offer.transfer_id) == "revoked"
    pair.consumer.client.abandon("three")
    assert pair.consumer.pull_ended("three").reason == "abandoned"


def test_a_producer_that_withdraws_makes_room_for_the_next(pair: Pair) -> None:
    landing = land(pair.consumer, "again", [1, 2])
    target = target_of(pair.consumer, landing)
    first = push(pair.producer, target, [1, 2], Ready(0, 2, 1))
    eventually(lambda: pair.producer_sidecar.metric('baton_sidecar_leases{state="claimed"}') == 1)
    pair.producer.client.revoke(first.transfer_id)
    assert pair.producer.offer_ended(first.transfer_id) == "revoked"
    second = push(pair.producer, target, [7, 8], Ready(2, 2, 0))
    assert pair.consumer.pull_ended("again").ok
    assert pair.consumer.block(1) == pair.producer.block(7)
    assert pair.producer.offer_ended(second.transfer_id) == "consumed"


def test_the_latest_producer_takes_over(pair: Pair) -> None:
    """As when the first one hangs, and the prefill is tried elsewhere."""
    landing = land(pair.consumer, "over", [1, 2])
    target = target_of(pair.consumer, landing)
    first = push(pair.producer, target, [1, 2], Ready(0, 2, 1))
    eventually(lambda: pair.producer_sidecar.metric('baton_sidecar_leases{state="claimed"}') == 1)
    second = push(pair.producer, target, [7, 8], Ready(2, 2, 0))
    assert pair.consumer.pull_ended("over").ok
    assert [pair.consumer.block(b) for b in (1, 2)] == [pair.producer.block(b) for b in (7, 8)]
    assert pair.producer.offer_ended(second.transfer_id) == "consumed"
    assert pair.producer.offer_ended(first.transfer_id) == "dropped"


def test_bad_landings_and_marks(pair: Pair) -> None:
    with pytest.raises(OfferRefused, match="block 999 is not in the pool"):
        pair.consumer.client.land("bad", [999])
    land(pair.consumer, "twice", [1])
    with pytest.raises(ValueError, match="open already"):
        pair.consumer.client.land("twice", [2])
    pair.consumer.client.abandon("twice")
    pair.consumer.pull_ended("twice")
    hello = pair.consumer.client.hello
    with pytest.raises(OfferRefused, match="3 layers are said to be computed"):
        target = PushTarget(hello.host, hello.port, hello.engine_id, "x", "y", "z")
        push(pair.producer, target, [1], Ready(0, 1, 3))


def test_a_layout_without_layers_is_copied_strip_by_strip(directory: Path) -> None:
    layout = a_layout(order="opaque")
    with (
        Sidecar(directory, "p", "shm") as p,
        Sidecar(directory, "d", "shm") as d,
        FakeEngine(p, layout, seed=1) as producer,
        FakeEngine(d, layout, seed=2) as consumer,
    ):
        landing = land(consumer, "a", [1, 2, 3])
        before = consumer.block(3)
        offer = push(producer, target_of(consumer, landing), [4, 5, 6], Ready(0, 2, 2))
        eventually(lambda: consumer.block(2) == producer.block(5))
        producer.client.mark_ready(offer.transfer_id, Ready(2, 3, 1))
        time.sleep(0.1)
        assert consumer.block(3) == before
        producer.client.mark_ready(offer.transfer_id, Ready(2, 3, 2))
        assert consumer.pull_ended("a").ok and consumer.block(3) == producer.block(6)


@pytest.mark.parametrize("name", ["shm", "tcp", pytest.param("mooncake", marks=NEEDS_MOONCAKE)])
@pytest.mark.parametrize("when", ["half computed", "in a copy"])
def test_killing_the_producers_sidecar(directory: Path, name: str, when: str) -> None:
    """The landing waits for another producer, writes nothing of the lost one any more, and is filled by the next."""
    slow = SLOW_COPY if when == "in a copy" else ()
    with (
        Sidecar(directory, "p", name, *QUICK_CLAIMS) as p,
        Sidecar(directory, "q", name, *QUICK_CLAIMS) as q,
        Sidecar(directory, "d", name, *QUICK_CLAIMS, *slow) as d,
        FakeEngine(p, seed=1) as lost,
        FakeEngine(q, seed=2) as other,
        FakeEngine(d, seed=3) as consumer,
    ):
        landing = land(consumer, "a", list(range(64)))
        offer = push(lost, target_of(consumer, landing), list(range(64)), Ready(0, 64, 2 if slow else 1))
        eventually(lambda: layer_of(consumer, 0, 0) == layer_of(lost, 0, 0), 60)
        p.kill()
        eventually(lambda: "landing_source_lost" in d.log_path.read_text(), 30)
        before = consumer.pool[:]
        time.sleep(0.2)
        assert consumer.pool[:] == before and consumer.count("a") == 0
        push(other, target_of(consumer, landing), list(range(64, 128)), Ready(64, 64, 0))
        assert consumer.pull_ended("a", 60).ok
        assert consumer.pool[: 64 * 8192] == other.pool[64 * 8192 : 128 * 8192]
        del offer


def test_killing_the_producers_engine_and_deadline(directory: Path) -> None:
    with Sidecar(directory, "p", "shm") as p, Sidecar(directory, "d", "shm") as d, FakeEngine(d, seed=3) as consumer:
        with FakeEngine(p, seed=1) as lost:
            landing = land(consumer, "a", [1, 2], deadline_s=3)
            push(lost, target_of(consumer, landing), [1, 2], Ready(0, 2, 1))
            eventually(lambda: layer_of(consumer, 1, 0) == layer_of(lost, 1, 0))
        ended = consumer.pull_ended("a")
        assert (ended.ok, ended.reason) == (False, "timeout") and "unreachable" in ended.message


def test_a_producers_sidecar_that_hangs(directory: Path) -> None:
    flags = (*QUICK_CLAIMS, "--answer-timeout-s", "1")
    with (
        Sidecar(directory, "p", "shm", *flags) as p,
        Sidecar(directory, "q", "shm", *flags) as q,
        Sidecar(directory, "d", "shm", *flags) as d,
        FakeEngine(p, seed=1) as hung,
        FakeEngine(q, seed=2) as other,
        FakeEngine(d, seed=3) as consumer,
    ):
        landing = land(consumer, "a", [1, 2])
        offer = push(hung, target_of(consumer, landing), [1, 2], Ready(0, 2, 1), ttl_s=10)
        eventually(lambda: layer_of(consumer, 1, 0) == layer_of(hung, 1, 0))
        with paused(p.process.pid):
            eventually(lambda: "landing_source_lost" in d.log_path.read_text(), 30)
            push(other, target_of(consumer, landing), [1, 2], Ready(2, 2, 0))
            assert consumer.pull_ended("a").ok
            content = consumer.pool[:]
        hung.client.mark_ready(offer.transfer_id, Ready(0, 2, 2))
        assert hung.offer_ended(offer.transfer_id) in ("dropped", "expired")
        assert consumer.pool[:] == content


def test_killing_the_consumer_in_a_copy_frees_the_producer(directory: Path) -> None:
    with (
        Sidecar(directory, "p", "shm", *QUICK_CLAIMS) as p,
        FakeEngine(p, seed=1) as producer,
        Sidecar(directory, "d", "shm", *QUICK_CLAIMS, *SLOW_COPY) as d,
        FakeEngine(d, seed=3) as consumer,
    ):
        landing = land(consumer, "a", list(range(64)))
        target = target_of(consumer, landing)
        offer = push(producer, target, list(range(64)), Ready(64, 64, 0), ttl_s=1.0)
        eventually(lambda: consumer.block(0) == producer.block(0), 30)
        os.kill(d.process.pid, signal.SIGKILL)
        assert consumer.pull_ended("a").reason == "sidecar_lost"
        assert producer.offer_ended(offer.transfer_id) == "expired"
        d.process.wait()
        offer = push(producer, target, [1, 2])
        assert producer.offer_ended(offer.transfer_id) == "revoked"  # there is nobody to tell


def test_the_consumers_engine_leaves_nothing(directory: Path) -> None:
    with Sidecar(directory, "p", "shm") as p, FakeEngine(p, seed=1) as producer, Sidecar(directory, "d", "shm") as d:
        with FakeEngine(d, seed=3) as consumer:
            landing = land(consumer, "a", [1, 2])
            target = target_of(consumer, landing)
            offer = push(producer, target, [1, 2], Ready(0, 2, 1), ttl_s=1.0)
            eventually(lambda: layer_of(consumer, 1, 0) == layer_of(producer, 1, 0))
        assert producer.offer_ended(offer.transfer_id) in ("dropped", "expired")
        assert open_landings(d) == 0
        offer = push(producer, target, [1, 2], Ready(0, 2, 1))
        assert producer.offer_ended(offer.transfer_id) == "dropped"
