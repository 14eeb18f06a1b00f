"""Routed experts whose rows don't depend on who else was routed to them.

transformers multiplies all rows of an expert at once, so the shape of that product, and with it the order of its sums,
depends on the other tokens of the forward. Here an expert's rows go through BatchInvariantLinear's decode path, which
gives a row the same bits in every number of rows up to MAX_DECODE_ROWS (checked on the machine at load). That holds for
prefills too: a tile's later tokens differ from prompt to prompt, and are routed otherwise.

A token's contributions are added up in the order of its experts' numbers, as transformers does.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from engine_adapter.torch_engine.batch_invariant import (
    MAX_DECODE_ROWS,
    BatchInvariantLinear,
    ForwardKind,
    UncutActivation,
)


class InvariantRouter(nn.Module):
    """Stands for transformers' top-k router: (logits, weights, experts) of rows [rows, hidden]."""

    def __init__(self, router: Any, kind: ForwardKind) -> None:
        super().__init__()
        self.top_k: int = router.top_k
        self.norm_topk_prob = bool(router.norm_topk_prob)
        self.linear = BatchInvariantLinear(_linear_of(router.weight), kind)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.linear(rows)
        weights, experts = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:  # added column by column: one fixed order of the sum for any number of rows
            weights = weights / reduce(torch.add, weights.unbind(-1)).unsqueeze(-1)
        return logits, weights.to(logits.dtype), experts


class InvariantExperts(nn.Module):
    """Stands for transformers' experts; takes their two stacked weights apart, one expert at a time.

    `row_multiple`: what the rows of one product are padded to.
    """

    def __init__(self, experts: Any, row_multiple: int) -> None:
        super().__init__()
        self.row_multiple = row_multiple
        self.kind = ForwardKind(is_decode=True)
        self._act = UncutActivation(experts.act_fn)
        self.gate_up = nn.ModuleList(
            BatchInvariantLinear(_linear_of(weight), self.kind) for weight in experts.gate_up_proj
        )
        self.down = nn.ModuleList(BatchInvariantLinear(_linear_of(weight), self.kind) for weight in experts.down_proj)

    @property
    def linears(self) -> list[BatchInvariantLinear]:
        return [linear for linear in (*self.gate_up, *self.down) if isinstance(linear, BatchInvariantLinear)]

    def forward(self, rows: Tensor, expert_of: Tensor, weight_of: Tensor) -> Tensor:
        """`rows` [rows, hidden]; `expert_of` and `weight_of` [rows, top_k]."""
        out = torch.zeros_like(rows)
        for expert in sorted(set(expert_of.flatten().tolist())):
            chosen, slots = (expert_of == expert).nonzero(as_tuple=True)
            for some, slot in zip(chosen.split(MAX_DECODE_ROWS), slots.split(MAX_DECODE_ROWS), strict=True):
                answer = self._answer(expert, rows[some])
                out[some] += answer * weight_of[some, slot].unsqueeze(-1)
        return out

    def _answer(self, expert: int, rows: Tensor) -> Tensor:
        num_rows = rows.shape[0]
        padded = pad(rows, (0, 0, 0, -num_rows % self.row_multiple)).unsqueeze(0)
        gate, up = self.gate_up[expert](padded).chunk(2, dim=-1)
        answer: Tensor = self.down[expert](self._act(gate.contiguous()) * up)
        return answer[0, :num_rows]


def swap_experts(backbone: Any, kind: ForwardKind, row_multiple: int) -> list[InvariantExperts]:
    """Swap the routers and experts of `backbone`'s layers in place; dense layers stay as they are."""
    swapped = []
    for mlp in (layer.mlp for layer in backbone.layers if hasattr(layer.mlp, "experts")):
        mlp.gate = InvariantRouter(mlp.gate, kind)
        mlp.experts = InvariantExperts(mlp.experts, row_multiple)
        swapped.append(mlp.experts)
    return swapped


def _linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    return linear
