"""The engine with its thread: what other threads see of it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_adapter.torch_engine.config import EngineConfig, EngineStartError
from engine_adapter.torch_engine.engine import Engine
from engine_adapter.torch_engine.sequence import EngineRequestError, RequestOutput, SamplingParams
from tests.unit.engine_adapter.torch_engine.core.harness import CopyingTransfer, ask, greedy, random_prompt

TIMEOUT_S = 60


class RunningEngine:
    def __init__(self, model: Path, **config: Any) -> None:
        self.engine = Engine(
            EngineConfig(model=model, dtype="float32", **{"num_blocks": 64, "num_threads": 1, **config})
        )
        self.outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        self.engine.start(self._put)

    def _put(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.outputs.put(output)

    def wait_for(self, *request_ids: str) -> dict[str, RequestOutput]:
        """Last outputs of these requests."""
        last: dict[str, RequestOutput] = {}
        while set(request_ids) - last.keys():
            output = self.outputs.get(timeout=TIMEOUT_S)
            if output.finish_reason is not None:
                last[output.request_id] = output
        return last

    def settle(self) -> None:
        """Return when the engine thread has done everything that was asked before."""
        done = threading.Event()
        with self.engine._changed:
            self.engine._commands.append(done.set)
            self.engine._changed.notify()
        assert done.wait(TIMEOUT_S)


@pytest.fixture
def running(model_dir: Callable[..., Path]) -> Iterator[RunningEngine]:
    running = RunningEngine(model_dir())
    yield running
    running.engine.shutdown()


def test_requests_of_many_threads_are_all_answered(running: RunningEngine) -> None:
    names = [f"r{index}" for index in range(12)]
    threads = [
        threading.Thread(target=running.engine.submit, args=(ask(name, random_prompt(20, index), greedy(4)),))
        for index, name in enumerate(names)
    ]
    for thread in threads:
        thread.start()
    last = running.wait_for(*names)
    for thread in threads:
        thread.join()
    assert {output.finish_reason for output in last.values()} == {"length"}
    running.settle()
    stats = running.engine.stats()
    assert stats.alive
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_for_remote_kv) == (0, 0, 0)
    assert stats.num_free_blocks == stats.num_blocks == 64
    assert stats.kv_cache_usage == 0
    assert stats.num_generation_tokens == 48
    assert stats.num_prompt_tokens_local_compute == 240


def test_an_abort_silences_a_request(running: RunningEngine) -> None:
    running.engine.submit(ask("long", random_prompt(20), greedy(900)))
    running.outputs.get(timeout=TIMEOUT_S)
    running.engine.abort("long")
    running.engine.abort("never heard of")
    running.settle()
    while not running.outputs.empty():
        assert running.outputs.get().finish_reason is None
    running.settle()
    running.settle()
    stats = running.engine.stats()
    assert (stats.num_running, stats.num_free_blocks) == (0, 64)


@pytest.mark.parametrize(
    ("prompt", "sampling", "says"),
    [
        ([], greedy(), "empty"),
        ([5] * 1024, greedy(), "max_model_len"),
        ([5, 5000], greedy(), "token ids must be"),
        ([-1], greedy(), "token ids must be"),
        ([5], greedy(logit_bias={99999: 1.0}), "token ids must be"),
        ([5], greedy(stop_token_ids=(99999,)), "token ids must be"),
        ([5], SamplingParams(max_tokens=0), "max_tokens"),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    running: RunningEngine, prompt: list[int], sampling: SamplingParams, says: str
) -> None:
    with pytest.raises(EngineRequestError, match=says) as caught:
        running.engine.submit(ask("bad", prompt, sampling))
    assert caught.value.status == 400
    assert running.engine.stats().num_waiting == 0


def test_the_longest_prompt_runs(running: RunningEngine) -> None:
    assert running.engine.max_model_len == 1024
    running.engine.submit(ask("long", random_prompt(1023), greedy(5)))
    assert running.wait_for("long")["long"].finish_reason == "length"


def test_kv_events_wake_the_engine(model_dir: Callable[..., Path]) -> None:
    running = RunningEngine.__new__(RunningEngine)
    transfer = CopyingTransfer()
    running.engine = Engine(EngineConfig(model=model_dir(), dtype="float32", num_blocks=64, num_threads=1), transfer)
    running.outputs = queue.SimpleQueue()
    running.engine.start(running._put)
    running.engine.submit(ask("p", random_prompt(40), greedy(1), kv_transfer_params={"do_remote_decode": True}))
    params = running.wait_for("p")["p"].kv_transfer_params
    assert params is not None
    running.settle()
    assert running.engine.stats().num_blocks_held_by_offers == 3
    transfer.revoke("p")
    running.engine.wake()
    running.settle()
    running.settle()
    assert running.engine.stats().num_free_blocks == 64
    running.engine.shutdown()
    assert transfer.closed


def test_a_thread_that_died_is_told(running: RunningEngine, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> list[RequestOutput]:
        raise RuntimeError("made to fail outside of any request")

    running.engine.core.step = fail  # type: ignore[method-assign]
    running.engine.wake()
    assert running.engine._thread is not None
    running.engine._thread.join(TIMEOUT_S)
    assert not running.engine.stats().alive
    assert "event=engine_thread_died" in caplog.text


def test_an_idle_engine_takes_no_steps(running: RunningEngine) -> None:
    running.engine.submit(ask("a", random_prompt(5), greedy(1)))
    running.wait_for("a")
    running.settle()
    steps = []
    step = running.engine.core.step
    running.engine.core.step = lambda: steps.append(1) or step()  # type: ignore[method-assign,func-returns-value]
    running.settle()
    running.settle()
    assert len(steps) <= 2


def test_shutdown_is_idempotent_and_refuses_later_requests(model_dir: Callable[..., Path]) -> None:
    running = RunningEngine(model_dir())
    running.engine.shutdown()
    running.engine.shutdown()
    assert not running.engine.stats().alive
    with pytest.raises(EngineRequestError) as caught:
        running.engine.submit(ask("late", [5]))
    assert caught.value.status == 503


def test_bfloat16_runs(model_dir: Callable[..., Path]) -> None:
    engine = Engine(EngineConfig(model=model_dir(), dtype="bfloat16", num_blocks=16, num_threads=1))
    assert engine.kv_layout().dtype == "bfloat16"
    outputs: queue.SimpleQueue[list[RequestOutput]] = queue.SimpleQueue()
    engine.start(outputs.put)
    engine.submit(ask("a", random_prompt(40), greedy(3)))
    token_ids = [
        token_id for _ in range(3) for output in outputs.get(timeout=TIMEOUT_S) for token_id in output.token_ids
    ]
    engine.shutdown()
    assert len(token_ids) == 3


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"max_model_len": 100_000}, "--max-model-len 100000 exceeds the model's 4096"),
        ({"max_model_len": 2048, "num_blocks": 4}, "exceeds the KV pool's 64 tokens"),
        ({"num_blocks": None, "kv_pool_bytes": 100}, "holds no block"),
        ({"num_blocks": 1 << 40}, "does not fit into"),
        ({"device": "cuda"}, "CUDA"),
    ],
)
def test_what_cannot_start_says_why_and_what_to_do(
    model_dir: Callable[..., Path], config: dict[str, Any], says: str
) -> None:
    with pytest.raises(EngineStartError, match=says) as caught:
        Engine(EngineConfig(model=model_dir(), **{"num_blocks": 16, "num_threads": 1, **config}))
    assert caught.value.remedy
