"""Which memory provider a torch engine hands its KV on by, and what it registers with its sidecar."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack

import torch

from engine_adapter.device import BlockCopies
from engine_adapter.memory.buffer import NoBuffer, StagingBuffer, shared_memory_fault, slots_for
from engine_adapter.memory.choice import Choice, NoProvider, choose
from engine_adapter.memory.contract import Place, Pool
from engine_adapter.memory.slots import Slots
from engine_adapter.torch_engine.config import EngineConfig, EngineStartError
from engine_adapter.torch_engine.engine import Engine
from engine_adapter.torch_engine.kv_transfer import KvTransfer
from engine_adapter.torch_engine.server_config import ServerConfig
from engine_adapter.torch_engine.staged_kv_transfer import StagedKvTransfer
from sidecar.protocol import KvLayout


def choose_kv_memory(config: ServerConfig, engine_config: EngineConfig) -> Choice | None:
    """None for an engine without a sidecar. Raises EngineStartError."""
    if config.sidecar == "none":
        if config.kv_memory != "auto":
            raise EngineStartError(
                f"--kv-memory {config.kv_memory} is for an engine with a sidecar", "give --sidecar auto too"
            )
        return None
    place = Place(
        engine_config.device, config.sidecar == "auto", shared_memory_fault(), os.environ, config.sidecar_transport
    )
    try:
        return choose(config.kv_memory, place)
    except NoProvider as error:
        raise EngineStartError(
            f"--kv-memory {config.kv_memory}: {error.reason}", "or give --kv-memory auto, or --sidecar none"
        ) from error


class KvMemory:
    """What the sidecar is given: the pool itself, or a staging buffer that stands for it."""

    def __init__(self, config: ServerConfig, engine: Engine, choice: Choice) -> None:
        """Raises EngineStartError where the buffer can't be had."""
        self._config = config
        self._engine = engine
        self.choice = choice
        self.layout: KvLayout = engine.kv_layout()
        self._stack = ExitStack()
        self._buffer: StagingBuffer | None = None
        cache = engine.kv_cache
        self.pool = Pool(cache.block_rows.data_ptr(), cache.pool_bytes, cache.fd, choice.place.device)
        if choice.stages:
            self._buffer = self._allocate()
            self.layout, self.pool = self._buffer.layout, self._buffer.pool

    def staged(self, transfer: KvTransfer, news: threading.Event, wake: Callable[[], None]) -> KvTransfer:
        """`transfer` itself, or what brings its blocks through the buffer."""
        if self._buffer is None:
            return transfer
        cache, memory = self._engine.kv_cache, torch.frombuffer(self._buffer.memory, dtype=torch.uint8)
        blocks = cache.block_rows.view(torch.uint8).view(cache.num_blocks, cache.block_bytes)
        slots = memory.view(self.layout.num_blocks, cache.block_bytes)
        return StagedKvTransfer(
            transfer,
            Slots(self.layout.num_blocks),
            BlockCopies(self.choice.place.device, [blocks], [slots]),
            pull_timeout_s=self._config.kv_pull_timeout_s,
            wake=wake,
            news=news,
        )

    def close(self) -> None:
        """The transfer has been closed."""
        if self._buffer is not None:
            self._buffer.close()

    def _allocate(self) -> StagingBuffer:
        max_blocks = -(-self._engine.max_model_len // self.layout.block_size)
        try:
            num_slots = slots_for(self.layout, self._config.kv_staging_bytes, max_blocks)
            return StagingBuffer(self.layout, num_slots, shared=not self.choice.provider.in_process)
        except NoBuffer as error:
            raise EngineStartError(str(error), "give another --kv-staging-bytes or --max-model-len") from error
