"""Modules whose rows don't depend on who shares the batch.

Floating point sums depend on their order, and the order that a matmul kernel picks depends on the shape of its input:
a token decoded alone and the same token decoded beside seven others differ in their last bits, now and then in an
argmax. A prompt prefilled elsewhere, in other chunks, would then give another text. So each token's bits have to be a
function of its kind (prefilled or decoded), its position and its own sequence. Prefill forwards get there by always
having the same shape (see prefill_tiles.py). Decode forwards vary in rows, 2 to MAX_DECODE_ROWS, and need the modules
here:

- Linear: oneDNN's inner product with a prepacked weight sums each row in an order that was found to be the same for
  every number of rows from 2 on (at 1 it switches to a matrix-vector kernel). `rows_are_invariant` checks that on the
  machine at load; where it fails, decode forwards are padded to MAX_DECODE_ROWS, which leaves one shape.
- the activation: torch's vectorised and scalar exp differ in the last bit, and which elements are done by the scalar
  one depends on how the tensor is cut for threads. It is applied to pieces too small to be cut.
- rotary embeddings: sines and cosines are looked up in a table made once, not computed a batch.

Norms, softmax and everything else in these models reduce row by row or round exactly. float32 on CPU is held to this
bit for bit by core/test_batch_invariance.py; bfloat16 and accelerators run through the same code without the promise.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from engine_adapter.device import Device

logger = logging.getLogger(__name__)

MAX_DECODE_ROWS = 64
"""Rows of one decode forward; more sequences than that are decoded in several."""
MIN_DECODE_ROWS = 2
_PARALLEL_GRAIN = 32768
"""at::internal::GRAIN_SIZE: an elementwise operation on no more elements than this is never cut for threads."""
_PROBED_ROWS = (*range(MIN_DECODE_ROWS, 18), 24, 31, 32, 33, 47, 48, 49, 63)
"""Every number of rows that small batches have, and both sides of the block sizes that matmul kernels use."""
_TABLE_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on the position alone; dynamic and longrope ones depend on the batch's longest."""


class BatchInvariantLinear(nn.Module):
    """`nn.Linear` over a weight packed once for oneDNN. Input [..., in_features], output [..., out_features]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), MAX_DECODE_ROWS)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return out


class UncutActivation(nn.Module):
    """An elementwise activation, applied to groups of rows that are too small to be cut in the middle of a vector."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, rows: Tensor) -> Tensor:
        width = rows.shape[-1]
        if rows.numel() <= _PARALLEL_GRAIN:
            return self.activation(rows)  # type: ignore[no-any-return]
        out = torch.empty_like(rows)
        flat_in, flat_out = rows.view(-1, width), out.view(-1, width)
        num_rows = max(1, _PARALLEL_GRAIN // width)
        for start in range(0, flat_in.shape[0], num_rows):
            flat_out[start : start + num_rows] = self.activation(flat_in[start : start + num_rows])
        return out


class RotaryTable(nn.Module):
    """Cosines and sines of every position, [max_positions, head_dim] each, as the model's own module computes them."""

    def __init__(self, rotary: nn.Module, max_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        positions = torch.arange(max_positions, device=device).unsqueeze(0)
        cos, sin = rotary(torch.empty(0, dtype=dtype, device=device), positions)
        self._cos, self._sin = cos.squeeze(0).contiguous(), sin.squeeze(0).contiguous()

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`position_ids` [1, rows]; both results [1, rows, head_dim]."""
        positions = position_ids[0]
        return self._cos.index_select(0, positions).unsqueeze(0), self._sin.index_select(0, positions).unsqueeze(0)


def make_batch_invariant(model: Any, *, max_positions: int, device: Device) -> int:
    """Swap `model`'s modules in place; the least number of rows a decode forward must have."""
    backbone = model.get_decoder()
    dtype = model.get_output_embeddings().weight.dtype
    rope_parameters = (
        getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
    )
    if rope_parameters.get("rope_type", "default") in _TABLE_ROPE_TYPES:
        last_tile_end = -(-max_positions // device.max_prefill_tile) * device.max_prefill_tile
        backbone.rotary_emb = RotaryTable(backbone.rotary_emb, last_tile_end, dtype, device.torch_device)
    if device.kind != "cpu":
        return 1
    for layer in backbone.layers:
        layer.mlp.act_fn = UncutActivation(layer.mlp.act_fn)
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        logger.warning("event=no_onednn consequence=decodes_padded rows=%d", MAX_DECODE_ROWS)
        return MAX_DECODE_ROWS
    _swap_linears(model)
    if dtype is not torch.float32:
        return 1
    invariant = all(rows_are_invariant(module) for module in _one_of_each_shape(model))
    if not invariant:
        logger.warning("event=matmul_depends_on_batch consequence=decodes_padded rows=%d", MAX_DECODE_ROWS)
    return MIN_DECODE_ROWS if invariant else MAX_DECODE_ROWS


def _swap_linears(model: Any) -> None:
    """Replace one at a time, so that at most one weight is there twice (a tied one stays with the embedding)."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, BatchInvariantLinear(child))


def _one_of_each_shape(model: Any) -> list[BatchInvariantLinear]:
    by_shape = {
        (module.in_features, module.out_features): module
        for module in model.modules()
        if isinstance(module, BatchInvariantLinear)
    }
    return list(by_shape.values())


@torch.inference_mode()
def rows_are_invariant(linear: nn.Module) -> bool:
    """True where each probed number of rows, at the start and at the end of a batch, gives the bits of the full one."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(MAX_DECODE_ROWS, int(linear.in_features), generator=generator)  # type: ignore[arg-type]
    full = linear(rows)
    return all(
        torch.equal(linear(rows[start : start + num_rows]), full[start : start + num_rows])
        for num_rows in _PROBED_ROWS
        for start in (0, MAX_DECODE_ROWS - num_rows)
    )
