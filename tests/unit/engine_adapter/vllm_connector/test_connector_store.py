"""The class with a prefix store, as each vLLM sees it, over real sidecars that share a directory."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_adapter.vllm_connector.errors import ConnectorStartError
from tests.unit.engine_adapter.vllm_connector import fake_vllm
from tests.unit.engine_adapter.vllm_connector.fake_vllm import VERSIONS, Role, connector_under, request
from tests.unit.engine_adapter.vllm_connector.test_connector import Half, eventually, vllm_config

RECOMPUTING = [version for version in VERSIONS if version >= (0, 13)]


@contextmanager
def halves(directory: Path, version: tuple[int, int], *engine_ids: str) -> Iterator[list[Half]]:
    with connector_under(version) as module:
        made: list[Half] = []
        try:
            store = {"dir": str(directory / "kv")}
            for engine_id in engine_ids:  # one by one: what was made is closed also where the next can't be
                half = Half(module, version, engine_id, "kv_producer", store=store)
                made.append(half)
            yield made
        finally:
            for half in made:
                half.close()


def save(half: Half, block_ids: list[int], directory: Path, **more: Any) -> None:
    """A request that ends with its prefill; returns when its blocks are kept, and reported as sent, once."""
    before = len(files(directory))
    finished = request("done", None, 16 * len(block_ids) + 1, "FINISHED_LENGTH_CAPPED")
    vars(finished).update(more)
    assert half.finish(finished, block_ids) == (True, None)
    assert half.until(lambda done: done[0] == {"done"})
    assert eventually(lambda: len(files(directory)) == before + len(block_ids))
    assert half.step()[0] in (set(), None)


def files(directory: Path) -> list[Path]:
    return [path for path in (directory / "kv").glob("*/*/*") if path.is_file()]


def load(half: Half, block_ids: list[int], **more: Any) -> int:
    """Have a prompt of so many whole blocks loaded; how many tokens the store promised."""
    asked = request("r", None, 16 * len(block_ids) + 1)
    vars(asked).update(more)
    found: list[Any] = []

    def promised() -> bool:
        found.append(half.scheduler.get_num_new_matched_tokens(asked, 0))
        return found[-1][0] is not None

    assert eventually(promised)
    num_tokens, loads = found[-1]
    assert loads == (num_tokens > 0)
    blocks = SimpleNamespace(get_block_ids=lambda: ([*block_ids, 0],))
    half.scheduler.update_state_after_alloc(asked, blocks, num_tokens)
    if num_tokens:
        assert half.until(lambda done: done[1] == {asked.request_id})
        assert half.step()[1] in (set(), None)
    return int(num_tokens)


def same(here: Half, block_ids: list[int], there: Half, others: list[int]) -> bool:
    return all(
        torch.equal(here.kv[layer][block], there.kv[layer][other])
        for layer in here.kv
        for block, other in zip(block_ids, others, strict=True)
    )


@pytest.mark.parametrize("version", RECOMPUTING, ids=lambda version: ".".join(map(str, version)))
def test_a_second_prefiller_loads_what_the_first_computed(version: tuple[int, int], tmp_path: Path) -> None:
    with halves(tmp_path, version, "p1", "p2") as (first, second):
        save(first, [3, 1, 2], tmp_path)
        assert load(second, [5, 6, 7]) == 48
        assert same(second, [5, 6, 7], first, [3, 1, 2]) and not second.invalid_blocks

        # Its last block is torn: the rest stays loaded, and only that one is computed.
        torn = max(files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
        for path in files(tmp_path):
            path.write_bytes(path.read_bytes()[:-1] if path == torn else path.read_bytes())
        second.kv["layers.0"].zero_()
        assert load(second, [4, 5, 6], request_id="again") == 48
        assert 6 in second.invalid_blocks
        whole = [block for block in (4, 5, 6) if block not in second.invalid_blocks]
        assert same(second, whole, first, [3, 1, 2][: len(whole)])


def test_other_requests_do_not_find_them(tmp_path: Path) -> None:
    with halves(tmp_path, (0, 32), "p1") as (half,):
        save(half, [3, 1], tmp_path, cache_salt="one")
        assert load(half, [5, 6]) == 0
        assert load(half, [5, 6], request_id="r2", cache_salt="two") == 0


def test_a_hand_off_and_a_save_are_reported_as_one(tmp_path: Path) -> None:
    with halves(tmp_path, (0, 32), "p1") as (half,):
        finished = request("r", {"do_remote_decode": True}, 40, "FINISHED_LENGTH_CAPPED")
        delayed, params = half.finish(finished, [3, 1, 2])
        assert delayed and params
        assert half.until(lambda done: len(files(tmp_path)) == 2)
        assert not any(half.step()[0] for _ in range(20))  # the lease is still out
        transfer_id = params["baton"]["transfer_id"]
        half.scheduler._scheduler._links[0].revoke(transfer_id)
        assert half.until(lambda done: done[0] == {"r"})
        assert not any(half.step()[0] for _ in range(20))


def test_a_sidecar_that_dies_is_a_miss_and_frees_what_was_held(tmp_path: Path) -> None:
    with halves(tmp_path, (0, 32), "p1") as (half,):
        os.kill(half.worker._own.pid, signal.SIGSTOP)
        finished = request("r", None, 33, "FINISHED_LENGTH_CAPPED")
        assert half.finish(finished, [3, 1]) == (True, None)
        assert not half.step()[0]
        os.kill(half.worker._own.pid, signal.SIGKILL)
        assert half.until(lambda done: done[0] == {"r"})
        half.step()
        assert eventually(lambda: (half.step(), half.scheduler._scheduler._links[0].has_store)[1])
        assert load(half, [5, 6]) == 0


def test_what_the_store_needs_of_vllm_is_checked_at_start(tmp_path: Path) -> None:
    store = {"dir": str(tmp_path)}
    with connector_under((0, 11)) as module, pytest.raises(ValueError, match=r"take 0\.13 or later"):
        module.BatonConnector(vllm_config("e", "kv_both", store=store), Role.WORKER)
    with connector_under((0, 32)) as module:
        config = vllm_config("e", "kv_both", store=store)
        config.kv_transfer_config.kv_load_failure_policy = "fail"
        with pytest.raises(ValueError, match='"kv_load_failure_policy": "recompute" beside kv_role'):
            module.BatonConnector(config, Role.WORKER, fake_vllm.caches())
        config.kv_transfer_config.kv_load_failure_policy = "recompute"
        config.parallel_config.decode_context_parallel_size = 2
        with pytest.raises(ValueError, match="decode_context_parallel_size"):
            module.BatonConnector(config, Role.WORKER, fake_vllm.caches())
        config.parallel_config.decode_context_parallel_size = 1
        caches = fake_vllm.caches()
        caches.kv_cache_groups[0].kv_cache_spec = type("SlidingWindowSpec", (), {"block_size": 16})()
        with pytest.raises(ValueError, match="SlidingWindowSpec"):
            module.BatonConnector(config, Role.WORKER, caches)
    assert issubclass(ConnectorStartError, ValueError)


def test_another_config_of_the_same_weights_shares_nothing() -> None:
    with connector_under((0, 32)) as module:
        names = []
        for rope in (1, 2):
            config = vllm_config("e", "kv_both")
            config.model_config.hf_config = SimpleNamespace(to_dict=lambda rope=rope: {"rope": rope})
            names += [module.compat.computation(config)] * 2
        config.model_config.quantization = "fp8"
        names.append(module.compat.computation(config))
    assert len(set(names)) == 3
