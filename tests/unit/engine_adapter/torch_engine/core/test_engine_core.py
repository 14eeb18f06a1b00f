"""Stories of requests through the core, with a real model: every one ends with the pool wholly free."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine_adapter.torch_engine.kv_transfer import KvTransferUnavailable
from engine_adapter.torch_engine.model_loader import LoadedModel
from engine_adapter.torch_engine.sequence import SamplingParams, SequenceState
from tests.unit.engine_adapter.torch_engine.core.harness import (
    CopyingTransfer,
    CoreHarness,
    ask,
    greedy,
    linked_pair,
    prefill_remotely,
    random_prompt,
)

PROMPT = random_prompt(50)


def greedy_tokens(model: LoadedModel, prompt: list[int], num_tokens: int) -> list[int]:
    harness = CoreHarness(model)
    harness.run(ask("alone", prompt, greedy(num_tokens)))
    return harness.token_ids("alone")


def test_one_output_a_token_and_the_reason_on_the_last(tiny: LoadedModel) -> None:
    harness = CoreHarness(tiny)
    harness.run(ask("a", PROMPT, greedy(3)))
    assert [len(output.token_ids) for output in harness.outputs["a"]] == [1, 1, 1]
    assert [output.finish_reason for output in harness.outputs["a"]] == [None, None, "length"]
    assert harness.core.counters.num_generation_tokens == 3
    assert harness.core.counters.num_prompt_tokens_local_compute == 50
    harness.assert_idle()


def test_a_stop_token_ends_the_text_and_is_named(tiny: LoadedModel) -> None:
    tokens = greedy_tokens(tiny, PROMPT, 5)
    harness = CoreHarness(tiny)
    harness.run(ask("a", PROMPT, greedy(9, stop_token_ids=(tokens[2],))))
    assert harness.token_ids("a") == tokens[: tokens.index(tokens[2]) + 1]
    assert (harness.last("a").finish_reason, harness.last("a").stop_reason) == ("stop", tokens[2])


def test_eos_ends_the_text_unless_ignored(tiny: LoadedModel) -> None:
    tokens = greedy_tokens(tiny, PROMPT, 5)
    harness = CoreHarness(tiny)
    harness.core._eos_token_ids = frozenset({tokens[1]})
    harness.run(ask("a", PROMPT, SamplingParams(max_tokens=5, temperature=0)), ask("b", PROMPT, greedy(5)))
    assert harness.token_ids("a") == tokens[:2]
    assert (harness.last("a").finish_reason, harness.last("a").stop_reason) == ("stop", None)
    assert harness.token_ids("b") == tokens


def test_min_tokens_keeps_eos_and_stop_ids_from_being_sampled(tiny: LoadedModel) -> None:
    tokens = greedy_tokens(tiny, PROMPT, 5)
    harness = CoreHarness(tiny)
    harness.run(ask("a", PROMPT, greedy(9, min_tokens=3, stop_token_ids=(tokens[0], tokens[1]))))
    assert len(harness.token_ids("a")) >= 3
    assert not {tokens[0], tokens[1]} & set(harness.token_ids("a")[:3])


def test_max_model_len_bounds_prompt_and_text(tiny: LoadedModel) -> None:
    harness = CoreHarness(tiny, max_model_len=54)
    harness.run(ask("a", PROMPT, greedy(100)))
    assert len(harness.token_ids("a")) == 4
    assert harness.last("a").finish_reason == "length"
    harness.assert_idle()


def test_a_prompt_found_in_the_cache_is_counted_as_such(tiny: LoadedModel) -> None:
    harness = CoreHarness(tiny)
    harness.run(ask("a", PROMPT))
    harness.run(ask("b", PROMPT))
    assert harness.token_ids("a") == harness.token_ids("b")
    assert harness.last("b").num_cached_tokens == 48
    assert harness.core.counters.num_prompt_tokens_local_cache_hit == 48
    assert harness.core.counters.num_prompt_tokens_local_compute == 52


def test_logprobs_are_of_the_raw_logits(tiny: LoadedModel) -> None:
    harness = CoreHarness(tiny)
    harness.run(ask("a", PROMPT, greedy(2, logprobs=3, logit_bias={5: 100.0})))
    first = harness.outputs["a"][0].logprobs
    assert first is not None and harness.token_ids("a") == [5, 5]
    expected = harness.runner.logits["a", 49].log_softmax(-1)
    assert first[0].token_id == 5
    assert first[0].logprob == pytest.approx(expected[5].item())
    assert first[0].rank == int((expected >= expected[5]).sum())
    assert [token_id for token_id, _ in first[0].top] == expected.topk(3).indices.tolist()


@pytest.mark.parametrize("budget", [2048, 20])
def test_prompt_logprobs_come_once_and_cover_every_position(tiny: LoadedModel, budget: int) -> None:
    harness = CoreHarness(tiny, max_num_batched_tokens=budget)
    harness.run(ask("warm", PROMPT))
    harness.run(ask("a", PROMPT, greedy(2, prompt_logprobs=1)))
    first, second = harness.outputs["a"]
    assert second.prompt_logprobs is None and first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert [entry.token_id for entry in first.prompt_logprobs[1:] if entry] == PROMPT[1:]
    shorter = CoreHarness(tiny)
    shorter.run(ask("b", PROMPT[:30], greedy(1, logprobs=0)))
    expected = shorter.runner.logits["b", 29].log_softmax(-1)[PROMPT[30]].item()
    entry = first.prompt_logprobs[30]
    assert entry is not None and entry.logprob == pytest.approx(expected, abs=1e-4)
    assert len(entry.top) == 1


def test_prompt_logprobs_of_one_token(tiny: LoadedModel) -> None:
    harness = CoreHarness(tiny)
    harness.run(ask("a", [5], greedy(1, prompt_logprobs=0)))
    assert harness.last("a").prompt_logprobs == [None]


def test_a_failing_prefill_ends_its_request_only(tiny: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    harness = CoreHarness(tiny)
    harness.runner.fails_on.add("bad")
    harness.run(ask("good", PROMPT), ask("bad", PROMPT[:20]))
    error = harness.last("bad").error
    assert error is not None and error.status == 500
    assert harness.last("bad").finish_reason == "error"
    assert harness.token_ids("good") == greedy_tokens(tiny, PROMPT, 8)
    assert "event=step_failed request_ids=bad" in caplog.text
    harness.assert_idle()


def test_a_failing_decode_ends_its_batch_and_the_core_lives_on(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = CoreHarness(tiny)

    def fail(_: Any) -> torch.Tensor:
        raise RuntimeError("made to fail in decode")

    with monkeypatch.context() as patch:
        patch.setattr(harness.runner, "decode", fail)
        harness.run(ask("a", PROMPT), ask("b", PROMPT[:20]))
    assert [harness.last(name).finish_reason for name in "ab"] == ["error", "error"]
    harness.run(ask("c", PROMPT))
    assert harness.last("c").finish_reason == "length"
    harness.assert_idle()


def test_an_id_in_use_is_refused_and_the_first_goes_on(tiny: LoadedModel) -> None:
    harness = CoreHarness(tiny)
    harness.core.add(ask("a", PROMPT))
    harness.core.add(ask("a", PROMPT))
    outputs = harness.step()
    assert [output.finish_reason for output in outputs] == ["error", None]
    assert outputs[0].error is not None and outputs[0].error.status == 400


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_abort_waiting_prefilling_and_decoding(tiny: LoadedModel, num_steps: int) -> None:
    harness = CoreHarness(tiny, max_num_batched_tokens=20)
    harness.core.add(ask("a", random_prompt(100)))
    for _ in range(num_steps):
        harness.step()
    harness.core.abort("a")
    harness.core.abort("a")
    harness.core.abort("unknown")
    assert harness.step() == []
    harness.assert_idle()


def test_abort_between_preemption_and_return(tiny: LoadedModel) -> None:
    harness = CoreHarness(tiny, num_blocks=8)
    for name in "ab":
        harness.core.add(ask(name, random_prompt(40, ord(name)), greedy(60)))
    while not harness.scheduler.num_preemptions:
        harness.step()
    harness.core.abort("b")
    harness.run()
    assert len(harness.token_ids("a")) == 60
    harness.assert_idle()


# The hand-off, producer's side.


def test_an_offer_holds_the_blocks_until_it_ends(tiny: LoadedModel) -> None:
    producer, _ = linked_pair(tiny)
    params = prefill_remotely(producer, "p", PROMPT)
    assert params["remote_num_tokens"] == 50
    assert producer.last("p").finish_reason == "length"
    assert producer.transfer.offers["p"] == producer.scheduler.offered["p"].block_ids
    assert producer.scheduler.num_blocks_held_by_offers == 4
    producer.transfer.revoke("p")
    producer.step()
    producer.assert_idle()


@pytest.mark.parametrize(("length", "num_blocks"), [(1, 0), (2, 1), (16, 1), (17, 1), (18, 2), (32, 2)])
def test_an_offer_leaves_out_the_last_prompt_token(tiny: LoadedModel, length: int, num_blocks: int) -> None:
    producer, _ = linked_pair(tiny)
    prefill_remotely(producer, "p", random_prompt(length))
    assert len(producer.transfer.offers["p"]) == num_blocks


def test_an_offered_request_that_is_aborted_is_revoked(tiny: LoadedModel) -> None:
    producer, _ = linked_pair(tiny)
    prefill_remotely(producer, "p", PROMPT)
    producer.core.abort("p")
    assert producer.scheduler.num_blocks_held_by_offers == 4
    producer.step()
    producer.assert_idle()


def test_without_a_sidecar_the_answer_carries_no_parameters(tiny: LoadedModel) -> None:
    for transfer in (None, CopyingTransfer()):
        if transfer is not None:
            transfer.refuses_offers = True
        harness = CoreHarness(tiny, kv_transfer=transfer)
        harness.run(ask("p", PROMPT, greedy(1), kv_transfer_params={"do_remote_decode": True}))
        assert harness.last("p").finish_reason == "length"
        assert harness.last("p").kv_transfer_params is None
        harness.assert_idle()


def test_only_who_asked_gets_parameters(tiny: LoadedModel) -> None:
    producer, _ = linked_pair(tiny)
    producer.run(ask("p", PROMPT, greedy(1)))
    assert producer.last("p").kv_transfer_params is None


# The hand-off, consumer's side.


def start_pull(producer: CoreHarness, consumer: CoreHarness, prompt: list[int] = PROMPT, **fields: Any) -> None:
    params = prefill_remotely(producer, "p", prompt)
    consumer.core.add(ask("d", prompt, kv_transfer_params=params, **fields))
    consumer.step()


def test_a_pull_of_what_the_prefix_cache_lacks(tiny: LoadedModel) -> None:
    producer, consumer = linked_pair(tiny)
    consumer.run(ask("warm", PROMPT[:40]))
    start_pull(producer, consumer)
    _, block_ids, first_block = consumer.transfer.open_pulls["d"]
    assert (first_block, len(block_ids)) == (2, 2)
    consumer.transfer.finish_pulls()
    consumer.run()
    assert consumer.token_ids("d") == greedy_tokens(tiny, PROMPT, 8)
    assert consumer.last("d").num_cached_tokens == 49
    assert consumer.core.counters.num_prompt_tokens_external_kv_transfer == 17
    assert consumer.core.counters.num_prompt_tokens_local_cache_hit == 32
    consumer.assert_idle()


def test_pulled_blocks_are_found_by_the_next_prompt(tiny: LoadedModel) -> None:
    producer, consumer = linked_pair(tiny)
    start_pull(producer, consumer)
    consumer.transfer.finish_pulls()
    consumer.run()
    consumer.run(ask("again", PROMPT))
    assert consumer.last("again").num_cached_tokens == 48
    assert consumer.token_ids("again") == consumer.token_ids("d")


def test_what_is_cached_whole_is_not_pulled_and_its_lease_is_dropped(tiny: LoadedModel) -> None:
    producer, consumer = linked_pair(tiny)
    prompt = random_prompt(33)
    consumer.run(ask("warm", prompt))
    start_pull(producer, consumer, prompt)
    assert consumer.transfer.dropped == ["p"] and not consumer.transfer.open_pulls
    consumer.run()
    producer.step()
    producer.assert_idle()


def test_a_failed_pull_is_an_error_503_by_default(tiny: LoadedModel) -> None:
    producer, consumer = linked_pair(tiny)
    start_pull(producer, consumer)
    consumer.transfer.finish_pulls(ok=False)
    consumer.run()
    error = consumer.last("d").error
    assert error is not None
    assert (error.status, error.error_type) == (503, "kv_load_error")
    assert "expired" in error.message
    consumer.assert_idle()


def test_a_failed_pull_is_recomputed_where_the_policy_says_so(tiny: LoadedModel) -> None:
    producer, consumer = linked_pair(tiny, kv_load_failure_policy="recompute")
    start_pull(producer, consumer)
    consumer.transfer.finish_pulls(ok=False)
    consumer.run()
    assert consumer.token_ids("d") == greedy_tokens(tiny, PROMPT, 8)
    assert consumer.core.counters.num_prompt_tokens_local_compute == 50
    assert consumer.core.counters.num_prompt_tokens_external_kv_transfer == 0


def test_a_sidecar_that_is_gone_fails_the_pull(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    producer, consumer = linked_pair(tiny)

    def refuse(*_: Any) -> None:
        raise KvTransferUnavailable("the sidecar is gone")

    monkeypatch.setattr(consumer.transfer, "start_pull", refuse)
    start_pull(producer, consumer)
    assert consumer.last("d").error is not None
    consumer.assert_idle()


def test_without_a_connector_remote_kv_is_an_error(tiny: LoadedModel) -> None:
    harness = CoreHarness(tiny)
    harness.run(ask("d", PROMPT, kv_transfer_params={"do_remote_prefill": True}))
    error = harness.last("d").error
    assert error is not None and error.status == 503
    harness.assert_idle()


def test_aborted_while_pulling_keeps_the_blocks_until_the_pull_has_ended(tiny: LoadedModel) -> None:
    producer, consumer = linked_pair(tiny)
    start_pull(producer, consumer)
    consumer.core.abort("d")
    assert consumer.transfer.abandoned == ["d"]
    assert consumer.scheduler.pulling["d"].state is SequenceState.ABANDONED
    assert consumer.scheduler.num_waiting_for_remote_kv == 0
    assert consumer.scheduler.block_manager.num_free_blocks < 256
    consumer.transfer.finish_pulls(ok=False)
    assert consumer.step() == []
    consumer.assert_idle()


def test_aborted_before_its_pull_drops_the_lease(tiny: LoadedModel) -> None:
    producer, consumer = linked_pair(tiny, max_num_seqs=1)
    params = prefill_remotely(producer, "p", PROMPT)
    consumer.core.add(ask("first", PROMPT))
    consumer.step()
    consumer.core.add(ask("d", PROMPT, kv_transfer_params=params))
    consumer.step()
    consumer.core.abort("d")
    assert consumer.transfer.dropped == ["p"]
    producer.step()
    producer.assert_idle()


def test_release_only_drops_the_lease_and_generates_nothing(tiny: LoadedModel) -> None:
    producer, consumer = linked_pair(tiny)
    params = prefill_remotely(producer, "p", PROMPT)
    consumer.run(ask("d", PROMPT, kv_transfer_params={**params, "release_only": True}))
    assert consumer.token_ids("d") == []
    assert consumer.last("d").finish_reason == "stop"
    producer.step()
    producer.assert_idle()


def test_incomplete_parameters_are_refused(tiny: LoadedModel) -> None:
    _, consumer = linked_pair(tiny)
    consumer.run(ask("d", PROMPT, kv_transfer_params={"do_remote_prefill": True}))
    error = consumer.last("d").error
    assert error is not None and error.status == 400
    consumer.assert_idle()


def test_kv_of_another_prompt_is_refused_and_released(tiny: LoadedModel) -> None:
    producer, consumer = linked_pair(tiny)
    params = prefill_remotely(producer, "p", PROMPT)
    consumer.run(ask("d", PROMPT[:-1], kv_transfer_params=params))
    error = consumer.last("d").error
    assert error is not None and error.status == 400
    assert "remote_num_tokens" in error.message
    producer.step()
    producer.assert_idle()


def test_prompt_logprobs_with_remote_kv_are_computed_here(tiny: LoadedModel) -> None:
    producer, consumer = linked_pair(tiny)
    start_pull(producer, consumer, sampling=greedy(1, prompt_logprobs=0))
    consumer.run()
    assert consumer.transfer.dropped == ["p"]
    assert consumer.last("d").prompt_logprobs is not None
    assert consumer.core.counters.num_prompt_tokens_local_compute == 50


def test_preempted_after_its_pull_is_computed_here(tiny: LoadedModel) -> None:
    producer, consumer = linked_pair(tiny, num_blocks=8)
    consumer.core.add(ask("a", random_prompt(40, 1), greedy(60), arrival_time=-1))
    consumer.step()
    start_pull(producer, consumer, sampling=greedy(40))
    consumer.transfer.finish_pulls()
    consumer.run()
    assert consumer.scheduler.num_preemptions > 0
    assert consumer.token_ids("d") == greedy_tokens(tiny, PROMPT, 40)
    consumer.assert_idle()
