"""The sizes of a model that its KV pool and its attention have to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ModelShape:
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def num_heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads
