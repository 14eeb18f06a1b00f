"""The core with a prefix store: what one engine computed another one finds, and nothing about it can go wrong aloud."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine_adapter.torch_engine.model_loader import LoadedModel
from engine_adapter.torch_engine.prefix_store import LoadResult, StoreEvents
from tests.unit.engine_adapter.torch_engine.core.harness import CoreHarness, ask, greedy, random_prompt

PROMPT = random_prompt(100)
FULL_BLOCKS = (100 - 1) // 16


class Shelf:
    """A PrefixStore over a dict, which several engines may share. Loads and saves end by `finish`, or at once."""

    def __init__(self, blocks: dict[bytes, torch.Tensor] | None = None) -> None:
        self.blocks = {} if blocks is None else blocks
        self.harness: Any = None
        self.available = True
        self.at_once = True
        self.open_loads: dict[str, tuple[list[bytes], list[int]]] = {}
        self.open_saves: dict[str, tuple[list[bytes], list[int]]] = {}
        self.abandoned: list[str] = []
        self.num_loads = self.num_saved = 0
        self.most_blocks = 10**9
        self._ended: tuple[list[LoadResult], list[str]] = ([], [])

    def load(self, request_id: str, block_hashes: list[bytes], block_ids: list[int]) -> None:
        assert len(block_hashes) == len(block_ids) > 0
        self.num_loads += 1
        self.open_loads[request_id] = (block_hashes, block_ids)

    def abandon(self, request_id: str) -> None:
        self.abandoned.append(request_id)

    def save(self, save_id: str, block_hashes: list[bytes], block_ids: list[int]) -> None:
        assert len(block_hashes) == len(block_ids) > 0
        self.num_saved += len(block_ids)
        self.open_saves[save_id] = (block_hashes, block_ids)

    def finish(self, reason: str = "") -> None:
        """End everything that is open; a load that has a reason brings nothing."""
        pool = self.harness.kv_cache.block_rows.view(self.harness.kv_cache.num_blocks, -1)
        for save_id, (block_hashes, block_ids) in self.open_saves.items():
            for block_hash, block_id in zip(block_hashes, block_ids, strict=True):
                self.blocks[block_hash] = pool[block_id].clone()
            self._ended[1].append(save_id)
        for request_id, (block_hashes, block_ids) in self.open_loads.items():
            num_blocks = 0
            for block_hash, block_id in list(zip(block_hashes, block_ids, strict=True))[: self.most_blocks]:
                if block_hash not in self.blocks or reason:
                    pool[block_id] = 99.0  # what a load that failed leaves is anything
                    break
                pool[block_id] = self.blocks[block_hash]
                num_blocks += 1
            self._ended[0].append(LoadResult(request_id, num_blocks, reason))
        self.open_loads, self.open_saves = {}, {}

    def poll(self) -> StoreEvents:
        if self.at_once:
            self.finish()
        events = StoreEvents(*self._ended)
        self._ended = ([], [])
        return events


def engine_with(model: LoadedModel, shelf: Shelf, **options: Any) -> CoreHarness:
    harness = CoreHarness(model, **options)
    harness.core.store_use.store = shelf
    shelf.harness = harness
    return harness


def run(harness: CoreHarness, *requests: Any) -> None:
    """Also while loads are awaited."""
    for request in requests:
        harness.core.add(request)
    for _ in range(500):
        harness.step()
        if not (harness.core.has_runnable_work or harness.core.waits_for_kv_events):
            return
    raise AssertionError("still busy")


@pytest.fixture
def expected(tiny: LoadedModel) -> list[int]:
    harness = CoreHarness(tiny)
    harness.run(ask("alone", PROMPT))
    return harness.token_ids("alone")


def test_what_one_engine_computed_another_loads(tiny: LoadedModel, expected: list[int]) -> None:
    first = Shelf()
    writer = engine_with(tiny, first)
    run(writer, ask("a", PROMPT))
    assert first.num_saved == len(first.blocks) == FULL_BLOCKS
    writer.assert_idle()
    second = Shelf(first.blocks)
    reader = engine_with(tiny, second)
    run(reader, ask("b", PROMPT))
    assert reader.token_ids("b") == writer.token_ids("a") == expected
    assert reader.last("b").num_cached_tokens == FULL_BLOCKS * 16
    assert reader.core.counters.num_prompt_tokens_external_kv_transfer == FULL_BLOCKS * 16
    assert reader.core.counters.num_prompt_tokens_local_compute == 100 - FULL_BLOCKS * 16
    assert second.num_saved == 0, "what came from the store is not given back to it"
    assert torch.equal(writer.kv_of["a"], reader.kv_of["b"])
    reader.assert_idle()


def test_the_engines_own_cache_comes_first(tiny: LoadedModel, expected: list[int]) -> None:
    shelf = Shelf()
    harness = engine_with(tiny, shelf)
    run(harness, ask("a", PROMPT), ask("other", random_prompt(40, seed=9)))
    num_loads = shelf.num_loads
    run(harness, ask("b", PROMPT))
    assert shelf.num_loads == num_loads, "nothing was missing"
    assert harness.token_ids("b") == expected
    run(harness, ask("c", PROMPT[:64] + random_prompt(60, seed=3)))
    assert shelf.num_loads == num_loads + 1
    assert harness.last("c").num_cached_tokens == 64
    harness.assert_idle()


@pytest.mark.parametrize("num_there", [0, 1, 3, FULL_BLOCKS])
def test_a_part_is_loaded_and_the_rest_computed_and_saved(
    tiny: LoadedModel, expected: list[int], num_there: int
) -> None:
    first = Shelf()
    run(engine_with(tiny, first), ask("a", PROMPT))
    second = Shelf(dict(list(first.blocks.items())[:num_there]))
    reader = engine_with(tiny, second)
    run(reader, ask("b", PROMPT))
    assert reader.token_ids("b") == expected
    assert reader.last("b").num_cached_tokens == num_there * 16
    assert second.num_saved == FULL_BLOCKS - num_there
    reader.assert_idle()


@pytest.mark.parametrize("reason", ["timeout", "sidecar_lost", "missing"])
def test_a_load_that_fails_is_computed(tiny: LoadedModel, expected: list[int], reason: str) -> None:
    first = Shelf()
    run(engine_with(tiny, first), ask("a", PROMPT))
    second = Shelf(first.blocks)
    second.at_once = False
    reader = engine_with(tiny, second)
    reader.core.add(ask("b", PROMPT))
    for _ in range(5):
        reader.step()
    assert not reader.core.has_runnable_work and reader.core.waits_for_kv_events
    second.finish(reason)
    second.at_once = True
    run(reader)
    assert reader.token_ids("b") == expected
    assert reader.last("b").num_cached_tokens == 0
    assert second.num_loads == 1, "the store is asked once"
    reader.assert_idle()


def test_others_go_on_while_one_waits(tiny: LoadedModel) -> None:
    shelf = Shelf()
    harness = engine_with(tiny, shelf)
    run(harness, ask("warm", random_prompt(20)))
    shelf.at_once = False
    harness.core.add(ask("waits", PROMPT))
    short = random_prompt(10, seed=5)
    harness.core.add(ask("goes", short))
    for _ in range(20):
        harness.step()
    assert harness.last("goes").finish_reason == "length"
    assert "waits" not in harness.outputs
    shelf.at_once = True
    run(harness)
    harness.assert_idle()


def test_an_aborted_load_keeps_its_blocks_until_it_has_ended(tiny: LoadedModel) -> None:
    shelf = Shelf()
    shelf.at_once = False
    harness = engine_with(tiny, shelf)
    harness.core.add(ask("a", PROMPT))
    harness.step()
    harness.core.abort("a")
    assert shelf.abandoned == ["a"]
    harness.step()
    assert harness.scheduler.block_manager.num_free_blocks < harness.kv_cache.num_blocks
    shelf.finish("abandoned")
    harness.step()
    assert "a" not in harness.outputs
    harness.assert_idle()


def test_blocks_are_held_until_they_were_read(tiny: LoadedModel, expected: list[int]) -> None:
    """However small the pool is, nobody overwrites a block that is being saved."""
    shelf = Shelf()
    harness = engine_with(tiny, shelf, num_blocks=10)
    run(harness, ask("warm", random_prompt(10)))
    shelf.at_once = False
    harness.core.add(ask("a", PROMPT))
    harness.step()
    shelf.finish()
    for _ in range(30):
        harness.step()
    assert harness.last("a").finish_reason == "length"
    assert shelf.open_saves
    harness.core.add(ask("b", random_prompt(100, seed=8)))
    for _ in range(5):
        harness.step()
    assert "b" not in harness.outputs, "there is no room while the blocks are read"
    shelf.at_once = True
    run(harness)
    assert harness.last("b").finish_reason == "length"
    other = engine_with(tiny, Shelf(shelf.blocks))
    run(other, ask("c", PROMPT))
    assert other.token_ids("c") == expected
    harness.assert_idle()


def test_long_prompts_are_saved_chunk_by_chunk(tiny: LoadedModel) -> None:
    shelf = Shelf()
    harness = engine_with(tiny, shelf, max_num_batched_tokens=64)
    run(harness, ask("a", random_prompt(400)))
    assert shelf.num_saved == len(shelf.blocks) == 399 // 16
    harness.assert_idle()


@pytest.mark.parametrize(
    "request_of",
    [
        lambda: ask("a", random_prompt(16)),
        lambda: ask("a", PROMPT, greedy(4, prompt_logprobs=1)),
    ],
    ids=["short", "logprobs of the prompt"],
)
def test_who_does_not_ask_the_store(tiny: LoadedModel, request_of: Any) -> None:
    shelf = Shelf()
    harness = engine_with(tiny, shelf)
    run(harness, request_of())
    assert shelf.num_loads == 0
    harness.assert_idle()


def test_a_store_that_is_away_is_not_asked(tiny: LoadedModel, expected: list[int]) -> None:
    shelf = Shelf()
    shelf.available = False
    harness = engine_with(tiny, shelf)
    run(harness, ask("a", PROMPT))
    assert (shelf.num_loads, shelf.num_saved) == (0, 0)
    assert harness.token_ids("a") == expected
    shelf.available = True
    run(harness, ask("b", random_prompt(100, seed=4)))
    assert (shelf.num_loads, shelf.num_saved) == (1, FULL_BLOCKS)


def test_preempted_prompts_come_right(tiny: LoadedModel) -> None:
    """A pool too small for everybody, a store behind it: the same tokens as with neither."""
    prompts = [random_prompt(60 + index, seed=index) for index in range(6)]
    alone = CoreHarness(tiny)
    alone.run(*(ask(str(index), prompt, greedy(40)) for index, prompt in enumerate(prompts)))
    shelf = Shelf()
    harness = engine_with(tiny, shelf, num_blocks=24)
    run(harness, *(ask(str(index), prompt, greedy(40)) for index, prompt in enumerate(prompts)))
    assert harness.scheduler.num_preemptions > 0
    for index in range(6):
        assert harness.token_ids(str(index)) == alone.token_ids(str(index))
    harness.assert_idle()
