"""Modules whose rows don't depend on who shares the batch.

Floating point sums depend on their order, and the order that a matmul kernel picks depends on the shape of its input:
a token decoded alone and the same token decoded beside seven others differ in their last bits, now and then in an
argmax. A prompt prefilled elsewhere, in other chunks, would then give another text. So each token's bits have to be a
function of its kind (prefilled or decoded), its position and its own sequence. Prefill forwards get there by always
having the same shape (see prefill_tiles.py). Decode forwards vary in rows, up to MAX_DECODE_ROWS, and need the modules
here:

- Linear: oneDNN's inner product with a prepacked weight sums each row in an order that was found to be the same for
  every number of rows from 2 on (at 1 it switches to a matrix-vector kernel). With AVX-512 it costs 40 us a call, which
  small weights can't hide: these are packed for MKL as well, for pieces of 4 and of 8 rows, which were found to give
  the same bits. `rows_are_invariant` checks all this on the machine at load; where it fails, decode forwards are padded
  to MAX_DECODE_ROWS, which leaves one shape.
- the activation: torch's vectorised and scalar exp differ in the last bit, and which elements are done by the scalar
  one depends on how the tensor is cut for threads. It is applied to pieces too small to be cut.
- rotary embeddings: sines and cosines are looked up in a table made once, not computed a batch.
- attention: inside torch's fused kernel MKL multiplies matrices, and on AVX2 the order of its sums depends on the
  number of threads, unless it is told otherwise before its first call (MKL_CBWR).

Norms, softmax and everything else in these models reduce row by row or round exactly. float32 on CPU is held to this
bit for bit by core/test_batch_invariance.py; bfloat16 and accelerators run through the same code without the promise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_IS_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
if _IS_AVX2:
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")

MAX_DECODE_ROWS = 64
"""Rows of one decode forward; more sequences than that are decoded in several."""
PIECE_ROWS: tuple[int, ...] = () if _IS_AVX2 else (4, 8)
"""Rows that small weights are packed for: with AVX-512 MKL's 4 cost what one row does, 8 about 1.1 times that. With
AVX2 4 cost 2.2 times what one row does, and oneDNN's 2 rows 1.3 times."""
DECODE_MULTIPLE = PIECE_ROWS[0] if PIECE_ROWS else 2
"""Decode forwards have a multiple of this many rows."""
_MOST_PIECED_WEIGHTS = 4 << 20
"""Weights of more elements than this are packed for oneDNN only: its 40 us are lost in reading 16 MiB."""
_PARALLEL_GRAIN = 32768
"""at::internal::GRAIN_SIZE: an elementwise operation on no more elements than this is never cut for threads."""

_onednn_linear = torch.ops.mkldnn._linear_pointwise
_mkl_linear = torch.ops.mkl._mkl_linear


@dataclass(slots=True)
class ForwardKind:
    """Which kind of forward is under way; shared by a model's linears, set by its runner."""

    is_decode: bool = False


class BatchInvariantLinear(nn.Module):
    """`nn.Linear` over weights packed once. Input [..., rows, in_features], output [..., rows, out_features].

    A decode forward's rows are a multiple of DECODE_MULTIPLE, and its leading dimensions are 1.
    """

    def __init__(self, linear: nn.Linear, kind: ForwardKind) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind = kind
        weight = linear.weight.detach()
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, MAX_DECODE_ROWS)
        self._packed_for_rows: dict[int, Tensor] = {}
        self._shape_only = weight.new_empty(1).expand(weight.shape)
        has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        if has_mkl and weight.dtype is torch.float32 and weight.numel() <= _MOST_PIECED_WEIGHTS:
            for num_rows in PIECE_ROWS:
                self._packed_for_rows[num_rows] = torch.ops.mkl._mkl_reorder_linear_weight(weight, num_rows)

    def forward(self, rows: Tensor) -> Tensor:
        if not (self.kind.is_decode and self._packed_for_rows):
            out: Tensor = _onednn_linear(rows, self._packed, self._bias, "none", [], "")
            return out
        if rows.shape[-2] in self._packed_for_rows:
            return self._piece(rows)
        return torch.cat([self._piece(piece) for piece in torch.split(rows, PIECE_ROWS[-1], dim=-2)], dim=-2)

    def _piece(self, rows: Tensor) -> Tensor:
        """The unpacked weight is asked for its shape only, as long as there is a pack for just as many rows."""
        num_rows = rows.shape[-2]
        packed = self._packed_for_rows[num_rows]
        out: Tensor = _mkl_linear(rows, packed, self._shape_only, self._bias, num_rows)
        return out


class SharedInput:
    """Linears that a module applies to the same input, one after the other, computed as one when the first is asked."""

    def __init__(self, linears: list[nn.Linear], kind: ForwardKind) -> None:
        first = linears[0]
        fused = nn.Linear(1, 1, bias=False, device="meta")
        fused.in_features, fused.out_features = first.in_features, sum(linear.out_features for linear in linears)
        fused.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        if biases:
            fused.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        self.linear = BatchInvariantLinear(fused, kind)
        self._sizes = [linear.out_features for linear in linears]
        self._outs: Sequence[Tensor] = ()

    def take(self, index: int, rows: Tensor) -> Tensor:
        if index == 0:
            self._outs = torch.split(self.linear(rows), self._sizes, dim=-1)
        return self._outs[index]


class SharedInputPart(nn.Module):
    """Stands where one of the linears stood. Part 0 is asked first and is the only one that looks at its input."""

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index

    def forward(self, rows: Tensor) -> Tensor:
        return self._shared.take(self._index, rows)


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


class FewOpsRmsNorm(nn.Module):
    """Root mean square norm of float32 in 5 small operations where transformers' modules take 8.

    x * w / sqrt(sum(x^2) / n + eps) = x * (w * sqrt(n)) / sqrt(sum(x^2) + n * eps).
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        width = weight.shape[0]
        self._scaled_weight = weight.detach() * width**0.5
        self._scaled_eps = weight.new_tensor(eps * width)

    def forward(self, rows: Tensor) -> Tensor:
        scale: Tensor = torch.linalg.vecdot(rows, rows).add_(self._scaled_eps).rsqrt_().unsqueeze(-1)
        return (rows * scale).mul_(self._scaled_weight)


@torch.inference_mode()
def rows_are_invariant(linear: nn.Module, kind: ForwardKind) -> bool:
    """True where every decode shape gives each row the bits it has in the largest one, at whatever place it stands."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, MAX_DECODE_ROWS, int(linear.in_features), generator=generator)  # type: ignore[arg-type]

    before, kind.is_decode = kind.is_decode, True
    try:
        full = linear(rows)
        return all(
            torch.equal(linear(rows[:, start : start + num_rows]), full[:, start : start + num_rows])
            for num_rows in range(DECODE_MULTIPLE, MAX_DECODE_ROWS, DECODE_MULTIPLE)
            for start in {0, 1, 3, MAX_DECODE_ROWS - num_rows}
        )
    finally:
        kind.is_decode = before
