"""Which rows of the pool's views hold a block or a token: the layout of kv_cache.py as arithmetic.

Block b of layer l is row (b * num_layers + l) * 2 + kv of `block_rows`, kv 0 for keys and 1 for values; its token o is
row that * block_size + o of `token_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Rows of `block_rows` for a list of blocks: `of_layer[l]` is [2 * blocks], all keys, then all values."""

    num_blocks: int
    of_layer: tuple[Tensor, ...]

    @classmethod
    def of(cls, block_ids: list[int], num_layers: int, device: torch.device) -> BlockRows:
        blocks = torch.tensor(block_ids, dtype=torch.int64, device=device) * (num_layers * 2)
        layers = torch.arange(num_layers, device=device)[:, None] * 2
        keys = blocks[None, :] + layers
        return cls(len(block_ids), torch.cat((keys, keys + 1), dim=1).unbind(0))


class WriteRows:
    """Rows of `token_rows` for tokens at (block, offset), by layer and K or V."""

    def __init__(
        self, block_ids: list[int], offsets: list[int], num_layers: int, block_size: int, device: torch.device
    ) -> None:
        stride = num_layers * 2 * block_size
        tokens = [block_id * stride + offset for block_id, offset in zip(block_ids, offsets, strict=True)]
        first_rows = _first_rows(num_layers, block_size, device)
        self.by_layer_and_kv = (first_rows + torch.tensor(tokens, dtype=torch.int64, device=device)).unbind(0)
        """2 * layer for keys, 2 * layer + 1 for values; [tokens] each."""

    def write(self, token_rows: Tensor, layer: int, key: Tensor, value: Tensor, rows: slice) -> None:
        """Put those `rows` of key and value [1, K, rows, D] into the pool."""
        for kv, content in enumerate((key, value)):
            content = content.transpose(1, 2).reshape(content.shape[2], -1)
            token_rows.index_copy_(0, self.by_layer_and_kv[2 * layer + kv], content[rows])


@lru_cache(maxsize=8)
def _first_rows(num_layers: int, block_size: int, device: torch.device) -> Tensor:
    return torch.arange(num_layers * 2, device=device)[:, None] * block_size
