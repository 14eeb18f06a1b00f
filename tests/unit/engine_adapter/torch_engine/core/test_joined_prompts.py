"""Lists of prompts that are landed together: all of a list enters the engine, or none of it."""

from __future__ import annotations

from typing import Any

import pytest

from engine_adapter.torch_engine.model_loader import LoadedModel
from engine_adapter.torch_engine.scheduler import Scheduler
from engine_adapter.torch_engine.sequence import EngineRequest, Sequence
from tests.unit.engine_adapter.torch_engine.core.harness import CoreHarness, ask, greedy, random_prompt
from tests.unit.engine_adapter.torch_engine.core.test_pushes import TO_METASERVER, PushingTransfer, until_computed
from tests.unit.engine_adapter.torch_engine.core.test_scheduler import advance, make, sequence


def children(list_id: str, *num_tokens: int, first_token: int = 0, arrival_time: float = 0.0) -> list[Sequence]:
    params = TO_METASERVER | {"list_id": list_id, "num_children": len(num_tokens)}
    return [
        sequence(
            num, f"{list_id}{index}", first_token + 1000 * index, kv_transfer_params=params, arrival_time=arrival_time
        )
        for index, num in enumerate(num_tokens)
    ]


def names(seqs: list[Sequence]) -> list[str]:
    return [seq.request_id for seq in seqs]


def finish_pulls(scheduler: Scheduler) -> None:
    for seq in list(scheduler.pulling.values()):
        scheduler.pull_succeeded(seq)


def test_two_lists_that_each_fit_do_not_hold_a_part_each() -> None:
    scheduler = make(num_blocks=8)
    for seq in (*children("a", 10, 10), *children("b", 10, 10, first_token=5000, arrival_time=1.0)):
        scheduler.add(seq)
    assert names(scheduler.schedule().pulls) == ["a0", "a1"]
    assert not scheduler.schedule().pulls and scheduler.block_manager.num_free_blocks == 2
    assert not scheduler.has_runnable_work  # until the pulls have ended
    finish_pulls(scheduler)
    for seq in list(scheduler.running):
        scheduler.finish(seq)
    assert names(scheduler.schedule().pulls) == ["b0", "b1"]
    scheduler.block_manager.check_conservation()


def test_a_list_waits_for_what_runs_and_is_not_overtaken() -> None:
    scheduler = make(num_blocks=8)
    scheduler.add(sequence(10, "before", 9000))
    advance(scheduler, scheduler.schedule())
    for seq in (*children("a", 10, 10, arrival_time=1.0), sequence(3, "after", 8000, arrival_time=2.0)):
        scheduler.add(seq)
    plan = scheduler.schedule()
    assert not plan.pulls and not plan.oversized and names(scheduler.running) == ["before"]
    scheduler.finish(scheduler.running[0])
    assert names(scheduler.schedule().pulls) == ["a0", "a1"]


def test_a_list_of_which_some_is_still_to_come_is_passed_over() -> None:
    scheduler = make()
    first, second = children("a", 10, 10)
    scheduler.add(first)
    assert scheduler.schedule().is_empty and not scheduler.has_runnable_work
    scheduler.add(sequence(10, "other", 9000, arrival_time=1.0))
    assert [chunk.sequence.request_id for chunk in scheduler.schedule().prefills] == ["other"]
    scheduler.add(second)
    assert names(scheduler.schedule().pulls) == ["a0", "a1"] and not scheduler.waiting


@pytest.mark.parametrize(("num_blocks", "max_num_seqs"), [(5, 8), (32, 1)])
def test_what_can_never_be_held_at_once_is_told_at_once(num_blocks: int, max_num_seqs: int) -> None:
    scheduler = make(num_blocks=num_blocks, max_num_seqs=max_num_seqs)
    for seq in children("a", 10, 10):
        scheduler.add(seq)
    assert names(scheduler.schedule().oversized) == ["a0", "a1"] and scheduler.has_runnable_work
    assert scheduler.block_manager.num_free_blocks == num_blocks
    for seq in list(scheduler.waiting):
        seq.remote_prefill_params = None  # not joined any more
    assert scheduler.schedule().prefills


def test_what_is_cached_and_shared_counts_once() -> None:
    scheduler = make(num_blocks=6)
    scheduler.add(sequence(13, "known"))
    advance(scheduler, scheduler.schedule())
    scheduler.finish(scheduler.running[0])
    params = TO_METASERVER | {"list_id": "a", "num_children": 2}
    for name in "ab":  # five blocks each, and three of them in common
        prompt = [*range(12), *([ord(name)] * 6)]
        request = EngineRequest(name, prompt, sequence(1).request.sampling, kv_transfer_params=params)
        scheduler.add(Sequence(request, ord(name)))
    plan = scheduler.schedule()
    assert names(plan.oversized) == ["a", "b"]  # three and two times two: seven
    for seq in list(scheduler.waiting):
        scheduler.finish(seq)
    for name in "ab":
        prompt = [*range(12), ord(name)]
        request = EngineRequest(name, prompt, sequence(1).request.sampling, kv_transfer_params=params)
        scheduler.add(Sequence(request, ord(name)))
    plan = scheduler.schedule()
    assert not plan.oversized and names(plan.covered_pulls) == ["a", "b"]  # three, and one each: five
    scheduler.block_manager.check_conservation()


class Dropping(PushingTransfer):
    def drop(self, params: dict[str, Any]) -> None:
        self.dropped.append(params["request_id"])


def listed(prompts: list[list[int]]) -> list[EngineRequest]:
    params = TO_METASERVER | {"list_id": "l", "num_children": len(prompts)}
    return [
        ask(str(index), prompt, greedy(4), kv_transfer_params=params | {"request_id": f"r{index}"})
        for index, prompt in enumerate(prompts)
    ]


def test_a_list_too_large_for_the_pool_is_the_clients_fault(tiny: LoadedModel) -> None:
    transfer = PushingTransfer()
    harness = CoreHarness(tiny, kv_transfer=transfer, num_blocks=8)
    harness.run(*listed([random_prompt(70, seed) for seed in range(2)]))
    for name in "01":
        error = harness.last(name).error
        assert error is not None and error.status == 400 and "send fewer prompts" in error.message
    assert not transfer.landings
    harness.assert_idle()


def test_a_list_too_large_is_computed_here_where_that_is_the_policy(tiny: LoadedModel) -> None:
    prompts = [random_prompt(70, seed) for seed in range(2)]
    alone = CoreHarness(tiny)
    alone.run(*(ask(str(index), prompt, greedy(4)) for index, prompt in enumerate(prompts)))
    transfer = Dropping()
    harness = CoreHarness(tiny, kv_transfer=transfer, num_blocks=8, kv_load_failure_policy="recompute")
    for request in listed(prompts):
        harness.core.add(request)
    until_computed(harness)
    assert [harness.token_ids(name) for name in "01"] == [alone.token_ids(name) for name in "01"]
    assert transfer.dropped == ["r0", "r1"] and not transfer.landings  # the prefiller is told to do nothing
    harness.assert_idle()
