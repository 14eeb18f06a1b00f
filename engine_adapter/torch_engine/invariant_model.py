"""Swaps a loaded model's modules for those whose rows don't depend on who shares the batch (see batch_invariant.py)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from engine_adapter.device import Device
from engine_adapter.torch_engine.batch_invariant import (
    DECODE_MULTIPLE,
    MAX_DECODE_ROWS,
    BatchInvariantLinear,
    FewOpsRmsNorm,
    ForwardKind,
    SharedInput,
    SharedInputPart,
    UncutActivation,
    rows_are_invariant,
)
from engine_adapter.torch_engine.mixture_of_experts import swap_experts

logger = logging.getLogger(__name__)

_RMS_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Qwen3MoeRMSNorm", "Qwen2_5_VLRMSNorm")
_TABLE_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on the position alone; dynamic and longrope ones depend on the batch's longest."""
_SHARED_INPUT_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""In the order in which transformers' modules call them."""

_ACTIVATIONS = ("SiLU", "SiLUActivation", "GELU", "GELUActivation")


class RotaryTable(nn.Module):
    """Cosines and sines of every position, [max_positions, head_dim] each, as the model's own module computes them.

    A model with images has three positions a token (time, height, width), and each channel reads one of them.
    """

    def __init__(self, rotary: Any, max_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        sections = enumerate(getattr(rotary, "mrope_section", ()))
        half = [index % 3 for index, num_channels in sections for _ in range(num_channels)]
        self._axis_of_channel = torch.tensor(half * 2, dtype=torch.int64, device=device)
        positions = torch.arange(max_positions, device=device).unsqueeze(0)
        cos, sin = rotary(torch.empty(0, dtype=dtype, device=device), positions)
        self._cos, self._sin = cos.squeeze(0).contiguous(), sin.squeeze(0).contiguous()

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`position_ids` [1, rows] or [3, 1, rows]; both results [1, rows, head_dim]."""
        if position_ids.ndim == 3:
            chosen = position_ids[:, 0].index_select(0, self._axis_of_channel)
            return self._cos.gather(0, chosen.T).unsqueeze(0), self._sin.gather(0, chosen.T).unsqueeze(0)
        positions = position_ids[0]
        return self._cos.index_select(0, positions).unsqueeze(0), self._sin.index_select(0, positions).unsqueeze(0)


def make_batch_invariant(model: Any, *, max_positions: int, device: Device) -> tuple[ForwardKind, int]:
    """Swap `model`'s modules in place; their kind of forward, and the multiple of rows that decodes must have."""
    kind = ForwardKind()
    backbone = model.get_decoder()
    dtype = model.get_output_embeddings().weight.dtype
    config = model.config.get_text_config()
    rope_parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope_parameters.get("rope_type", "default") in _TABLE_ROPE_TYPES:
        last_tile_end = -(-max_positions // device.max_prefill_tile) * device.max_prefill_tile
        backbone.rotary_emb = RotaryTable(backbone.rotary_emb, last_tile_end, dtype, device.torch_device)
    if device.kind != "cpu":
        return kind, 1
    if dtype is torch.float32:
        _swap_norms(backbone)
    for layer in backbone.layers:
        if hasattr(layer.mlp, "act_fn"):
            layer.mlp.act_fn = UncutActivation(layer.mlp.act_fn)
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return kind, 1  # oneDNN has no bfloat16 on this CPU: the model's own linears stay, without the promise
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        logger.warning("event=no_onednn consequence=decodes_padded rows=%d", MAX_DECODE_ROWS)
        return kind, MAX_DECODE_ROWS
    tower = getattr(model.model, "visual", None)
    if tower is not None:
        _swap_in_tower(tower)
    experts = swap_experts(backbone, kind, DECODE_MULTIPLE)
    linears = _swap_linears(model, backbone, kind)
    linears += [linear for block in experts for linear in block.linears]
    to_check = _one_of_each_shape(linears) if dtype is torch.float32 else []
    if all(rows_are_invariant(linear, linear.kind) for linear in to_check):
        return kind, DECODE_MULTIPLE
    logger.warning("event=matmul_depends_on_batch consequence=decodes_padded rows=%d", MAX_DECODE_ROWS)
    for block in experts:
        block.row_multiple = MAX_DECODE_ROWS
    return kind, MAX_DECODE_ROWS


def _swap_linears(model: Any, backbone: Any, kind: ForwardKind) -> list[BatchInvariantLinear]:
    """Replace one at a time, so that few weights are there twice (a tied one stays with the embedding).

    Those of the backbone and the head; a vision tower has its own.
    """
    swapped = []
    for parent in [model, *backbone.modules()]:
        for names in _SHARED_INPUT_NAMES:
            members = [getattr(parent, name, None) for name in names]
            linears = [member for member in members if type(member) is nn.Linear]
            if len(linears) < len(names) or len({linear.bias is None for linear in linears}) > 1:
                continue
            shared = SharedInput(linears, kind)
            swapped.append(shared.linear)
            for index, name in enumerate(names):
                setattr(parent, name, SharedInputPart(shared, index))
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                swapped.append(BatchInvariantLinear(child, kind))
                setattr(parent, name, swapped[-1])
    return swapped


def _swap_in_tower(tower: nn.Module) -> None:
    """A vision tower sees one image a forward, so its bits could differ by the number of threads only."""
    kind = ForwardKind()
    for parent in list(tower.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, BatchInvariantLinear(child, kind))
            elif type(child).__name__ in _ACTIVATIONS:
                setattr(parent, name, UncutActivation(child))


def _swap_norms(backbone: nn.Module) -> None:
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in _RMS_NORMS:
                setattr(parent, name, FewOpsRmsNorm(child.weight, child.variance_epsilon))  # type: ignore[arg-type]


def _one_of_each_shape(linears: list[BatchInvariantLinear]) -> list[BatchInvariantLinear]:
    return list({(linear.in_features, linear.out_features): linear for linear in linears}.values())
