"""The KV pool: one memfd (or device tensor), seen as blocks. A block is contiguous over all layers.

Layout: [num_blocks][num_layers][2 (key, value)][block_size][num_kv_heads][head_dim]. The memfd can be handed to a
sidecar, has no name in /dev/shm, and goes away with its last holder, whatever kills the engine.
"""

from __future__ import annotations

import mmap
import os

import torch

from engine_adapter.device import Device
from engine_adapter.host_memory import available_host_memory_bytes
from engine_adapter.torch_engine.config import EngineConfig, EngineStartError
from engine_adapter.torch_engine.model_shape import ModelShape
from sidecar.protocol import KvLayout, Plane

BLOCK_AXES = ("layer", "kv", "token", "head")
_KV = 2
_HEADROOM_BYTES = 128 << 20
"""Left for activations and the process itself when the pool is weighed against free memory."""


def block_bytes_of(shape: ModelShape, block_size: int) -> int:
    return shape.num_layers * _KV * block_size * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize


def num_pool_blocks(config: EngineConfig, shape: ModelShape) -> int:
    """Raises EngineStartError where the pool could not hold one block."""
    block_bytes = block_bytes_of(shape, config.block_size)
    num_blocks = config.num_blocks or config.kv_pool_bytes // block_bytes
    if num_blocks == 0:
        raise EngineStartError(
            f"a KV pool of {config.kv_pool_bytes} bytes holds no block of {block_bytes} bytes",
            "give a larger --kv-pool-bytes",
        )
    return num_blocks


def fit_model_len(config: EngineConfig, max_position_embeddings: int, num_blocks: int) -> int:
    """The longest request: what was asked for, or else what model and pool allow. One request must fit the pool alone.

    Raises EngineStartError where what was asked for exceeds the model or the pool.
    """
    pool_tokens = num_blocks * config.block_size
    if config.max_model_len is None:
        return min(max_position_embeddings, pool_tokens)
    if config.max_model_len > max_position_embeddings:
        raise EngineStartError(
            f"--max-model-len {config.max_model_len} exceeds the model's {max_position_embeddings} positions",
            f"give at most {max_position_embeddings}",
        )
    if config.max_model_len > pool_tokens:
        raise EngineStartError(
            f"--max-model-len {config.max_model_len} exceeds the KV pool's {pool_tokens} tokens",
            f"give at least --num-blocks {-(-config.max_model_len // config.block_size)} or a shorter length",
        )
    return config.max_model_len


class KvCache:
    """The pool's memory and the views that attention reads and writes through.

    `token_rows` [num_blocks * num_layers * 2 * block_size, num_kv_heads * head_dim]: a row a token, layer and K or V.
    `block_rows` [num_blocks * num_layers * 2, block_size * num_kv_heads * head_dim]: a row a block, layer and K or V.
    """

    def __init__(
        self, shape: ModelShape, num_blocks: int, block_size: int, device: Device, *, shared: bool = True
    ) -> None:
        """Host memory is a memfd, unless it is not to be `shared` with another process. Raises EngineStartError."""
        self.shape = shape
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.block_bytes = block_bytes_of(shape, block_size)
        self.pool_bytes = num_blocks * self.block_bytes
        self.fd: int | None = None
        self._mapping: mmap.mmap | None = None
        if device.host_pool and shared:
            self.fd, self._mapping = _allocate_memfd(self.pool_bytes)
            flat = torch.frombuffer(self._mapping, dtype=shape.dtype)
        else:
            flat = torch.zeros(self.pool_bytes // shape.dtype.itemsize, dtype=shape.dtype, device=device.torch_device)
        token_width = shape.num_kv_heads * shape.head_dim
        self.token_rows = flat.view(-1, token_width)
        self.block_rows = flat.view(-1, block_size * token_width)

    def kv_layout(self, model_fingerprint: str) -> KvLayout:
        """What a sidecar has to know of the pool."""
        return KvLayout(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            planes=(Plane(offset=0, stride_bytes=self.block_bytes, block_bytes=self.block_bytes),),
            num_layers=self.shape.num_layers,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            dtype=str(self.shape.dtype).removeprefix("torch."),
            model=model_fingerprint,
            order="plain",
            axes=BLOCK_AXES,
        )

    def block_content(self, block_id: int) -> bytes:
        """The bytes of one block, for tests."""
        rows = self.shape.num_layers * _KV
        return self.block_rows[block_id * rows : (block_id + 1) * rows].cpu().view(torch.uint8).numpy().tobytes()

    def close(self) -> None:
        """Let go of the memory. Views made before must not be used any more."""
        if self.fd is None:
            return
        del self.token_rows, self.block_rows
        os.close(self.fd)
        self.fd = None
        self._mapping = None


def _allocate_memfd(pool_bytes: int) -> tuple[int, mmap.mmap]:
    """Memory that is really there: all of it is allocated now, not at the first write (which would be a SIGBUS)."""
    available_bytes = available_host_memory_bytes()
    if available_bytes is not None and pool_bytes + _HEADROOM_BYTES > available_bytes:
        raise EngineStartError(
            f"a KV pool of {pool_bytes >> 20} MiB does not fit into the {available_bytes >> 20} MiB of memory left",
            "give a smaller --kv-pool-bytes or --num-blocks, or free memory",
        )
    fd = os.memfd_create("baton-kv-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, pool_bytes)
        os.posix_fallocate(fd, 0, pool_bytes)
        return fd, mmap.mmap(fd, pool_bytes)
    except OSError as exc:
        os.close(fd)
        raise EngineStartError(
            f"can't allocate a KV pool of {pool_bytes >> 20} MiB ({exc.strerror})",
            "give a smaller --kv-pool-bytes or --num-blocks, or free memory",
        ) from exc
