"""An engine core without a thread, which remembers the bits it computed, and a KV transfer without a sidecar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engine_adapter.device import open_device
from engine_adapter.torch_engine.block_manager import BlockManager
from engine_adapter.torch_engine.engine_core import EngineCore
from engine_adapter.torch_engine.kv_cache import KvCache
from engine_adapter.torch_engine.kv_rows import WriteRows
from engine_adapter.torch_engine.kv_transfer import KvEvents, KvTransferUnavailable, PullResult
from engine_adapter.torch_engine.model_loader import LoadedModel
from engine_adapter.torch_engine.model_runner import ModelRunner
from engine_adapter.torch_engine.scheduler import Scheduler
from engine_adapter.torch_engine.sequence import EngineRequest, EngineRequestError, RequestOutput, SamplingParams
from engine_adapter.torch_engine.sequence import Sequence as EngineSequence

CPU = open_device("cpu")
BLOCK_SIZE = 16


def random_prompt(num_tokens: int, seed: int = 0, vocab_size: int = 1000) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 10_000 + num_tokens)
    return torch.randint(3, vocab_size, (num_tokens,), generator=generator).tolist()  # type: ignore[no-any-return]


def greedy(max_tokens: int = 8, **params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **params)


def ask(request_id: str, prompt: list[int], sampling: SamplingParams | None = None, **fields: Any) -> EngineRequest:
    return EngineRequest(request_id, prompt, sampling or greedy(), **fields)


class RecordingRunner(ModelRunner):
    """Keeps the logits of every decoded position, by request id; the last computation of a position wins."""

    def __init__(self, model: LoadedModel, kv_cache: KvCache) -> None:
        super().__init__(model, kv_cache, CPU)
        self.logits: dict[tuple[str, int], torch.Tensor] = {}
        self.decode_sizes: list[int] = []
        self.fails_on: set[str] = set()

    def prefill(self, chunk: Any, on_logits: Any = None, on_written: Any = None) -> None:
        if chunk.sequence.request_id in self.fails_on:
            raise RuntimeError("made to fail in prefill")
        super().prefill(chunk, on_logits, on_written)

    def decode(self, seqs: Sequence[EngineSequence]) -> torch.Tensor:
        self.decode_sizes.append(len(seqs))
        logits = super().decode(seqs)
        for seq, row in zip(seqs, logits, strict=True):
            self.logits[seq.request_id, seq.num_computed_tokens] = row.clone()
        return logits


class RecordingScheduler(Scheduler):
    """Keeps a request's keys and values when it ends."""

    def __init__(self, harness: CoreHarness, blocks: BlockManager, **options: Any) -> None:
        super().__init__(blocks, **options)
        self._harness = harness

    def finish(self, seq: EngineSequence) -> None:
        if seq.block_ids:
            self._harness.kv_of[seq.request_id] = self._harness.read_kv(seq)
        super().finish(seq)


class CoreHarness:
    """One engine core over a pool of its own. `kv_of` has each finished request's keys and values, token by token."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        num_blocks: int = 256,
        max_num_batched_tokens: int = 2048,
        max_num_seqs: int = 64,
        enable_prefix_caching: bool = True,
        max_model_len: int = 2048,
        block_size: int = BLOCK_SIZE,
        **core_options: Any,
    ) -> None:
        self.transfer: Any = core_options.get("kv_transfer")
        self.kv_cache = KvCache(model.shape, num_blocks, block_size, CPU)
        self.runner = RecordingRunner(model, self.kv_cache)
        blocks = BlockManager(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self.scheduler = RecordingScheduler(
            self,
            blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            prefill_alignment=CPU.max_prefill_tile,
        )
        self.core = EngineCore(
            self.runner,
            self.scheduler,
            max_model_len=max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            device=CPU.torch_device,
            **core_options,
        )
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.kv_of: dict[str, torch.Tensor] = {}
        self.num_steps = 0

    def step(self) -> list[RequestOutput]:
        outputs = self.core.step()
        self.num_steps += 1
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)
        return outputs

    def read_kv(self, seq: EngineSequence) -> torch.Tensor:
        """Keys and values of the sequence's computed tokens."""
        size = self.kv_cache.block_size
        positions = range(min(seq.num_computed_tokens, len(seq.block_ids) * size))
        rows = WriteRows(
            [seq.block_ids[position // size] for position in positions],
            [position % size for position in positions],
            self.kv_cache.shape.num_layers,
            size,
            CPU.torch_device,
        )
        return torch.stack([self.kv_cache.token_rows[layer_rows] for layer_rows in rows.by_layer_and_kv])

    def run(self, *requests: EngineRequest, max_steps: int = 2000) -> None:
        """Add the requests and step until nothing is left to do."""
        for request in requests:
            self.core.add(request)
        for _ in range(max_steps):
            self.step()
            if not self.core.has_runnable_work:
                return
        raise AssertionError(f"still busy after {max_steps} steps: {self.scheduler.running} {self.scheduler.waiting}")

    def token_ids(self, request_id: str) -> list[int]:
        return [token_id for output in self.outputs[request_id] for token_id in output.token_ids]

    def last(self, request_id: str) -> RequestOutput:
        return self.outputs[request_id][-1]

    def assert_idle(self) -> None:
        """Nothing is queued, running or held, and the pool is wholly free."""
        scheduler = self.scheduler
        assert not (scheduler.running or scheduler.waiting or scheduler.pulling or scheduler.offered)
        scheduler.block_manager.check_conservation()
        assert scheduler.block_manager.num_free_blocks == scheduler.block_manager.num_blocks
        assert not self.core._asks


class CopyingTransfer:
    """One engine's KV transfer, without a sidecar: a pull copies blocks out of the pool of `peer`'s harness.

    A pull ends when `finish_pulls` is called; the producer's offer ends with it, or when it is dropped or revoked.
    """

    def __init__(self, peer: CopyingTransfer | None = None) -> None:
        self.peer = peer or self
        self.harness: CoreHarness | None = None
        self.offers: dict[str, list[int]] = {}
        self.ended_offers: list[str] = []
        self.open_pulls: dict[str, tuple[dict[str, Any], list[int], int]] = {}
        self.results: list[PullResult] = []
        self.dropped: list[str] = []
        self.abandoned: list[str] = []
        self.refuses_offers = False
        self.closed = False

    def check(self, params: dict[str, Any]) -> None:
        if "remote_request_id" not in params:
            raise EngineRequestError("kv_transfer_params.remote_request_id is missing")

    def start_pull(self, request_id: str, params: dict[str, Any], local_block_ids: list[int], first_block: int) -> None:
        assert request_id not in self.open_pulls
        self.open_pulls[request_id] = (params, local_block_ids, first_block)

    def offer(self, request_id: str, block_ids: list[int], num_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
        if self.refuses_offers:
            raise KvTransferUnavailable("the sidecar is gone")
        self.offers[request_id] = list(block_ids)
        return {
            "do_remote_prefill": True,
            "remote_request_id": request_id,
            "remote_num_tokens": num_tokens,
            "remote_prefill_cached_tokens": num_cached_tokens,
        }

    def drop(self, params: dict[str, Any]) -> None:
        self.dropped.append(params["remote_request_id"])
        self.peer.revoke(params["remote_request_id"])

    def revoke(self, request_id: str) -> None:
        if self.offers.pop(request_id, None) is not None:
            self.ended_offers.append(request_id)

    def abandon(self, request_id: str) -> None:
        self.abandoned.append(request_id)

    def finish_pulls(self, *, ok: bool = True, flip_byte: bool = False) -> None:
        """End all open pulls; `flip_byte` flips a bit of an exponent in the first block of each."""
        for request_id, (params, local_block_ids, first_block) in self.open_pulls.items():
            remote_request_id = params["remote_request_id"]
            if ok:
                self._copy(self.peer.offers[remote_request_id][first_block:], local_block_ids, flip_byte)
                self.peer.revoke(remote_request_id)
            self.results.append(PullResult(request_id, ok, "" if ok else "expired", num_blocks=len(local_block_ids)))
        self.open_pulls.clear()

    def _copy(self, source_ids: list[int], target_ids: list[int], flip_byte: bool) -> None:
        assert self.harness is not None and self.peer.harness is not None
        assert len(source_ids) == len(target_ids)
        source, target = (
            cache.block_rows.view(cache.num_blocks, -1) for cache in (self.peer.harness.kv_cache, self.harness.kv_cache)
        )
        target[target_ids] = source[source_ids]
        if flip_byte:
            target[target_ids[0]].view(torch.uint8)[3] ^= 0x40

    def poll(self) -> KvEvents:
        events = KvEvents(pulls=self.results, ended_offers=self.ended_offers)
        self.results, self.ended_offers = [], []
        return events

    def close(self) -> None:
        self.closed = True


def linked_pair(
    model: LoadedModel, producer_options: dict[str, Any] | None = None, **consumer_options: Any
) -> tuple[CoreHarness, CoreHarness]:
    """A producer and a consumer whose transfers are CopyingTransfers."""
    producer_end = CopyingTransfer()
    consumer_end = CopyingTransfer(peer=producer_end)
    producer = CoreHarness(model, kv_transfer=producer_end, **(producer_options or {}))
    consumer = CoreHarness(model, kv_transfer=consumer_end, **consumer_options)
    producer_end.harness, consumer_end.harness = producer, consumer
    return producer, consumer


def prefill_remotely(producer: CoreHarness, request_id: str, prompt: list[int]) -> dict[str, Any]:
    """The kv_transfer_params that the producer answers with."""
    sampling = greedy(1, min_tokens=1)
    producer.run(ask(request_id, prompt, sampling, kv_transfer_params={"do_remote_decode": True}))
    params = producer.last(request_id).kv_transfer_params
    assert params is not None
    return params
