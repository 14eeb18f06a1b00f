"""The engine: one thread that schedules, computes and answers; every public method may be called from any thread."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from engine_adapter.device import Device, DeviceUnavailable, open_device, usable_cores
from engine_adapter.torch_engine.block_manager import BlockManager
from engine_adapter.torch_engine.config import EngineConfig, EngineStartError
from engine_adapter.torch_engine.engine_core import EngineCore
from engine_adapter.torch_engine.kv_cache import KvCache, fit_model_len, num_pool_blocks
from engine_adapter.torch_engine.kv_transfer import KvTransfer
from engine_adapter.torch_engine.model_loader import LoadedModel, load_model
from engine_adapter.torch_engine.model_runner import ModelRunner
from engine_adapter.torch_engine.prefix_store import PrefixStore
from engine_adapter.torch_engine.scheduler import Scheduler
from engine_adapter.torch_engine.sequence import EngineRequest, EngineRequestError, RequestOutput
from sidecar.protocol import KvLayout

logger = logging.getLogger(__name__)

_KV_POLL_S = 0.5
"""How long to trust that `wake` is called for every KV event, while some are expected."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics and tests. Counters only grow."""

    alive: bool
    num_running: int
    num_waiting: int
    num_waiting_for_remote_kv: int
    num_blocks: int
    num_free_blocks: int
    """Free or cached and evictable."""
    num_blocks_held_by_offers: int
    kv_cache_usage: float
    """Share of the pool that isn't free, 0 to 1."""
    num_prompt_tokens_local_compute: int
    num_prompt_tokens_local_cache_hit: int
    num_prompt_tokens_external_kv_transfer: int
    num_generation_tokens: int
    num_preemptions: int
    block_size: int
    """Tokens of a block."""
    num_images_encoded: int = 0
    """Forwards of the vision tower."""


class Engine:
    """Loads the model and allocates the pool when constructed (EngineStartError), serves between start and shutdown.

    Attributes for the server: `max_model_len`, `vocab_size`, `eos_token_ids`, `model_fingerprint` (str),
    `image_token_id` (None for a model that takes text only),
    `kv_cache` (with `fd`, and `kv_layout()` here, for the sidecar).
    """

    def __init__(
        self, config: EngineConfig, kv_transfer: KvTransfer | None = None, *, shared_pool: bool = True
    ) -> None:
        """`shared_pool`: a pool in host memory is made so that another process can map it."""
        torch.set_num_threads(config.num_threads or usable_cores())
        try:
            device = open_device(config.device)
        except DeviceUnavailable as exc:
            raise EngineStartError(exc.message, exc.remedy) from exc
        model = load_model(config.model, config.dtype, device, config.max_model_len)
        num_blocks = num_pool_blocks(config, model.shape)
        self.max_model_len = fit_model_len(config, model.max_position_embeddings, num_blocks)
        self.vocab_size = model.vocab_size
        self.eos_token_ids = model.eos_token_ids
        self.model_fingerprint = model.fingerprint
        self.image_token_id = model.image_token_id
        self._vision = model.vision
        self.kv_cache = KvCache(model.shape, num_blocks, config.block_size, device, shared=shared_pool)
        self.core = self._make_core(config, model, device, kv_transfer)
        self._num_threads = torch.get_num_threads()
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        """What other threads want done on the engine thread, under `_changed`."""
        self._num_unseen_requests = 0
        """Submitted and not yet in `_stats`, under `_changed`."""
        self._num_taken_requests = 0
        self._nudged = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._stats = self._snapshot()

    def _make_core(
        self, config: EngineConfig, model: LoadedModel, device: Device, kv_transfer: KvTransfer | None
    ) -> EngineCore:
        block_manager = BlockManager(
            self.kv_cache.num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            salt=f"{model.fingerprint}|{model.shape.dtype}",
        )
        scheduler = Scheduler(
            block_manager,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefill_alignment=device.max_prefill_tile,
        )
        return EngineCore(
            ModelRunner(model, self.kv_cache, device),
            scheduler,
            max_model_len=self.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            device=device.torch_device,
            seed=config.seed,
            kv_load_failure_policy=config.kv_load_failure_policy,
            kv_transfer=kv_transfer,
        )

    def kv_layout(self) -> KvLayout:
        return self.kv_cache.kv_layout(self.model_fingerprint)

    def set_kv_transfer(self, kv_transfer: KvTransfer | None) -> None:
        """Give the engine its connector, which needs the pool's fd and so comes after the engine. Before `start`."""
        self.core.kv_transfer = kv_transfer

    def set_prefix_store(self, prefix_store: PrefixStore | None) -> None:
        """Give the engine where to find and keep prefixes beyond its pool. Before `start`."""
        self.core.store_use.store = prefix_store

    def start(self, on_outputs: Callable[[list[RequestOutput]], None]) -> None:
        """Start the engine thread, which calls `on_outputs` once a step with all of the step's outputs."""
        self._thread = threading.Thread(target=self._run, args=(on_outputs,), name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        """Queue a request and return at once. Raises EngineRequestError for one that can never run."""
        self._check(request)
        with self._changed:
            if self._stopping:
                raise EngineRequestError("the engine is shutting down", "ServiceUnavailableError", 503)
            self._num_unseen_requests += 1
            self._commands.append(lambda: self._take_in(request))
            self._changed.notify()

    def _check(self, request: EngineRequest) -> None:
        """Whatever could never run or would fail in the middle of a step is refused here."""
        num_tokens = len(request.prompt_token_ids)
        sampling = request.sampling
        if (request.kv_transfer_params or {}).get("release_only"):
            return
        if num_tokens == 0:
            raise EngineRequestError("the prompt is empty")
        if num_tokens >= self.max_model_len:
            raise EngineRequestError(
                f"the prompt has {num_tokens} tokens; with at least one to generate, "
                f"that is more than the maximum of {self.max_model_len} (max_model_len)"
            )
        if sampling.max_tokens < 1:
            raise EngineRequestError(f"max_tokens must be at least 1, got {sampling.max_tokens}")
        named_ids = (*request.prompt_token_ids, *sampling.stop_token_ids, *(sampling.logit_bias or ()))
        if not 0 <= min(named_ids) <= max(named_ids) < self.vocab_size:
            raise EngineRequestError(f"token ids must be between 0 and {self.vocab_size - 1}")

    def abort(self, request_id: str) -> None:
        """Forget a request, in whatever state; unknown ids are ignored. No output follows once it is processed."""
        with self._changed:
            self._commands.append(lambda: self.core.abort(request_id))
            self._changed.notify()

    def wake(self) -> None:
        """Look for KV events now."""
        with self._changed:
            self._nudged = True
            self._changed.notify()

    def stats(self) -> EngineStats:
        """As of the last step; requests that no step has seen yet count as waiting."""
        with self._changed:
            stats = replace(self._stats, num_waiting=self._stats.num_waiting + self._num_unseen_requests)
        return replace(stats, alive=self._thread is not None and self._thread.is_alive())

    def shutdown(self) -> None:
        """Stop the thread (requests in flight get no more output) and give the pool back. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.kv_cache.close()

    def _take_in(self, request: EngineRequest) -> None:
        self._num_taken_requests += 1
        self.core.add(request)

    def _run(self, on_outputs: Callable[[list[RequestOutput]], None]) -> None:
        """The engine thread. An exception that no request can be blamed for ends it: `stats().alive` turns False."""
        torch.set_num_threads(self._num_threads)
        try:
            while self._wait_for_work():
                outputs = self.core.step()
                stats = self._snapshot()
                with self._changed:
                    self._stats = stats
                    self._num_unseen_requests -= self._num_taken_requests
                self._num_taken_requests = 0
                if outputs:
                    on_outputs(outputs)
        except Exception:
            logger.exception("event=engine_thread_died")
        finally:
            if self.core.kv_transfer is not None:
                self.core.kv_transfer.close()

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do, then run the other threads' commands; False when stopping."""
        with self._changed:
            while not (self._commands or self._nudged or self._stopping or self.core.has_runnable_work):
                expects_events = self.core.waits_for_kv_events
                notified = self._changed.wait(_KV_POLL_S if expects_events else None)
                if expects_events and not notified:
                    break
            self._nudged = False
            commands, self._commands = self._commands, deque()
            stopping = self._stopping
        for command in commands:  # without the lock: one may wait for the sidecar, and nobody else is to wait for that
            command()
        return not stopping

    def _snapshot(self) -> EngineStats:
        scheduler, counters = self.core.scheduler, self.core.counters
        num_blocks, num_free = scheduler.block_manager.num_blocks, scheduler.block_manager.num_free_blocks
        return EngineStats(
            alive=True,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_waiting_for_remote_kv=scheduler.num_waiting_for_remote_kv,
            num_blocks=num_blocks,
            num_free_blocks=num_free,
            num_blocks_held_by_offers=scheduler.num_blocks_held_by_offers,
            kv_cache_usage=1 - num_free / num_blocks,
            num_prompt_tokens_local_compute=counters.num_prompt_tokens_local_compute,
            num_prompt_tokens_local_cache_hit=counters.num_prompt_tokens_local_cache_hit,
            num_prompt_tokens_external_kv_transfer=counters.num_prompt_tokens_external_kv_transfer,
            num_generation_tokens=counters.num_generation_tokens,
            num_preemptions=scheduler.num_preemptions,
            block_size=self.kv_cache.block_size,
            num_images_encoded=0 if self._vision is None else self._vision.num_encoded,
        )
