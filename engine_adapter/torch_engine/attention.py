"""Attention over the paged pool, plugged in as an attention implementation of transformers.

transformers' attention modules compute queries, keys and values for all rows of a forward and call `paged_attention`
with them; the forward's step (below) comes along as a keyword. It writes the new keys and values into the pool and
attends each row to its own sequence. The queries that share a key/value head are folded into rows of torch's fused
kernel, so keys and values are never repeated.

Shapes: H query heads, K key/value heads, G = H / K, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from engine_adapter.torch_engine.kv_rows import BlockRows, WriteRows

ATTENTION_NAME = "baton_paged"


class KvRows(Protocol):
    """The views of the pool that attention uses; see KvCache."""

    token_rows: Tensor
    block_rows: Tensor
    block_size: int


class AttentionStep(Protocol):
    """One forward's way to the pool."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [1, H, rows, D], key and value [1, K, rows, D]; the answer [1, rows, H, D]."""


class DecodeStep:
    """Row i is the next token of sequence i; rows beyond the sequences are padding, and their answer is zero."""

    def __init__(self, pool: KvRows, block_rows: list[BlockRows], lengths: list[int], write_rows: WriteRows) -> None:
        """`lengths[i]`: tokens sequence i attends to, its new one included. `write_rows`: of these new tokens."""
        self._pool = pool
        self._block_rows = block_rows
        self._lengths = lengths
        self._write_rows = write_rows

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        _, num_heads, num_rows, head_dim = query.shape
        num_kv_heads = key.shape[1]
        num_padding = num_rows - len(self._lengths)
        pool = self._pool
        self._write_rows.write(pool.token_rows, layer, key, value, slice(0, num_rows - num_padding))
        queries = query.transpose(1, 2).reshape(num_rows, 1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        outs = []
        for index, (rows, length) in enumerate(zip(self._block_rows, self._lengths, strict=True)):
            kv = pool.block_rows.index_select(0, rows.of_layer[layer])
            kv = kv.view(2, -1, num_kv_heads, head_dim)[:, :length].transpose(1, 2)
            outs.append(scaled_dot_product_attention(queries[index], kv[:1], kv[1:], scale=scaling))
        if num_padding:
            outs.append(query.new_zeros(num_padding, *outs[0].shape[1:]))
        return torch.cat(outs).view(1, num_rows, num_heads, head_dim)


class PrefillStep:
    """Rows are the positions [tile_start, tile_end) of one sequence; those of [start, end) are written to the pool."""

    def __init__(
        self,
        pool: KvRows,
        prefix_rows: BlockRows,
        tile: tuple[int, int],
        written: tuple[int, int],
        write_rows: WriteRows,
        mask: Tensor,
        on_written: Callable[[int], None] | None = None,
    ) -> None:
        """`prefix_rows` covers positions [0, tile_start), `write_rows` [start, end).

        `on_written` is called with each layer whose keys and values are in the pool.
        `mask` [G * tile rows, tile_end]: 0 where a query may look, else -inf, the rows repeated for each of a group.
        """
        self._pool = pool
        self._prefix_rows = prefix_rows
        self._tile_start = tile[0]
        self._rows = slice(written[0] - tile[0], written[1] - tile[0])
        self._write_rows = write_rows
        self._mask = mask
        self._on_written = on_written

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        _, num_heads, num_rows, head_dim = query.shape
        num_kv_heads = key.shape[1]
        group = num_heads // num_kv_heads
        pool = self._pool
        self._write_rows.write(pool.token_rows, layer, key, value, self._rows)
        if self._on_written is not None:
            self._on_written(layer)
        if self._tile_start:
            prefix = pool.block_rows.index_select(0, self._prefix_rows.of_layer[layer])
            prefix = prefix.view(2, -1, num_kv_heads, head_dim)[:, : self._tile_start].transpose(1, 2)
            key, value = torch.cat((prefix[:1], key), dim=2), torch.cat((prefix[1:], value), dim=2)
        folded = query.reshape(1, num_kv_heads, group * num_rows, head_dim)
        out = scaled_dot_product_attention(folded, key, value, attn_mask=self._mask, scale=scaling)
        return out.view(1, num_heads, num_rows, head_dim).transpose(1, 2)


def causal_tile_mask(tile: tuple[int, int], group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[group * tile rows, tile_end] for PrefillStep."""
    start, end = tile
    mask = torch.full((end - start, end), float("-inf"), dtype=dtype, device=device).triu_(start + 1)
    return mask.repeat(group, 1)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attention_step: AttentionStep,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, H, rows, D], key and value [1, K, rows, D]; out [1, rows, H, D]."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return attention_step.attend(layer, query, key, value, scaling), None


def register_attention() -> None:
    """Make ATTENTION_NAME known to transformers, which then makes no masks of its own. Idempotent."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
