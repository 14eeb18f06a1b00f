"""Prompts pushed while they are computed, and decoders that wait for them: two cores, no sidecar."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from engine_adapter import mark_pace
from engine_adapter.torch_engine.kv_transfer import KvEvents, KvTransferUnavailable, PullResult
from engine_adapter.torch_engine.model_loader import LoadedModel
from engine_adapter.torch_engine.sequence import EngineRequestError
from sidecar.protocol import Ready
from tests.unit.engine_adapter.torch_engine.core.harness import (
    BLOCK_SIZE,
    CopyingTransfer,
    CoreHarness,
    ask,
    greedy,
    random_prompt,
)


class PushingTransfer(CopyingTransfer):
    """Remembers pushes and their marks; the test says how they end. A landing is filled by `fill`."""

    def __init__(self) -> None:
        super().__init__()
        self.pushes: dict[str, list[int]] = {}
        self.marks: dict[str, list[Ready]] = {}
        self.ended: list[tuple[str, str]] = []
        self.revoked: list[str] = []
        self.landings: dict[str, tuple[list[int], int]] = {}

    def check(self, params: dict[str, Any]) -> None:
        if "broken" in params:
            raise EngineRequestError("kv_transfer_params.broken")

    def land(
        self, request_id: str, params: dict[str, Any], local_block_ids: list[int], first_block: int, num_tokens: int
    ) -> None:
        self.landings[request_id] = (local_block_ids, first_block)

    def push(
        self, request_id: str, params: dict[str, Any], block_ids: list[int], num_tokens: int, ready: Ready
    ) -> None:
        if self.refuses_offers:
            raise KvTransferUnavailable("the sidecar is gone")
        self.pushes[request_id] = block_ids
        self.marks[request_id] = [ready]

    def mark_ready(self, request_id: str, ready: Ready) -> None:
        self.marks[request_id].append(ready)

    def revoke(self, request_id: str) -> None:
        self.revoked.append(request_id)
        super().revoke(request_id)

    def poll(self) -> KvEvents:
        events = super().poll()
        ended, self.ended = self.ended, []
        return KvEvents(events.pulls, events.ended_offers, ended)


def landing_for(prompt: list[int], **changes: Any) -> dict[str, Any]:
    num_blocks = -(-(len(prompt) - 1) // BLOCK_SIZE)
    baton = {"landing_id": "l", "num_tokens": len(prompt), "num_blocks": num_blocks} | changes
    return {"do_remote_decode": True, "do_remote_prefill": False, "baton": baton}


TO_METASERVER = {"do_remote_prefill": True, "metaserver": "http://p/v1/metaserver", "request_id": "r"}


@pytest.fixture
def transfer() -> PushingTransfer:
    return PushingTransfer()


@pytest.fixture
def prefiller(tiny: LoadedModel, transfer: PushingTransfer, monkeypatch: pytest.MonkeyPatch) -> CoreHarness:
    monkeypatch.setattr(mark_pace, "MIN_MARK_BYTES", 1)
    harness = CoreHarness(tiny, kv_transfer=transfer, max_num_batched_tokens=100)
    transfer.harness = harness
    return harness


def pushed(harness: CoreHarness, name: str, prompt: list[int]) -> None:
    harness.core.add(ask(name, prompt, greedy(8), kv_transfer_params=landing_for(prompt)))


def until_computed(harness: CoreHarness) -> None:
    for _ in range(50):
        harness.step()
        if not harness.core.has_runnable_work:
            return
    raise AssertionError("still computing")


def end(harness: CoreHarness, transfer: PushingTransfer, name: str, outcome: str) -> None:
    transfer.ended.append((name, outcome))
    harness.step()
    harness.step()


def test_marks_rise_over_chunks_and_layers_to_the_whole_prompt(
    prefiller: CoreHarness, transfer: PushingTransfer
) -> None:
    prompt = random_prompt(300)
    pushed(prefiller, "a", prompt)
    until_computed(prefiller)
    marks, num_layers = transfer.marks["a"], prefiller.runner.num_layers
    assert marks[0] == Ready(0, 0, 0) and marks[-1].end_block == 19 and marks[-1].num_layers == num_layers
    for before, after in itertools.pairwise(marks[1:]):
        same_strip = (after.first_block, after.end_block) == (before.first_block, before.end_block)
        assert after.num_layers == before.num_layers + 1 if same_strip else after.first_block == before.end_block
    assert {mark.num_layers for mark in marks[1:]} == set(range(1, num_layers + 1))
    assert transfer.pushes["a"] == prefiller.scheduler.offered["a"].block_ids


def test_the_answer_waits_for_the_decoder_and_the_blocks_with_it(
    prefiller: CoreHarness, transfer: PushingTransfer
) -> None:
    pushed(prefiller, "a", random_prompt(50))
    until_computed(prefiller)
    assert "a" not in prefiller.outputs and prefiller.scheduler.num_blocks_held_by_offers == 4
    end(prefiller, transfer, "a", "consumed")
    assert prefiller.last("a").finish_reason == "length" and len(prefiller.token_ids("a")) == 1
    assert prefiller.last("a").kv_transfer_params is None
    prefiller.assert_idle()


@pytest.mark.parametrize("outcome", ["revoked", "expired", "sidecar_lost"])
@pytest.mark.parametrize("computed", [True, False])
def test_a_push_that_failed_is_an_error_that_is_retried(
    prefiller: CoreHarness, transfer: PushingTransfer, outcome: str, computed: bool
) -> None:
    pushed(prefiller, "a", random_prompt(300))
    prefiller.step()
    if computed:
        until_computed(prefiller)
    end(prefiller, transfer, "a", outcome)
    error = prefiller.last("a").error
    assert error is not None and error.status == 503 and outcome in error.message
    assert error.error_type == "kv_load_error"
    prefiller.assert_idle()


def test_a_decoder_that_has_given_up_stops_the_prefill(prefiller: CoreHarness, transfer: PushingTransfer) -> None:
    pushed(prefiller, "a", random_prompt(300))
    prefiller.step()
    end(prefiller, transfer, "a", "dropped")
    assert prefiller.last("a").finish_reason == "stop" and prefiller.token_ids("a") == []
    prefiller.assert_idle()


def test_consumed_before_the_last_token_is_computed(prefiller: CoreHarness, transfer: PushingTransfer) -> None:
    pushed(prefiller, "a", random_prompt(101))  # the budget of one step, and no token more
    prefiller.step()
    assert prefiller.core.has_runnable_work
    end(prefiller, transfer, "a", "consumed")
    assert prefiller.last("a").finish_reason == "length"
    prefiller.assert_idle()


@pytest.mark.parametrize("computed", [True, False])
def test_aborted_its_blocks_are_held_until_the_push_has_ended(
    prefiller: CoreHarness, transfer: PushingTransfer, computed: bool
) -> None:
    pushed(prefiller, "a", random_prompt(300))
    prefiller.step()
    if computed:
        until_computed(prefiller)
    prefiller.core.abort("a")
    prefiller.step()
    assert transfer.revoked == ["a"] and prefiller.scheduler.num_blocks_held_by_offers > 0
    end(prefiller, transfer, "a", "revoked")
    assert "a" not in prefiller.outputs
    prefiller.assert_idle()


def test_a_forward_that_fails_holds_the_blocks_too(prefiller: CoreHarness, transfer: PushingTransfer) -> None:
    prefiller.runner.fails_on.add("a")
    pushed(prefiller, "a", random_prompt(50))
    prefiller.step()
    error = prefiller.last("a").error
    assert error is not None and error.status == 500 and transfer.revoked == ["a"]
    assert prefiller.scheduler.num_blocks_held_by_offers > 0
    end(prefiller, transfer, "a", "revoked")
    prefiller.assert_idle()


def test_no_sidecar_is_an_error_that_is_retried(prefiller: CoreHarness, transfer: PushingTransfer) -> None:
    transfer.refuses_offers = True
    pushed(prefiller, "a", random_prompt(50))
    prefiller.step()
    error = prefiller.last("a").error
    assert error is not None and error.status == 503
    prefiller.assert_idle()


def test_a_decoder_that_wants_nothing_costs_nothing(prefiller: CoreHarness, transfer: PushingTransfer) -> None:
    prompt = random_prompt(50)
    prefiller.run(ask("a", prompt, greedy(1), kv_transfer_params=landing_for(prompt, landing_id="")))
    assert prefiller.last("a").finish_reason == "stop" and not transfer.pushes
    prefiller.assert_idle()


@pytest.mark.parametrize(("key", "value"), [("num_tokens", 49), ("num_blocks", 7)])
def test_another_prompt_or_block_size_is_refused(prefiller: CoreHarness, key: str, value: int) -> None:
    prompt = random_prompt(50)
    prefiller.run(ask("a", prompt, greedy(1), kv_transfer_params=landing_for(prompt, **{key: value})))
    error = prefiller.last("a").error
    assert error is not None and error.status == 400 and key in error.message


def test_what_is_cached_is_ready_at_once(prefiller: CoreHarness, transfer: PushingTransfer) -> None:
    prompt = random_prompt(97)
    for name in ("a", "b"):
        pushed(prefiller, name, prompt)
        until_computed(prefiller)
        end(prefiller, transfer, name, "consumed")
    assert transfer.marks["b"] == [Ready(6, 6, 0)] and transfer.marks["a"][0] == Ready(0, 0, 0)


def test_a_push_is_not_preempted(tiny: LoadedModel, transfer: PushingTransfer) -> None:
    harness = CoreHarness(tiny, kv_transfer=transfer, num_blocks=8, max_num_batched_tokens=20)
    transfer.harness = harness
    harness.core.add(ask("old", random_prompt(30), greedy(60)))
    for _ in range(4):
        harness.step()
    pushed(harness, "a", random_prompt(60, seed=1))
    for _ in range(200):
        harness.step()
        if "a" in transfer.pushes:
            transfer.ended.append(("a", "consumed")) if "a" in harness.scheduler.offered else None
        if not harness.core.has_runnable_work:
            break
    assert harness.last("a").finish_reason == "length" and harness.last("old").finish_reason == "length"
    assert transfer.marks["a"][0].first_block == 0 and len(transfer.pushes) == 1
    harness.assert_idle()


def test_a_landing_nobody_fills_is_an_error_that_is_retried(tiny: LoadedModel) -> None:
    transfer = PushingTransfer()
    harness = CoreHarness(tiny, kv_transfer=transfer)
    harness.core.add(ask("a", random_prompt(70), kv_transfer_params=dict(TO_METASERVER)))
    harness.step()
    local, first_block = transfer.landings["a"]
    assert (len(local), first_block) == (5, 0) and harness.core.waits_for_kv_events
    transfer.results.append(PullResult("a", False, "timeout", "nobody filled it"))
    harness.step()
    error = harness.last("a").error
    assert error is not None and error.status == 503 and "nobody filled it" in error.message
    harness.assert_idle()


def test_a_landing_that_failed_is_computed_here_where_that_is_the_policy(tiny: LoadedModel) -> None:
    prompt = random_prompt(70)
    alone = CoreHarness(tiny)
    alone.run(ask("x", prompt))
    transfer = PushingTransfer()
    harness = CoreHarness(tiny, kv_transfer=transfer, kv_load_failure_policy="recompute")
    harness.core.add(ask("a", prompt, kv_transfer_params=dict(TO_METASERVER)))
    harness.step()
    transfer.results.append(PullResult("a", False, "metaserver", "answered 502"))
    until_computed(harness)
    assert harness.token_ids("a") == alone.token_ids("x")
    harness.assert_idle()


def test_only_missing_blocks_are_landed(tiny: LoadedModel) -> None:
    prompt = random_prompt(70)
    transfer = PushingTransfer()
    harness = CoreHarness(tiny, kv_transfer=transfer)
    harness.run(ask("before", prompt[:33]))
    harness.core.add(ask("a", prompt, kv_transfer_params=dict(TO_METASERVER)))
    harness.step()
    assert transfer.landings["a"][1] == 2 and len(transfer.landings["a"][0]) == 3
    harness.core.abort("a")
    assert transfer.abandoned == ["a"]
    transfer.results.append(PullResult("a", False, "abandoned"))
    harness.step()
    harness.assert_idle()
