"""The engine: one thread that schedules, computes and answers; every public method may be called from any thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine_adapter.torch_engine.config import EngineConfig
from engine_adapter.torch_engine.kv_transfer import KvTransfer
from engine_adapter.torch_engine.sequence import EngineRequest, RequestOutput


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


class Engine:
    """Loads the model and allocates the pool when constructed (EngineStartError), serves between start and shutdown.

    Attributes for the server: `max_model_len`, `vocab_size`, `eos_token_ids`, `model_fingerprint` (str),
    `kv_cache` (with `fd` and `kv_layout()` for the sidecar).
    """

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    model_fingerprint: str

    def __init__(self, config: EngineConfig, kv_transfer: KvTransfer | None = None) -> None:
        raise NotImplementedError

    def set_kv_transfer(self, kv_transfer: KvTransfer | None) -> None:
        """Give the engine its connector after construction: it needs the pool's fd. Before `start`, or any time."""
        raise NotImplementedError

    def start(self, on_outputs: Callable[[list[RequestOutput]], None]) -> None:
        """Start the engine thread, which calls `on_outputs` once a step with all of the step's outputs."""
        raise NotImplementedError

    def submit(self, request: EngineRequest) -> None:
        """Queue a request and return at once. Raises EngineRequestError for one that can never run."""
        raise NotImplementedError

    def abort(self, request_id: str) -> None:
        """Forget a request, in whatever state; unknown ids are ignored. No output follows once it is processed."""
        raise NotImplementedError

    def wake(self) -> None:
        """Look for KV events now."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        raise NotImplementedError

    def shutdown(self) -> None:
        """Stop the thread (requests in flight get no more output) and give the pool back. Idempotent."""
        raise NotImplementedError
