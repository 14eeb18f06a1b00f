"""The staging of blocks, against a transfer that is played by hand and a clock that is set."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine_adapter.device import BlockCopies
from engine_adapter.memory.slots import Run, Slots
from engine_adapter.torch_engine.kv_transfer import KvEvents, KvTransferUnavailable, PullResult
from engine_adapter.torch_engine.staged_kv_transfer import StagedKvTransfer
from sidecar.protocol import Ready

NUM_BLOCKS, NUM_SLOTS, BLOCK_BYTES = 12, 4, 8


class Sidecar:
    """What is told to the inner transfer, and what it will tell at the next poll."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.next = KvEvents()
        self.refuses = False
        self.polled: Callable[[], None] = lambda: None

    def check(self, params: dict[str, Any]) -> None: ...

    def start_pull(self, request_id: str, params: dict[str, Any], local_block_ids: list[int], first_block: int) -> None:
        self.told.append(("pull", request_id, local_block_ids, first_block))

    def offer(self, request_id: str, block_ids: list[int], num_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
        if self.refuses:
            raise KvTransferUnavailable("away")
        self.told.append(("offer", request_id, block_ids))
        return {"remote_block_ids": block_ids}

    def land(
        self, request_id: str, params: dict[str, Any], local_block_ids: list[int], first_block: int, num_tokens: int
    ) -> None:
        self.told.append(("land", request_id, local_block_ids, first_block))

    def push(
        self, request_id: str, params: dict[str, Any], block_ids: list[int], num_tokens: int, ready: Ready
    ) -> None:
        if self.refuses:
            raise KvTransferUnavailable("away")
        self.told.append(("push", request_id, block_ids, ready))

    def mark_ready(self, request_id: str, ready: Ready) -> None:
        self.told.append(("mark", request_id, ready))

    def drop(self, params: dict[str, Any]) -> None:
        self.told.append(("drop", params))

    def revoke(self, request_id: str) -> None: ...

    def abandon(self, request_id: str) -> None:
        self.told.append(("abandon", request_id))

    def poll(self) -> KvEvents:
        self.polled()
        events, self.next = self.next, KvEvents()
        return events

    def close(self) -> None: ...


class Stage:
    def __init__(self) -> None:
        self.pool = torch.arange(NUM_BLOCKS * BLOCK_BYTES, dtype=torch.uint8).view(NUM_BLOCKS, BLOCK_BYTES)
        self.buffer = torch.zeros(NUM_SLOTS, BLOCK_BYTES, dtype=torch.uint8)
        self.slots, self.inner, self.now, self.num_wakes = Slots(NUM_SLOTS), Sidecar(), 0.0, 0
        self.news = threading.Event()
        self.transfer = StagedKvTransfer(
            self.inner, self.slots, BlockCopies("cpu", [self.pool], [self.buffer]), pull_timeout_s=30, wake=self.wake,
            news=self.news, offer_wait_s=5, clock=lambda: self.now,
        )  # fmt: skip

    def wake(self) -> None:
        self.num_wakes += 1

    def pull(self, request_id: str, blocks: list[int]) -> None:
        self.transfer.start_pull(request_id, {"of": request_id}, blocks, 2)

    def ends(self, request_id: str, ok: bool = True) -> None:
        self.inner.next.pulls.append(PullResult(request_id, ok))


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_an_offer_is_of_copies(stage: Stage) -> None:
    params = stage.transfer.offer("r", [7, 8, 3], 40, 0)
    assert params == {"remote_block_ids": [0, 1, 2]}
    assert torch.equal(stage.buffer[:3], stage.pool[[7, 8, 3]])
    stage.inner.next.ended_offers.append("r")
    assert stage.transfer.poll().ended_offers == ["r"]
    assert stage.slots.num_free == NUM_SLOTS


def test_a_refused_offer_keeps_no_slot(stage: Stage) -> None:
    stage.inner.refuses = True
    with pytest.raises(KvTransferUnavailable):
        stage.transfer.offer("r", [7], 16, 0)
    assert stage.slots.num_free == NUM_SLOTS


def test_a_pull_arrives_in_slots_and_is_told_when_its_blocks_are_there(stage: Stage) -> None:
    stage.pull("r", [9, 2])
    assert stage.inner.told == [("pull", "r", [0, 1], 2)]
    stage.buffer[:2] = 200
    stage.ends("r")
    assert [pull.request_id for pull in stage.transfer.poll().pulls] == ["r"]
    assert bool((stage.pool[[9, 2]] == 200).all())
    assert stage.pool[8, 0] == 64
    assert stage.slots.num_free == NUM_SLOTS


def test_a_failed_pull_changes_no_block(stage: Stage) -> None:
    before = stage.pool.clone()
    stage.pull("r", [9, 2])
    stage.buffer[:2] = 200
    stage.ends("r", ok=False)
    assert not stage.transfer.poll().pulls[0].ok
    assert torch.equal(stage.pool, before)
    assert stage.slots.num_free == NUM_SLOTS


def test_pulls_wait_for_slots_in_their_order(stage: Stage) -> None:
    stage.pull("a", [0, 1, 2])
    stage.pull("b", [3, 4])
    stage.pull("c", [5])
    assert [told[1] for told in stage.inner.told] == ["a"]
    stage.ends("a")
    stage.transfer.poll()
    assert [told[1] for told in stage.inner.told] == ["a", "b", "c"]


def test_a_pull_that_finds_no_slot_in_time_fails_alone(stage: Stage) -> None:
    stage.pull("a", [0, 1, 2])
    stage.now = 20
    stage.pull("b", [3, 4])
    stage.now = 49
    assert stage.transfer.poll().pulls == []
    stage.now = 51
    late = stage.transfer.poll().pulls
    assert [(pull.request_id, pull.reason) for pull in late] == [("b", "timeout")]
    stage.ends("a")
    assert [pull.request_id for pull in stage.transfer.poll().pulls] == ["a"]


def test_a_pull_larger_than_the_buffer_is_refused_at_once_and_holds_nobody_up(stage: Stage) -> None:
    stage.pull("a", [0, 1, 2, 3, 4])
    stage.pull("b", [5])
    result = stage.transfer.poll().pulls[0]
    assert (result.request_id, result.reason) == ("a", "invalid")
    assert "--kv-staging-bytes" in result.message
    assert stage.num_wakes
    assert stage.inner.told == [("pull", "b", [0], 2)]


def test_a_waiting_pull_that_is_abandoned_drops_its_lease(stage: Stage) -> None:
    stage.pull("a", [0, 1, 2])
    stage.pull("b", [3, 4])
    stage.transfer.abandon("b")
    stage.transfer.abandon("a")
    assert stage.inner.told[1:] == [("drop", {"of": "b"}), ("abandon", "a")]
    assert [pull.reason for pull in stage.transfer.poll().pulls] == ["abandoned"]


def test_an_offer_waits_for_slots_and_then_says_what_is_missing(stage: Stage) -> None:
    stage.transfer.offer("a", [0, 1, 2], 48, 0)

    def later() -> None:
        stage.now += 1
        stage.news.set()

    stage.inner.polled = later
    with pytest.raises(KvTransferUnavailable, match="1 of 4 blocks free, 2 are needed"):
        stage.transfer.offer("b", [4, 5], 32, 0)
    assert stage.now == 5
    stage.inner.next.ended_offers.append("a")
    assert stage.transfer.offer("b", [4, 5], 32, 0) == {"remote_block_ids": [0, 1]}
    assert stage.transfer.poll().ended_offers == ["a"]


def test_an_offer_that_can_never_fit_does_not_wait(stage: Stage) -> None:
    with pytest.raises(KvTransferUnavailable):
        stage.transfer.offer("a", [0, 1, 2, 3, 4], 80, 0)
    assert stage.now == 0


def test_on_a_stream_the_end_is_told_when_the_copy_is_done(stage: Stage) -> None:
    class Slow:
        done = False

        def out(self, runs: Any) -> None: ...

        def into(self, runs: list[Run]) -> Callable[[], bool]:
            return lambda: Slow.done

    transfer = StagedKvTransfer(
        stage.inner, stage.slots, Slow(), pull_timeout_s=30, wake=stage.wake, news=stage.news, clock=lambda: 0.0
    )
    transfer.start_pull("r", {}, [1], 0)
    stage.ends("r")
    assert transfer.poll().pulls == []
    assert stage.slots.num_free == NUM_SLOTS - 1
    Slow.done = True
    assert [pull.request_id for pull in transfer.poll().pulls] == ["r"]
    assert stage.slots.num_free == NUM_SLOTS


def test_a_landing_is_of_slots_and_arrives_like_a_pull(stage: Stage) -> None:
    stage.transfer.land("r", {}, [9, 2], 1, 40)
    assert stage.inner.told == [("land", "r", [0, 1], 1)]
    stage.buffer[:2] = 200
    stage.ends("r")
    assert stage.transfer.poll().pulls[0].ok
    assert bool((stage.pool[[9, 2]] == 200).all())


def test_a_push_copies_what_is_marked_before_it_says_so(stage: Stage) -> None:
    stage.transfer.push("r", {}, [5, 6, 7], 48, Ready(1, 1, 0))
    assert torch.equal(stage.buffer[0], stage.pool[5])
    assert not stage.buffer[1:].any()
    stage.pool[6:8, :4] = 1  # a first layer of both blocks
    stage.transfer.mark_ready("r", Ready(1, 3, 1))
    assert torch.equal(stage.buffer[1:3], stage.pool[6:8])
    stage.pool[6:8, 4:] = 2  # the second, which is marked as complete blocks later
    stage.transfer.mark_ready("r", Ready(3, 3, 0))
    assert torch.equal(stage.buffer[1:3], stage.pool[6:8])
    assert [told[0] for told in stage.inner.told] == ["push", "mark", "mark"]
    stage.inner.next.ended_pushes.append(("r", "consumed"))
    assert stage.transfer.poll().ended_pushes == [("r", "consumed")]
    assert stage.slots.num_free == NUM_SLOTS


def test_a_refused_push_keeps_no_slot_and_marks_of_an_ended_one_are_nothing(stage: Stage) -> None:
    stage.inner.refuses = True
    with pytest.raises(KvTransferUnavailable):
        stage.transfer.push("r", {}, [5, 6], 32, Ready())
    stage.transfer.mark_ready("r", Ready(2, 2, 0))
    assert stage.inner.told == []
    assert stage.slots.num_free == NUM_SLOTS
