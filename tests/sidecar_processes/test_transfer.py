"""What every transport owes: the right bytes, in the right places, reported once, and refusals that write nothing."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import msgspec
import pytest

from sidecar.layout import Plane
from sidecar.protocol import OfferEnded
from tests.sidecar_processes.conftest import Pair
from tests.sidecar_processes.harness import NUM_BLOCKS, FakeEngine, Sidecar, a_layout


@pytest.mark.parametrize("seed", range(6))
def test_random_blocks_arrive_where_they_belong_and_nothing_else_changes(pair: Pair, seed: int) -> None:
    dice = random.Random(seed)
    num_blocks = dice.randint(1, NUM_BLOCKS // 2)
    first_block = dice.randint(0, num_blocks - 1)
    remote = dice.sample(range(NUM_BLOCKS), num_blocks)
    local = dice.sample(range(NUM_BLOCKS), num_blocks - first_block)
    before = pair.consumer.pool[:]
    offer, source = pair.producer.offer(remote)

    ended = pair.consumer.pull(source, local, first_block=first_block)

    assert ended.ok and ended.reason == "" and ended.transport == pair.transport
    assert ended.num_blocks == len(local) and ended.num_bytes == len(local) * 8192
    assert ended.peer == f"p@{pair.producer_sidecar.listen}"
    for index, block_id in enumerate(local):
        assert pair.consumer.block(block_id) == pair.producer.block(remote[first_block + index])
    for block_id in set(range(NUM_BLOCKS)) - set(local):
        assert pair.consumer.block(block_id) == before[block_id * 8192 : (block_id + 1) * 8192]
    assert pair.producer.offer_ended(offer.transfer_id) == "consumed"
    assert pair.consumer.count(ended.pull_id) == 1


def test_neighbours_in_order_and_in_reverse(pair: Pair) -> None:
    remote, local = list(range(40, 140)), list(range(199, 99, -1))
    _, source = pair.producer.offer(remote)
    assert pair.consumer.pull(source, local).ok
    assert [pair.consumer.block(b) for b in local] == [pair.producer.block(b) for b in remote]


def test_a_lease_without_blocks_goes_the_same_way(pair: Pair) -> None:
    offer, source = pair.producer.offer([])
    ended = pair.consumer.pull(source, [])
    assert ended.ok and ended.num_bytes == 0
    assert pair.producer.offer_ended(offer.transfer_id) == "consumed"


def test_five_thousand_spans_in_one_transfer(pair: Pair) -> None:
    layout = a_layout(8192, 256)
    for engine in (pair.producer, pair.consumer):
        engine.client.register_pool(engine.fd, layout)
    try:
        remote, local = random.sample(range(8192), 5000), random.sample(range(8192), 5000)
        assert pair.consumer.pull(pair.producer.offer(remote)[1], local).ok
        for r, c in zip(remote, local, strict=True):
            assert pair.consumer.pool[c * 256 : c * 256 + 256] == pair.producer.pool[r * 256 : r * 256 + 256]
    finally:
        for engine in (pair.producer, pair.consumer):
            engine.client.register_pool(engine.fd, engine.layout)


def test_many_at_once_each_end_once(pair: Pair) -> None:
    offers = [pair.producer.offer([8 * n + k for k in range(8)]) for n in range(32)]
    for n, (_, source) in enumerate(offers):
        pair.consumer.client.pull(f"many-{n}", source, [255 - 8 * n - k for k in range(8)])
    for n in range(32):
        assert pair.consumer.pull_ended(f"many-{n}").ok
        assert [pair.consumer.block(255 - 8 * n - k) for k in range(8)] == [
            pair.producer.block(8 * n + k) for k in range(8)
        ]
    for offer, _ in offers:
        assert pair.producer.offer_ended(offer.transfer_id) == "consumed"
    assert all(pair.consumer.count(f"many-{n}") == 1 for n in range(32))
    ended = [event for event in pair.producer.events if isinstance(event, OfferEnded)]
    assert len({event.transfer_id for event in ended}) == len(ended)


@dataclass
class Wrong:
    """A field of the source that is not what the producer said, and the refusal that must follow."""

    field: str
    value: str | int
    reason: str


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong("token", "0" * 32, "wrong_token"),
        Wrong("token", "\udce9 not ascii".encode(errors="replace").decode(), "wrong_token"),
        Wrong("transfer_id", "nobody", "unknown"),
        Wrong("engine_id", "another", "wrong_engine"),
        Wrong("epoch", "an-old-one", "stale_epoch"),
        Wrong("port", 1, "unreachable"),
        Wrong("port", 99999, "unreachable"),
        Wrong("host", "no.such.host.invalid", "unreachable"),
    ],
    ids=lambda wrong: f"{wrong.field}-{wrong.reason}",
)
def test_a_wrong_source_is_refused_and_writes_nothing(pair: Pair, wrong: Wrong) -> None:
    _, source = pair.producer.offer([1, 2, 3])
    before = pair.consumer.pool[:]
    ended = pair.consumer.pull(msgspec.structs.replace(source, **{wrong.field: wrong.value}), [1, 2, 3])
    assert (ended.ok, ended.reason) == (False, wrong.reason) and ended.message
    assert pair.consumer.pool[:] == before
    assert pair.consumer.pull(source, [1, 2, 3]).ok  # the lease itself is unharmed


def test_after_release_expiry_drop_and_revocation_a_claim_is_refused(pair: Pair) -> None:
    before = pair.consumer.pool[:]
    _, released = pair.producer.offer([])
    assert pair.consumer.pull(released, []).ok
    expired_offer, expired = pair.producer.offer([5, 6], ttl_s=0.1)
    assert pair.producer.offer_ended(expired_offer.transfer_id) == "expired"
    dropped_offer, dropped = pair.producer.offer([7])
    pair.consumer.client.drop(dropped)
    pair.consumer.client.drop(dropped)
    assert pair.producer.offer_ended(dropped_offer.transfer_id) == "dropped"
    revoked_offer, revoked = pair.producer.offer([8])
    pair.producer.client.revoke(revoked_offer.transfer_id)
    assert pair.producer.offer_ended(revoked_offer.transfer_id) == "revoked"

    reasons = [pair.consumer.pull(source, [9]).reason for source in (released, expired, dropped, revoked)]

    assert reasons == ["released", "expired", "released", "released"]
    assert pair.consumer.pool[:] == before


@pytest.mark.parametrize(("local", "first_block"), [([0, 1, 2], 1), ([0, 0], 0), ([NUM_BLOCKS], 0), ([3], 7)], ids=str)
def test_a_pull_that_makes_no_sense_is_refused_and_the_lease_stays(
    pair: Pair, local: list[int], first_block: int
) -> None:
    _, source = pair.producer.offer([1, 2, 3])
    before = pair.consumer.pool[:]
    ended = pair.consumer.pull(source, local, first_block=first_block)
    assert (ended.ok, ended.reason) == (False, "invalid") and ended.message
    assert pair.consumer.pool[:] == before
    assert pair.consumer.pull(source, [1, 2, 3]).ok


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "other"}, "model differs: the producer has 'test', the consumer has 'other'"),
        ({"block_size": 32}, "block_size differs: the producer has 16, the consumer has 32"),
        ({"dtype": "bfloat16"}, "dtype differs"),
        ({"block_bytes": 4096}, "plane_block_bytes differs: the producer has (8192,), the consumer has (4096,)"),
    ],
    ids=["model", "block_size", "dtype", "block_bytes"],
)
def test_another_layout_is_refused_by_the_field_that_differs(
    pair: Pair, changes: dict[str, object], named: str
) -> None:
    offer, source = pair.producer.offer([1, 2])
    epoch = pair.consumer.client.register_pool(pair.consumer.fd, a_layout(**changes))  # type: ignore[arg-type]
    try:
        before = pair.consumer.pool[:]
        ended = pair.consumer.pull(source, [1, 2])
        assert (ended.ok, ended.reason) == (False, "incompatible") and named in ended.message
        assert pair.consumer.pool[:] == before
        pair.consumer.client.drop(source)  # what cannot be read can still be given up
        assert pair.producer.offer_ended(offer.transfer_id) == "dropped"
    finally:
        assert pair.consumer.client.register_pool(pair.consumer.fd, pair.consumer.layout) != epoch


def test_a_producer_that_registers_again_voids_its_offers(pair: Pair) -> None:
    offer, source = pair.producer.offer([1, 2])
    assert pair.consumer.pull(pair.producer.offer([3])[1], [3]).ok  # the connection is pooled
    before = pair.consumer.pool[:]
    pair.producer.client.register_pool(pair.producer.fd, pair.producer.layout)
    assert pair.producer.offer_ended(offer.transfer_id) == "revoked"
    assert pair.consumer.pull(source, [1, 2]).reason == "stale_epoch"
    assert pair.consumer.pool[:] == before
    assert pair.consumer.pull(pair.producer.offer([1, 2])[1], [1, 2]).ok


def test_a_pool_with_two_planes_and_gaps(pair: Pair) -> None:
    producer_planes = (Plane(0, 4096, 4096), Plane(1 << 20, 8192, 4096))
    consumer_planes = (Plane(512, 6000, 4096), Plane(900_000, 4096, 4096))
    pair.producer.client.register_pool(pair.producer.fd, a_layout(100, planes=producer_planes))
    pair.consumer.client.register_pool(pair.consumer.fd, a_layout(64, planes=consumer_planes))
    try:
        remote, local = [99, 0, 1, 50], [63, 62, 0, 1]
        assert pair.consumer.pull(pair.producer.offer(remote)[1], local).ok
        for theirs, ours in zip(producer_planes, consumer_planes, strict=True):
            for r, c in zip(remote, local, strict=True):
                start, to = theirs.offset + r * theirs.stride_bytes, ours.offset + c * ours.stride_bytes
                assert pair.consumer.pool[to : to + 4096] == pair.producer.pool[start : start + 4096]
    finally:
        for engine in (pair.producer, pair.consumer):
            engine.client.register_pool(engine.fd, engine.layout)


def test_what_moved_is_counted(pair: Pair) -> None:
    peer = f'peer="p@{pair.producer_sidecar.listen}",transport="{pair.transport}"'
    bytes_before = pair.consumer_sidecar.metric(f"baton_sidecar_pull_bytes_total{{{peer}}}")
    blocks_before = pair.consumer_sidecar.metric(f"baton_sidecar_pull_blocks_total{{{peer}}}")
    assert pair.consumer.pull(pair.producer.offer([1, 2, 3])[1], [4, 5, 6]).ok
    assert pair.consumer_sidecar.metric(f"baton_sidecar_pull_bytes_total{{{peer}}}") == bytes_before + 3 * 8192
    assert pair.consumer_sidecar.metric(f"baton_sidecar_pull_blocks_total{{{peer}}}") == blocks_before + 3
    assert pair.consumer_sidecar.metric("baton_sidecar_registered_bytes") == pair.consumer.layout.pool_bytes
    status, health = pair.producer_sidecar.get("/healthz")
    assert status == 200 and '"engine_registered": true' in health


def test_a_long_transfer_does_not_hold_back_a_short_one(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> None:
    with (
        Sidecar(tmp_path_factory.mktemp("s"), "slow", pair.transport, "--copy-bytes-per-s", "524288") as slow,
        FakeEngine(slow) as consumer,
    ):
        assert consumer.pull(pair.producer.offer([1])[1], [1]).ok
        _, long_source = pair.producer.offer(list(range(200)))
        consumer.client.pull("long", long_source, list(range(200)))
        started = time.monotonic()
        assert consumer.pull(pair.producer.offer([3, 4])[1], [203, 204]).ok
        assert time.monotonic() - started < 1.5  # the long one takes three seconds
        assert consumer.count("long") == 0
        assert consumer.pull_ended("long").ok
