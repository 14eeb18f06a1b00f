"""Engines of several ranks, a sidecar process beside each: every rank gets the bytes of its own heads and layers."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
import pytest

from sidecar.layout import KvLayout
from sidecar.protocol import Offer, OfferEnded, PullEnded, PullSource
from tests.sidecar_processes.conftest import SLOW_COPY
from tests.sidecar_processes.harness import FakeEngine, Sidecar, eventually
from tests.unit.sidecar.cut_layouts import HEAD_MAJOR, TOKEN_MAJOR, WHOLE_POOL, content, rank_layout

HEADS, CELL_BYTES = 4, 64
BLOCKS, BLOCK_SIZE = 32, 16
LEASE = [7, 8, 9, 30, 2, 3]


def numbers(what: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Bytes that tell one place of the model from another."""
    return (what * 2654435761 >> 13).astype(np.uint8)


class Ranks:
    """An engine of several ranks: a sidecar and a pool each."""

    def __init__(self, directory: Path, name: str, transport: str, layouts: list[KvLayout], *flags: str) -> None:
        self.sidecars: list[Sidecar] = []
        self.engines: list[FakeEngine] = []
        try:
            for rank, layout in enumerate(layouts):
                own = ("--engine-id", name, "--rank", str(rank), *flags)
                self.sidecars.append(Sidecar(directory, f"{name}{rank}", transport, *own))
                self.engines.append(FakeEngine(self.sidecars[-1], layout, seed=rank))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        for sidecar in self.sidecars:
            sidecar.stop()

    def offer(self, block_ids: list[int], ttl_s: float = 30.0) -> tuple[list[Offer], list[PullSource]]:
        """Every rank writes its part of a prompt into these blocks and leases them."""
        for engine in self.engines:
            where, what = content(engine.layout, block_ids)
            pool = np.frombuffer(engine.pool, np.uint8)
            pool[where] = numbers(what)
            del pool  # else the mapping can't be closed
        offered = [engine.offer(block_ids, ttl_s) for engine in self.engines]
        return [offer for offer, _ in offered], [source for _, source in offered]

    def pull(self, sources: list[PullSource], local: list[int], stage_layers: tuple[int, ...] = ()) -> list[PullEnded]:
        """All ranks at once."""
        pull_id = f"request-{time.monotonic_ns()}"
        for engine in self.engines:
            engine.client.pull(pull_id, sources, local, stage_layers=stage_layers)
        return [engine.pull_ended(pull_id) for engine in self.engines]

    def outcomes(self, offers: list[Offer]) -> list[str]:
        """How each rank's lease ended."""
        return [engine.offer_ended(offer.transfer_id) for engine, offer in zip(self.engines, offers, strict=True)]


def cut(tp: int, axes: tuple[str, ...], heads: int = HEADS, block_size: int = BLOCK_SIZE) -> list[KvLayout]:
    return [
        rank_layout(axes, block_size, heads, tp, rank, (3,), BLOCKS * BLOCK_SIZE // block_size, CELL_BYTES)
        for rank in range(tp)
    ]


def check_pools(consumer: Ranks, local: list[int], before: list[bytes]) -> None:
    """What belongs into `local` is there, on every rank, and nothing else has changed."""
    for engine, old in zip(consumer.engines, before, strict=True):
        want = np.frombuffer(old, np.uint8).copy()
        where, what = content(engine.layout, local)
        want[where] = numbers(what)
        assert bytes(want) == engine.pool[:]


@pytest.fixture(params=[(1, 1), (2, 1), (1, 2), (4, 2)], ids=lambda sizes: f"{sizes[0]}to{sizes[1]}", scope="module")
def split(
    request: pytest.FixtureRequest, transport: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Ranks, Ranks]]:
    theirs, ours = request.param
    directory = tmp_path_factory.mktemp("r")
    with (
        Ranks(directory, "p", transport, cut(theirs, TOKEN_MAJOR)) as producer,
        Ranks(directory, "d", transport, cut(ours, HEAD_MAJOR)) as consumer,
    ):
        yield producer, consumer


def test_every_rank_gets_its_own_bytes_and_every_lease_ends_once(split: tuple[Ranks, Ranks], transport: str) -> None:
    producer, consumer = split
    for local in ([1, 2, 3, 4, 5, 6], [31, 0, 17, 18, 19, 4]):
        before = [engine.pool[:] for engine in consumer.engines]
        offers, sources = producer.offer(LEASE)
        ended = consumer.pull(sources, local)
        assert all(end.ok and end.transport == transport for end in ended), ended
        assert [end.num_bytes for end in ended] == [
            len(local) * engine.layout.block_bytes for engine in consumer.engines
        ]
        check_pools(consumer, local, before)
        assert producer.outcomes(offers) == ["consumed"] * len(offers)
    reported = [event for engine in producer.engines for event in engine.events if isinstance(event, OfferEnded)]
    assert len(reported) == len({event.transfer_id for event in reported})


@contextlib.contextmanager
def cluster(
    directory: Path, theirs: list[KvLayout], ours: list[KvLayout], *flags: str
) -> Iterator[tuple[Ranks, Ranks]]:
    with (
        Ranks(directory, "p", "shm", theirs, *flags) as producer,
        Ranks(directory, "d", "shm", ours, *flags) as consumer,
    ):
        yield producer, consumer


def test_a_latent_that_all_ranks_hold_is_read_from_some_and_let_go_by_the_others(directory: Path) -> None:
    with cluster(directory, cut(4, TOKEN_MAJOR, heads=1), cut(2, TOKEN_MAJOR, heads=1)) as (producer, consumer):
        peers: set[str] = set()
        for _ in range(12):
            before = [engine.pool[:] for engine in consumer.engines]
            offers, sources = producer.offer(LEASE)
            ended = consumer.pull(sources, [1, 2, 3, 4, 5, 6])
            assert all(end.ok for end in ended)
            assert len({end.peer for end in ended}) == 2  # not both from one
            peers |= {end.peer for end in ended}
            check_pools(consumer, [1, 2, 3, 4, 5, 6], before)
            assert sorted(producer.outcomes(offers)) == ["consumed"] * 2 + ["dropped"] * 2
        assert len(peers) > 2  # nor every request from the same


def test_stages_and_other_block_sizes(directory: Path) -> None:
    theirs = [rank_layout(WHOLE_POOL, 8, HEADS, 2, rank, (2, 1), 2 * BLOCKS, CELL_BYTES) for rank in range(4)]
    with cluster(directory, theirs, cut(2, ("token", "head", "layer", "kv"))) as (producer, consumer):
        before = [engine.pool[:] for engine in consumer.engines]
        offers, sources = producer.offer([5, 6, 40, 41, 3, 2])
        ended = consumer.pull(sources, [9, 10, 4], (2, 1))
        assert all(end.ok for end in ended), ended
        check_pools(consumer, [9, 10, 4], before)
        assert producer.outcomes(offers) == ["consumed"] * 4

        _, sources = producer.offer([5, 6])
        ended = consumer.pull(sources, [9], (1, 2))
        assert {end.reason for end in ended} == {"incompatible"} and "stage_layers" in ended[0].message


def test_a_lease_stays_until_its_last_reader_has_read(directory: Path) -> None:
    with cluster(directory, cut(1, HEAD_MAJOR), cut(2, HEAD_MAJOR)) as (producer, consumer):
        (offer,), sources = producer.offer(LEASE)
        first, second = consumer.engines
        first.client.pull("request", sources, [1, 2, 3, 4, 5, 6])
        assert first.pull_ended("request").ok
        before = [engine.pool[:] for engine in consumer.engines]
        assert first.pull(sources[0], [1, 2, 3, 4, 5, 6], "another").ok  # a request of its own begins anew
        second.client.pull("another", sources, [1, 2, 3, 4, 5, 6])
        assert not any(isinstance(event, OfferEnded) for event in producer.engines[0].client.poll())
        assert second.pull_ended("another").ok
        check_pools(consumer, [1, 2, 3, 4, 5, 6], before)
        assert producer.outcomes([offer]) == ["consumed"]
        assert second.pull(sources[0], [1, 2, 3, 4, 5, 6], "request").reason == "released"


def test_a_reader_that_never_comes_costs_a_lease_s_time_and_no_more(directory: Path) -> None:
    with cluster(directory, cut(1, HEAD_MAJOR), cut(2, HEAD_MAJOR), "--claim-ttl-s", "0.6") as (producer, consumer):
        (offer,), sources = producer.offer(LEASE, ttl_s=1.0)
        assert consumer.engines[0].pull(sources[0], [1, 2, 3, 4, 5, 6], "request").ok
        assert producer.outcomes([offer]) == ["expired"]
        late = consumer.engines[1].pull(sources[0], [1, 2, 3, 4, 5, 6], "request")
        assert late.reason == "expired"


@pytest.fixture(scope="module")
def two_to_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ranks, Ranks]]:
    with cluster(tmp_path_factory.mktemp("t"), cut(2, HEAD_MAJOR), cut(1, HEAD_MAJOR)) as ranks:
        yield ranks


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        # Both links are wrong: the one that answers first is the one that is named.
        (lambda sources: sources[::-1], "is rank (1 of 2, it was given as rank 0|0 of 2, it was given as rank 1) of 2"),
        (lambda sources: [sources[0], sources[0]], "is rank 0 of 2, it was given as rank 1 of 2"),
        (lambda sources: sources[:1], "is rank 0 of 2, it was given as rank 0 of 1"),
        (lambda sources: [*sources, sources[0]], "3 ranks in 1 stages, which can't hold 4 KV heads"),
    ],
    ids=["swapped", "twice", "one missing", "one too many"],
)
def test_leases_that_would_leave_a_hole_are_refused_and_stay(
    two_to_one: tuple[Ranks, Ranks], mix: Callable[[list[PullSource]], list[PullSource]], said: str
) -> None:
    producer, consumer = two_to_one
    offers, sources = producer.offer(LEASE)
    (ended,) = consumer.pull(mix(sources), [1, 2, 3, 4, 5, 6])
    assert (ended.ok, ended.reason) == (False, "incompatible") and re.search(said, ended.message), ended.message
    assert consumer.pull(sources, [1, 2, 3, 4, 5, 6])[0].ok
    assert producer.outcomes(offers) == ["consumed"] * 2


def test_one_lease_that_fails_ends_the_pull_once_and_leaves_the_others_whole(two_to_one: tuple[Ranks, Ranks]) -> None:
    producer, consumer = two_to_one
    offers, sources = producer.offer(LEASE)
    wrong = [sources[0], msgspec.structs.replace(sources[1], token="0" * 32)]
    (ended,) = consumer.pull(wrong, [1, 2, 3, 4, 5, 6])
    assert (ended.reason, ended.peer) == ("wrong_token", f"p@{producer.sidecars[1].listen}")
    assert consumer.engines[0].count(ended.pull_id) == 1
    before = [engine.pool[:] for engine in consumer.engines]
    assert consumer.pull(sources, [1, 2, 3, 4, 5, 6])[0].ok  # what was copied was given back, not consumed
    check_pools(consumer, [1, 2, 3, 4, 5, 6], before)
    assert producer.outcomes(offers) == ["consumed"] * 2


@pytest.mark.parametrize("abandoned", [True, False], ids=["abandoned", "a producer's rank dies"])
def test_nothing_writes_after_a_pull_that_ended_in_the_middle(directory: Path, abandoned: bool) -> None:
    with cluster(directory, cut(2, HEAD_MAJOR), cut(1, HEAD_MAJOR), *SLOW_COPY) as (producer, consumer):
        engine = consumer.engines[0]
        offers, sources = producer.offer(LEASE)
        assert engine.pull([sources[0], sources[1]], [1, 2, 3, 4, 5, 6], deadline_s=10.0).ok  # links are made
        producer.outcomes(offers)
        blocks = list(range(BLOCKS))
        offers, sources = producer.offer(blocks)
        before = engine.pool[:]
        engine.client.pull("slow", sources, blocks)
        eventually(lambda: engine.pool[:] != before)
        if abandoned:
            engine.client.abandon("slow")
        else:
            producer.sidecars[1].kill()
        ended = engine.pull_ended("slow")
        now = engine.pool[:]
        assert ended.reason == ("abandoned" if abandoned else "unreachable")
        if abandoned:
            assert producer.outcomes(offers) == ["dropped"] * 2
        else:
            assert engine.pull(sources, [1], deadline_s=5.0).reason == "unreachable"
            eventually(lambda: producer.sidecars[0].metric('baton_sidecar_leases{state="offered"}') == 1)
        time.sleep(0.5)
        assert engine.pool[:] == now and engine.count("slow") == 1


def test_another_decoder_takes_over_what_one_has_read_in_part(directory: Path) -> None:
    blocks = list(range(BLOCKS))
    with (
        cluster(directory, cut(1, HEAD_MAJOR), cut(2, HEAD_MAJOR), *SLOW_COPY) as (producer, dying),
        Ranks(directory, "e", "shm", cut(1, TOKEN_MAJOR)) as other,
    ):
        (offer,), sources = producer.offer(blocks)
        assert dying.engines[0].pull(sources[0], blocks, "request", deadline_s=60.0).ok
        before = dying.engines[1].pool[:]
        dying.engines[1].client.pull("request", sources, blocks)
        eventually(lambda: dying.engines[1].pool[:] != before)
        assert other.engines[0].pull(sources, blocks).reason == "wrong_engine"  # while one reads
        dying.sidecars[1].kill()
        eventually(lambda: producer.sidecars[0].metric('baton_sidecar_leases{state="offered"}') == 1)
        pools = [engine.pool[:] for engine in other.engines]
        assert other.pull(sources, blocks)[0].ok
        check_pools(other, blocks, pools)
        assert producer.outcomes([offer]) == ["consumed"]
