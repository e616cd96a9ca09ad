"""Forward and backward of a loss by way of S, whole, where no native library does both.

The products are torch's, each one launch. What lies around them is an implementation's
(`dense_triton.py`, `dense_torch.py`): the forward keeps the cosines in float32, the backward, which
knows the upstream gradient, makes G of them, so that a gradient is never multiplied afterwards.

Shape suffixes: N rows, M columns, D width.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.kernels.dense_matrix import Matrix, Upstream
from fastclip.ops.dense_step import once
from fastclip.ops.gemm import accumulator_dtype, gradient_dtype, product
from fastclip.ops.reductions import concatenate
from fastclip.ops.registration import is_last_use

# cuBLAS wants rows of a matrix to begin at multiples of 16 bytes; and Triton, whose kernels load
# vectors only then, knows a stride that is a multiple of 16
ALIGNED_ENTRIES = 16


class SweepsCall(NamedTuple):
    """What a loss is asked.

    implementation: "triton" or "torch". matrix: S, whose cosines and tables are put in later.
    dtype: what features are rounded to. bank: columns without gradient. accuracies: receives the
    lines' hits, where it is a list.
    """

    implementation: str
    matrix: Matrix
    reduction: str
    dtype: torch.dtype
    bank: Tensor | None = None
    hits: list[Tensor] | None = None

    def operand(self, features: tuple[Tensor, ...]) -> Tensor:
        """Blocks of rows as they enter a product, rounded for autocast once."""
        rows = features[0] if len(features) == 1 else concatenate(list(features))
        rows = rows.to(self.dtype)
        return rows if rows.stride(1) == 1 else rows.contiguous()

    @property
    def gradient_dtype(self) -> torch.dtype:
        """That of G."""
        wide = self.implementation == "torch"
        return (accumulator_dtype if wide else gradient_dtype)(self.dtype)

    def sweeps(self) -> ModuleType:
        """The implementation."""
        if self.implementation == "triton":
            # triton is not everywhere
            from fastclip.ops import dense_triton

            return dense_triton
        from fastclip.ops import dense_torch

        return dense_torch


class Sweeps(torch.autograd.Function):
    """A loss by way of S.

    Inputs are a `SweepsCall`, the scale and the offset where they are tensors, and the features: X
    and Y or, where S is symmetric, its blocks.
    """

    @staticmethod
    def forward(
        ctx: Any, call: SweepsCall, scale: Tensor | None, offset: Tensor | None, *features: Tensor
    ) -> Tensor:
        if call.matrix.symmetric:
            x_ND = y_MD = call.operand(features)
        else:
            x_ND = call.operand(features[:1])
            y_MD = call.operand(features[1:] if call.bank is None else (features[1], call.bank))
        cos_NM = _room(x_ND, y_MD.shape[0], accumulator_dtype(call.dtype))
        product(x_ND, y_MD.T, out=cos_NM)
        matrix = call.matrix._replace(cos=cos_NM)
        found = call.sweeps().forward(matrix, call.reduction, call.hits is not None)
        loss, saved, divisor, hits = found
        if call.hits is not None:
            call.hits.append(hits)
        ctx.set_materialize_grads(False)
        if True in ctx.needs_input_grad:
            ids = matrix.ids or (None, None)
            tables = scale, offset, *ids, matrix.positive, divisor
            ctx.save_for_backward(cos_NM, x_ND, y_MD, *tables, *features, *saved)
            ctx.call = call._replace(hits=None), len(features)
        of_anchors: Tensor = loss
        return of_anchors

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if upstream is None:
            return (None,) * len(needs)
        call, count = ctx.call
        cos_NM, x_ND, y_MD, scale, offset, *rest = ctx.saved_tensors
        row_id, column_id, index, divisor = rest[:4]
        features, saved = rest[4 : 4 + count], rest[4 + count :]
        matrix = call.matrix._replace(
            cos=cos_NM,
            scale=call.matrix.scale if scale is None else scale,
            offset=call.matrix.offset if offset is None else offset,
            ids=None if row_id is None else (row_id, column_id),
            positive=index,
        )
        up = Upstream(upstream, matrix.factor(call.reduction), divisor)
        # S gives way to its gradient, unless the graph is kept
        dtype = call.gradient_dtype
        given = cos_NM if dtype == cos_NM.dtype and is_last_use((cos_NM,)) else None
        with torch.no_grad():
            scalars = [
                torch.empty_like(one, memory_format=torch.contiguous_format) if need else None
                for one, need in zip((scale, offset), needs[1:3], strict=True)
            ]
            G_NM = _room(cos_NM, cos_NM.shape[1], dtype) if given is None else given
            call.sweeps().gradient(matrix, saved, up, G_NM, *scalars)
            sides = _products(call, matrix, saved, up, (x_ND, y_MD), G_NM, features, needs[3:])
        return None, *once([*scalars, *sides], (scale, offset, *features))


def _products(
    call: SweepsCall,
    matrix: Matrix,
    saved: list[Tensor],
    upstream: Upstream,
    operands: tuple[Tensor, Tensor],
    G_NM: Tensor,
    features: list[Tensor],
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of the features."""
    x_ND, y_MD = operands
    symmetric = matrix.symmetric
    rows = len(x_ND) if (any(needs) if symmetric else needs[0]) else 0
    # a bank's columns have none
    own = len(features[1]) if not symmetric and needs[1] else 0
    if not rows + own:
        return [None] * len(features)
    total = matrix.cos.new_empty(rows + own, x_ND.shape[1])
    if rows:
        product(G_NM, y_MD.to(G_NM.dtype), out=total[:rows])
    if own:
        product(G_NM[:, :own].T, x_ND.to(G_NM.dtype), out=total[rows:])
    out = call.sweeps().finish(matrix, saved, upstream, operands, total, rows, features[0].dtype)
    sides = out.split([len(one) for one in features]) if symmetric else (out[:rows], out[rows:])
    return [side if need else None for side, need in zip(sides, needs, strict=True)]


def _room(x_ND: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """(N, columns)."""
    stride = -(-columns // ALIGNED_ENTRIES) * ALIGNED_ENTRIES
    return x_ND.new_empty((x_ND.shape[0], stride), dtype=dtype)[:, :columns]


def sweeps_loss(
    call: SweepsCall, scale: Tensor | None, offset: Tensor | None, *features: Tensor
) -> Tensor:
    """The loss that `call` describes; see `Sweeps`."""
    loss: Tensor = Sweeps.apply(call, scale, offset, *features)
    return loss
