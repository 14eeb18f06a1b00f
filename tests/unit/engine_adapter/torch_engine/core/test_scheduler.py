"""Plans of the scheduler, without a model: `advance` plays the engine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_adapter.torch_engine.block_manager import BlockManager
from engine_adapter.torch_engine.scheduler import Scheduler, StepPlan
from engine_adapter.torch_engine.sequence import (
    LEGAL_TRANSITIONS,
    EngineRequest,
    SamplingParams,
    Sequence,
    SequenceState,
)

SIZE = 4


def make(num_blocks: int = 32, *, max_num_seqs: int = 8, budget: int = 64, alignment: int = 1) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, SIZE),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        prefill_alignment=alignment,
    )


_ORDER = iter(range(10**9))


def sequence(num_tokens: int, request_id: str = "", first_token: int = 0, **fields: Any) -> Sequence:
    order = next(_ORDER)
    prompt = list(range(first_token, first_token + num_tokens))
    sampling = SamplingParams(max_tokens=100, prompt_logprobs=fields.pop("prompt_logprobs", None))
    return Sequence(EngineRequest(request_id or str(order), prompt, sampling, **fields), order)


def advance(scheduler: Scheduler, plan: StepPlan) -> None:
    """Compute what was planned; a sampled token is 7."""
    for chunk in plan.prefills:
        scheduler.computed(chunk.sequence, chunk.end)
    for seq in plan.decodes:
        if seq.samples_next:
            seq.token_ids.append(7)
        scheduler.computed(seq, seq.num_computed_tokens + 1)


def chunks(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request_id, chunk.start, chunk.end) for chunk in plan.prefills]


def test_a_prompt_is_prefilled_but_for_its_last_token_which_is_decoded_in_the_same_step() -> None:
    scheduler = make()
    scheduler.add(sequence(10, "a"))
    plan = scheduler.schedule()
    assert chunks(plan) == [("a", 0, 9)]
    assert [seq.request_id for seq in plan.decodes] == ["a"]


@pytest.mark.parametrize("num_tokens", [1, SIZE, SIZE + 1])
def test_blocks_are_held_for_every_known_token(num_tokens: int) -> None:
    scheduler = make()
    seq = sequence(num_tokens)
    scheduler.add(seq)
    plan = scheduler.schedule()
    assert len(seq.block_ids) == -(-num_tokens // SIZE)
    assert bool(plan.prefills) == (num_tokens > 1)
    advance(scheduler, plan)
    advance(scheduler, scheduler.schedule())
    assert len(seq.block_ids) == -(-(num_tokens + 1) // SIZE)


def test_prompts_are_chunked_to_the_budget_at_aligned_borders() -> None:
    scheduler = make(budget=10, alignment=4)
    scheduler.add(sequence(22, "a"))
    seen = []
    for _ in range(3):
        plan = scheduler.schedule()
        seen += chunks(plan)
        advance(scheduler, plan)
    assert seen == [("a", 0, 8), ("a", 8, 16), ("a", 16, 21)]


def test_a_budget_smaller_than_the_alignment_still_advances() -> None:
    scheduler = make(budget=3, alignment=16)
    scheduler.add(sequence(8, "a"))
    plan = scheduler.schedule()
    assert chunks(plan) == [("a", 0, 3)]
    assert plan.decodes == []


def test_decodes_come_before_prefills_in_the_budget() -> None:
    scheduler = make(budget=5)
    scheduler.add(sequence(4, "a"))
    advance(scheduler, scheduler.schedule())
    scheduler.add(sequence(20, "b", first_token=50))
    plan = scheduler.schedule()
    assert [seq.request_id for seq in plan.decodes] == ["a"]
    assert chunks(plan) == [("b", 0, 4)]


def test_first_come_first_served_but_priority_first() -> None:
    scheduler = make(max_num_seqs=2)
    for name, priority in (("a", 0), ("b", 0), ("c", -1)):
        scheduler.add(sequence(3, name, priority=priority))
    scheduler.schedule()
    assert [seq.request_id for seq in scheduler.running] == ["c", "a"]
    assert [seq.request_id for seq in scheduler.waiting] == ["b"]


def test_nobody_overtakes_a_head_that_does_not_fit() -> None:
    scheduler = make(num_blocks=6)
    scheduler.add(sequence(8, "a"))
    advance(scheduler, scheduler.schedule())
    scheduler.add(sequence(20, "b", first_token=50))
    scheduler.add(sequence(1, "c"))
    scheduler.schedule()
    assert [seq.request_id for seq in scheduler.waiting] == ["b", "c"]


def test_the_youngest_is_preempted_when_the_pool_is_full_and_comes_back() -> None:
    scheduler = make(num_blocks=5)
    old, young = sequence(8, "old"), sequence(4, "young", first_token=50)
    scheduler.add(old)
    scheduler.add(young)
    preempted = []
    for _ in range(12):
        plan = scheduler.schedule()
        preempted += plan.preempted
        advance(scheduler, plan)
        scheduler.block_manager.check_conservation()
    assert preempted[0] is young and old not in preempted
    scheduler.finish(old)
    num_known = len(young.token_ids)
    plan = scheduler.schedule()
    assert young.state is SequenceState.RUNNING
    for _ in range(num_known + 2):
        advance(scheduler, plan)
        plan = scheduler.schedule()
    assert len(young.token_ids) > num_known


def test_a_preempted_sequence_replays_its_generated_tokens_without_sampling_them_again() -> None:
    scheduler = make()
    seq = sequence(3, "a")
    scheduler.add(seq)
    for _ in range(4):
        advance(scheduler, scheduler.schedule())
    before = list(seq.token_ids)
    scheduler._preempt(seq, StepPlan())
    plan = scheduler.schedule()
    assert chunks(plan) == [("a", 0, 2)]
    for num_known in range(3, len(before)):
        assert not seq.samples_next
        advance(scheduler, plan)
        assert seq.num_computed_tokens == num_known
        plan = scheduler.schedule()
    assert seq.token_ids == before
    assert plan.decodes == [seq]
    assert seq.samples_next


def test_a_cached_prefix_is_not_computed_again_but_the_last_token_always_is() -> None:
    scheduler = make()
    first = sequence(2 * SIZE + 1, "a")
    scheduler.add(first)
    advance(scheduler, scheduler.schedule())
    scheduler.finish(first)
    same, shorter = sequence(2 * SIZE + 1, "b"), sequence(2 * SIZE, "c")
    scheduler.add(same)
    scheduler.add(shorter)
    plan = scheduler.schedule()
    assert same.num_cached_tokens == 2 * SIZE
    assert shorter.num_cached_tokens == SIZE
    assert chunks(plan) == [("c", SIZE, 2 * SIZE - 1)]
    assert plan.decodes == [same, shorter]
    assert same.block_ids[0] == shorter.block_ids[0]


def test_prompt_logprobs_need_every_position() -> None:
    scheduler = make()
    for name in "ab":
        seq = sequence(3 * SIZE, name, prompt_logprobs=0)
        scheduler.add(seq)
        plan = scheduler.schedule()
        assert chunks(plan) == [(name, 0, 3 * SIZE - 1)]
        advance(scheduler, plan)
        scheduler.finish(seq)


REMOTE = {"do_remote_prefill": True}


def test_remote_prefill_waits_for_its_pull_then_decodes_the_last_token() -> None:
    scheduler = make()
    seq = sequence(10, "a", kv_transfer_params=REMOTE)
    scheduler.add(seq)
    plan = scheduler.schedule()
    assert plan.pulls == [seq] and not plan.prefills and not plan.decodes
    assert seq.state is SequenceState.WAITING_FOR_REMOTE_KV
    assert scheduler.schedule().is_empty and not scheduler.has_runnable_work
    scheduler.pull_succeeded(seq)
    assert (seq.num_computed_tokens, seq.num_external_tokens) == (9, 9)
    plan = scheduler.schedule()
    assert plan.decodes == [seq] and not plan.prefills


def test_only_what_is_not_cached_is_pulled() -> None:
    scheduler = make()
    local = sequence(SIZE + 1, "local")
    scheduler.add(local)
    advance(scheduler, scheduler.schedule())
    seq = sequence(10, "a", kv_transfer_params=REMOTE)
    scheduler.add(seq)
    assert scheduler.schedule().pulls == [seq]
    assert seq.num_computed_tokens == SIZE
    scheduler.pull_succeeded(seq)
    assert seq.num_external_tokens == 9 - SIZE


@pytest.mark.parametrize("num_tokens", [1, SIZE + 1])
def test_a_prompt_that_is_cached_whole_needs_no_pull(num_tokens: int) -> None:
    scheduler = make()
    local = sequence(SIZE + 1, "local")
    scheduler.add(local)
    advance(scheduler, scheduler.schedule())
    seq = sequence(num_tokens, "a", kv_transfer_params=REMOTE)
    scheduler.add(seq)
    plan = scheduler.schedule()
    assert plan.covered_pulls == [seq] and not plan.pulls
    assert seq in plan.decodes


def test_a_pull_counts_as_a_running_sequence() -> None:
    scheduler = make(max_num_seqs=1)
    scheduler.add(sequence(10, "a", kv_transfer_params=REMOTE))
    scheduler.add(sequence(10, "b"))
    scheduler.schedule()
    assert [seq.request_id for seq in scheduler.waiting] == ["b"]


def test_a_failed_pull_is_recomputed_from_the_queue() -> None:
    scheduler = make()
    seq = sequence(10, "a", kv_transfer_params=dict(REMOTE))
    scheduler.add(seq)
    scheduler.schedule()
    scheduler.pull_failed_recompute(seq)
    plan = scheduler.schedule()
    assert chunks(plan) == [("a", 0, 9)] and not plan.pulls


def test_an_offer_keeps_the_blocks_of_the_prefilled_tokens_only() -> None:
    scheduler = make(num_blocks=8)
    seq = sequence(2 * SIZE + 1, "a", kv_transfer_params={"do_remote_decode": True})
    scheduler.add(seq)
    advance(scheduler, scheduler.schedule())
    scheduler.offer(seq)
    assert scheduler.num_blocks_held_by_offers == 2
    assert scheduler.block_manager.num_free_blocks == 6
    scheduler.finish(seq)
    assert scheduler.block_manager.num_free_blocks == 8
    assert not scheduler.offered


def test_a_queue_that_waits_for_offered_blocks_is_no_work() -> None:
    scheduler = make(num_blocks=4)
    seq = sequence(2 * SIZE + 1, "a")
    scheduler.add(seq)
    advance(scheduler, scheduler.schedule())
    scheduler.offer(seq)
    scheduler.add(sequence(4 * SIZE, "b", first_token=50))
    assert scheduler.has_runnable_work
    assert scheduler.schedule().is_empty
    assert not scheduler.has_runnable_work
    scheduler.finish(seq)
    assert not scheduler.schedule().is_empty


def test_every_transition_is_in_the_table() -> None:
    for before in SequenceState:
        for after in SequenceState:
            seq = sequence(2)
            seq.state = before
            if after in LEGAL_TRANSITIONS[before]:
                seq.move_to(after)
                assert seq.state is after
            else:
                with pytest.raises(AssertionError, match="can't become"):
                    seq.move_to(after)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=8),
    num_blocks=st.integers(10, 20),
    budget=st.integers(1, 30),
    num_outputs=st.integers(1, 12),
)
def test_everybody_finishes_and_every_block_comes_back(
    lengths: list[int], num_blocks: int, budget: int, num_outputs: int
) -> None:
    scheduler = make(num_blocks, budget=budget, alignment=4)
    for index, length in enumerate(lengths):
        scheduler.add(sequence(length, f"s{index}", first_token=index % 2))
    num_finished = 0
    for _ in range(5000):
        plan = scheduler.schedule()
        num_tokens = sum(chunk.end - chunk.start for chunk in plan.prefills) + len(plan.decodes)
        assert num_tokens <= budget
        advance(scheduler, plan)
        scheduler.block_manager.check_conservation()
        for seq in list(scheduler.running):
            if seq.num_output_tokens >= num_outputs:
                scheduler.finish(seq)
                num_finished += 1
        if not scheduler.has_runnable_work:
            break
    assert num_finished == len(lengths)
    assert scheduler.block_manager.num_free_blocks == num_blocks
