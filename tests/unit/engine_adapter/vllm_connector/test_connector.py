"""The class as each vLLM sees it: it can be built, registers, hands on and loads, over real sidecars."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_adapter.vllm_connector.settings import ConnectorStartError
from tests.unit.engine_adapter.vllm_connector import fake_vllm
from tests.unit.engine_adapter.vllm_connector.fake_vllm import VERSIONS, Role, connector_under, request

NUM_BLOCKS = 8


def vllm_config(engine_id: str, kv_role: str, memory: str = "auto", **extra: Any) -> Any:
    transport = "auto" if memory == "in_process" else "shm"
    config = fake_vllm.config(kv_role, transport=transport, memory=memory, log_level="WARNING", **extra)
    config.kv_transfer_config.engine_id = f"{engine_id}-{time.monotonic_ns()}"
    config.model_config = SimpleNamespace(
        model="tiny",
        revision=None,
        hf_config=SimpleNamespace(to_dict=lambda: {"hidden_size": 64}),
        dtype=torch.float32,
        get_head_size=lambda: 8,
        get_num_kv_heads=lambda parallel: 2,
        get_total_num_kv_heads=lambda: 2,
    )
    return config


class Half:
    """One vLLM without a model: its scheduler's connector and its worker's."""

    def __init__(self, module: Any, version: tuple[int, int], engine_id: str, kv_role: str, **extra: Any) -> None:
        config = vllm_config(engine_id, kv_role, **extra)
        rest = (fake_vllm.caches(),) if version >= (0, 13) else ()
        self.version = version
        self.invalid_blocks: set[int] = set()
        shape = (NUM_BLOCKS, 2, 16, 16)
        self.kv = {f"layers.{n}": tensor.view(shape) for n, tensor in enumerate(torch.randn(2, NUM_BLOCKS * 512))}
        self.worker = module.BatonConnector(config, Role.WORKER, *rest)
        self.scheduler: Any = None
        try:
            self.worker.register_kv_caches(self.kv)
            self.scheduler = module.BatonConnector(config, Role.SCHEDULER, *rest)
            assert eventually(lambda: self.scheduler._scheduler._links[0].client is not None)
        except BaseException:
            self.close()
            raise

    def step(self, scheduled: Any = None) -> tuple[set[str], set[str], bool]:
        """One engine step: sent, received, and whether a load failed."""
        self.worker.bind_connector_metadata(self.scheduler.build_connector_meta(scheduled))
        self.worker.start_load_kv(None)
        self.worker.wait_for_save()
        if self.version >= (0, 32):
            results = self.worker.get_transfer_results(set())
            self.invalid_blocks |= self.worker.get_block_ids_with_load_errors()
            done = results.finished_sending, results.finished_recving, bool(results.failed_recving)
        else:
            sent, received = self.worker.get_finished(set())
            invalid = self.worker.get_block_ids_with_load_errors() if self.version >= (0, 13) else set()
            self.invalid_blocks |= invalid
            done = sent, received, bool(invalid)
        self.scheduler.update_connector_output(SimpleNamespace(finished_sending=done[0], finished_recving=done[1]))
        return done

    def until(self, seen: Callable[[tuple[set[str], set[str], bool]], Any]) -> bool:
        return eventually(lambda: seen(self.step()))

    def finish(self, asked: Any, block_ids: list[int]) -> Any:
        if self.version >= (0, 13):
            return self.scheduler.request_finished_all_groups(asked, (block_ids,))
        return self.scheduler.request_finished(asked, block_ids)

    def close(self) -> None:
        if self.scheduler is not None:
            self.scheduler.shutdown()
        self.worker.shutdown()


def eventually(condition: Callable[[], Any], within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: ".".join(map(str, version)))
def test_kv_goes_from_one_half_to_the_other(version: tuple[int, int]) -> None:
    with connector_under(version) as module:
        prefiller = Half(module, version, "p", "kv_producer")
        decoder = Half(module, version, "d", "kv_consumer")
        try:
            delayed, params = prefiller.finish(
                request("r", {"do_remote_decode": True}, status="FINISHED_LENGTH_CAPPED"), [1, 2, 3]
            )
            assert delayed
            asked = request("r", params)
            assert decoder.scheduler.get_num_new_matched_tokens(asked, 0) == (40, True)
            blocks = SimpleNamespace(get_block_ids=lambda: ([4, 6, 7],))
            decoder.scheduler.update_state_after_alloc(asked, blocks, 40)
            assert decoder.until(lambda done: done[1] == {"r"})
            for layer, tensor in decoder.kv.items():
                for here, there in ((4, 1), (6, 2), (7, 3)):
                    assert torch.equal(tensor[here], prefiller.kv[layer][there])
            assert prefiller.until(lambda done: done[0] == {"r"})

            # The lease is used up: a second reader fails cleanly, or ends an engine that knows no failed load.
            again = request("again", params)
            decoder.scheduler.update_state_after_alloc(again, blocks, 40)
            if version < (0, 13):
                with pytest.raises(RuntimeError, match="knows no failed KV load"):
                    decoder.until(lambda done: done[1])
            else:
                assert decoder.until(lambda done: done[1] == {"again"} and done[2])
        finally:
            decoder.close()
            prefiller.close()


def scheduled(version: tuple[int, int], num_computed: int, num_tokens: int, block_ids: list[int]) -> Any:
    """A step's output for the one request r, new or going on, as the version tells it."""
    new = SimpleNamespace(req_id="r", block_ids=(block_ids,), num_computed_tokens=0)
    going_on = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[])
    if num_computed:
        going_on = SimpleNamespace(req_ids=["r"], new_block_ids=[(block_ids,)], num_computed_tokens=[num_computed])
    if version >= (0, 13):
        going_on.resumed_req_ids = set()
    else:
        going_on.resumed_from_preemption = [False] * len(going_on.req_ids)
    return SimpleNamespace(
        scheduled_new_reqs=[] if num_computed else [new], scheduled_cached_reqs=going_on,
        num_scheduled_tokens={"r": num_tokens},
    )  # fmt: skip


@pytest.mark.parametrize("version", [(0, 11), (0, 32)], ids=["0.11", "0.32"])
@pytest.mark.parametrize(
    ("prefill", "decode"), [("staging", "staging"), ("staging", "auto"), ("auto", "staging"), ("auto", "in_process")]
)
def test_kv_goes_through_staging_buffers(version: tuple[int, int], prefill: str, decode: str) -> None:
    with connector_under(version) as module:
        prefiller = Half(module, version, "p", "kv_producer", memory=prefill)
        decoder = Half(module, version, "d", "kv_consumer", memory=decode)
        try:
            asked = request("r", {"do_remote_decode": True}, status="FINISHED_LENGTH_CAPPED")
            prefiller.scheduler.update_state_after_alloc(asked, SimpleNamespace(get_block_ids=lambda: ([1, 2],)), 0)
            prefiller.step(scheduled(version, 0, 32, [1, 2]))
            prefiller.step(scheduled(version, 32, 8, [3]))
            before = {layer: tensor.clone() for layer, tensor in prefiller.kv.items()}
            delayed, params = prefiller.finish(asked, [1, 2, 3])
            assert delayed
            if prefill == "staging":
                assert params["remote_block_ids"][0] == [0, 1, 2]  # slots
                for tensor in prefiller.kv.values():
                    tensor.zero_()  # what is read are the copies
            wants = request("r", params)
            blocks = SimpleNamespace(get_block_ids=lambda: ([4, 6, 7],))
            decoder.scheduler.update_state_after_alloc(wants, blocks, 40)
            assert decoder.until(lambda done: done[1] == {"r"})
            for layer, tensor in decoder.kv.items():
                for here, there in ((4, 1), (6, 2), (7, 3)):
                    assert torch.equal(tensor[here], before[layer][there])
            assert prefiller.until(lambda done: done[0] == {"r"})
            staged = prefiller.scheduler._scheduler._staged
            assert not staged._staged and not staged._tables.blocks and not staged._requests
        finally:
            decoder.close()
            prefiller.close()


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: ".".join(map(str, version)))
def test_every_hook_that_a_version_calls_is_there(version: tuple[int, int]) -> None:
    with connector_under(version) as module:
        rest = (fake_vllm.caches(),) if version >= (0, 13) else ()
        connector = module.BatonConnector(fake_vllm.config(), Role.WORKER, *rest)
        connector.wait_for_layer_load("layers.0")
        connector.save_kv_layer("layers.0", None, None)
        connector.start_load_kv(None, scheduler_output=None, request_ids=[])
        assert connector.get_finished(set()) == (None, None)  # before any KV cache is registered
        connector.shutdown()


def test_the_plugin_registers_once() -> None:
    plugin = importlib.import_module("engine_adapter.vllm_connector.plugin")
    plugin.register()
    plugin.register()
    assert plugin.KVConnectorFactory._registry["BatonConnector"][0] == "engine_adapter.vllm_connector"


def test_what_cannot_work_is_refused_at_start() -> None:
    connector = importlib.import_module("engine_adapter.vllm_connector.connector")
    piped = fake_vllm.config()
    piped.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(ConnectorStartError, match="--tensor-parallel-size"):
        connector.BatonConnector(piped, Role.WORKER, fake_vllm.caches())
    with pytest.raises(ConnectorStartError, match="--disable-hybrid-kv-cache-manager"):
        connector.BatonConnector(fake_vllm.config(), Role.WORKER, fake_vllm.caches(num_groups=2))
    with pytest.raises(ConnectorStartError, match='give kv_role "kv_producer"'):
        connector.BatonConnector(fake_vllm.config("kv_consumer", role="prefill"), Role.WORKER, fake_vllm.caches())


def test_a_sidecar_that_is_not_there_is_named(tmp_path: Any) -> None:
    connector = importlib.import_module("engine_adapter.vllm_connector.connector")
    config = vllm_config("x", "kv_both")
    config.kv_transfer_config.kv_connector_extra_config = {"sidecar": str(tmp_path / "none.sock")}
    worker = connector.BatonConnector(config, Role.WORKER, fake_vllm.caches())
    with pytest.raises(ConnectorStartError, match=r"none\.sock .* start pd-sidecar there"):
        worker.register_kv_caches({"layers.0": torch.randn(NUM_BLOCKS, 2, 16, 16)})
