"""Pushes between pools that are laid out differently: put together once all is computed, or refused by name."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from sidecar.layout import KvLayout
from sidecar.protocol import PushTarget, Ready
from tests.sidecar_processes.harness import FakeEngine, Sidecar, eventually
from tests.sidecar_processes.test_push import land, open_landings, push, target_of
from tests.sidecar_processes.test_reshard import BLOCK_SIZE, numbers
from tests.unit.sidecar.cut_layouts import HEAD_MAJOR, MIXED, TOKEN_MAJOR, WHOLE_POOL, content, rank_layout

HEADS, LAYERS, BLOCKS = 4, 3, 32
CLAIMED = 'baton_sidecar_leases{state="claimed"}'


def alone(axes: tuple[str, ...], block_size: int = BLOCK_SIZE, tp: int = 1) -> KvLayout:
    return rank_layout(axes, block_size, HEADS, tp, 0, (LAYERS,), BLOCKS, 64)


def write(engine: FakeEngine, block_ids: list[int]) -> None:
    """A prompt of random tokens in these blocks, as the engine's layout has it."""
    where, what = content(engine.layout, block_ids)
    pool = np.frombuffer(engine.pool, np.uint8)
    pool[where] = numbers(what)
    del pool  # else the mapping can't be closed


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("axes", [(TOKEN_MAJOR, HEAD_MAJOR), (WHOLE_POOL, MIXED)], ids=["heads", "layers"])
def test_nothing_is_copied_before_all_is_computed_and_then_all(
    directory: Path, transport: str, axes: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    theirs, ours = [7, 8, 9, 30, 2], [5, 6, 1]
    with (
        Sidecar(directory, "p", transport) as p,
        Sidecar(directory, "d", transport) as d,
        FakeEngine(p, alone(axes[0]), seed=1) as producer,
        FakeEngine(d, alone(axes[1]), seed=2) as consumer,
    ):
        before = consumer.pool[:]
        landing = land(consumer, "a", ours, first_block=2)
        offer = push(producer, target_of(consumer, landing), theirs)
        eventually(lambda: p.metric(CLAIMED) == 1)
        for mark in (Ready(0, 4, 1), Ready(0, 4, LAYERS), Ready(4, 5, LAYERS - 1)):
            producer.client.mark_ready(offer.transfer_id, mark)
        time.sleep(0.2)
        assert consumer.pool[:] == before and consumer.count("a") == 0
        write(producer, theirs)
        producer.client.mark_ready(offer.transfer_id, Ready(4, 5, LAYERS))
        assert consumer.pull_ended("a").ok and producer.offer_ended(offer.transfer_id) == "consumed"
        want = np.frombuffer(before, np.uint8).copy()
        where, what = content(consumer.layout, [0, 0, *ours])  # of which the first two were there
        wanted = slice(2 * BLOCK_SIZE, None)
        want[where[:, :, wanted]] = numbers(what[:, :, wanted])
        assert bytes(want) == consumer.pool[:]


@pytest.mark.parametrize(
    ("producer_layout", "consumer_layout", "why"),
    [
        (alone(TOKEN_MAJOR, tp=2), alone(TOKEN_MAJOR), "the producer has 2 ranks"),
        (alone(TOKEN_MAJOR), alone(TOKEN_MAJOR, tp=2), "the consumer has 2 ranks"),
        (alone(TOKEN_MAJOR, tp=2), alone(TOKEN_MAJOR, tp=2), "the producer has 2 ranks"),
        (alone(TOKEN_MAJOR), alone(TOKEN_MAJOR, block_size=32), "block_size differs"),
    ],
)
def test_what_can_not_be_pushed_is_refused_at_once_and_the_landing_waits_for_another(
    directory: Path, producer_layout: KvLayout, consumer_layout: KvLayout, why: str
) -> None:
    with (
        Sidecar(directory, "p", "shm") as p,
        Sidecar(directory, "d", "shm") as d,
        FakeEngine(p, producer_layout, seed=1) as producer,
        FakeEngine(d, consumer_layout, seed=2) as consumer,
    ):
        before = consumer.pool[:]
        target: PushTarget = target_of(consumer, land(consumer, "a", [1, 2]))
        offer = push(producer, target, [3, 4], Ready(2, 2, 0))
        assert producer.offer_ended(offer.transfer_id) == "revoked"
        assert why in p.log_path.read_text() and open_landings(d) == 1
        assert consumer.pool[:] == before and consumer.count("a") == 0
