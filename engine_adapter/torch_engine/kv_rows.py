"""Which rows of the pool's views hold a block or a token: the layout of kv_cache.py as arithmetic.

Block b of layer l is row (b * num_layers + l) * 2 + kv of `block_rows`, kv 0 for keys and 1 for values; its token o is
row that * block_size + o of `token_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def token_write_rows(
    block_ids: list[int], offsets: list[int], num_layers: int, block_size: int, device: torch.device
) -> Tensor:
    """Rows of `token_rows` for tokens at (block, offset): [num_layers, 2, tokens]."""
    blocks = torch.tensor(block_ids, dtype=torch.int64, device=device) * (num_layers * 2 * block_size)
    tokens = blocks + torch.tensor(offsets, dtype=torch.int64, device=device)
    layer_kv = torch.arange(num_layers * 2, device=device).view(num_layers, 2, 1) * block_size
    return layer_kv + tokens
