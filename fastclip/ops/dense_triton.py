"""What lies around the products where S is held whole: a Triton kernel for each step."""

from collections.abc import Sequence

import torch
from torch import Tensor

import fastclip.kernels.dense as kernels
import fastclip.kernels.dense_gradient as gradients
from fastclip.kernels.dense_matrix import Matrix, Upstream
from fastclip.ops.passes import add_rows_


def forward(
    matrix: Matrix, reduction: str, with_hits: bool
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """The loss, what the backward needs, the divisor where data decide it, and lines' hits."""
    count, cos = matrix.lines, matrix.cos
    planes = cos.new_empty(kernels.PLANES + len(matrix.domains), count)
    terms = cos.new_empty(count)
    hits = cos.new_empty(count) if with_hits else None
    kernels.lines(matrix, planes, terms, hits)
    divisor = None
    if reduction == "none":
        loss = terms.view(2, -1).mean(dim=0) if matrix.paired else terms
    else:
        if matrix.kind == "labels" and reduction == "mean":
            divisor = cos.new_empty(())
        loss = kernels.total(terms, planes[1], matrix.factor(reduction), divisor)
    return loss, (planes,), divisor, hits


def gradient(
    matrix: Matrix,
    saved: Sequence[Tensor],
    upstream: Upstream,
    out: Tensor,
    d_scale: Tensor | None,
    d_offset: Tensor | None,
) -> None:
    """G times the scale, without positives, into `out`; the scalars' gradients, with them."""
    scalars = d_scale is not None or d_offset is not None
    sums = gradients.gradient(matrix, saved[0], upstream, out, scalars)
    if scalars:
        gradients.scalars(matrix, sums, d_scale, d_offset)


def finish(
    matrix: Matrix,
    saved: Sequence[Tensor],
    upstream: Upstream,
    features: tuple[Tensor, Tensor],
    total: Tensor,
    rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """The products with G, rows' and then columns', with the positives' terms, cast once."""
    if matrix.kind == "labels":
        # these are in G
        return total.to(dtype)
    if matrix.positive is not None:
        _add_to_columns(matrix, saved[0], upstream, features[0], total[rows:])
    out = total if total.dtype == dtype else torch.empty_like(total, dtype=dtype)
    gradients.finish(matrix, saved[0], upstream, features, total, rows, out)
    return out


def _add_to_columns(
    matrix: Matrix, planes: Tensor, upstream: Upstream, x: Tensor, total: Tensor
) -> None:
    """The rows' terms to the columns that an index gives them: several may meet in one."""
    index = matrix.positive
    assert index is not None
    if not len(total):
        return
    pull = planes[kernels.PLANES] * upstream.of_rows(len(x)) * (index < len(total))
    terms = x.float() * (-pull * matrix.scale)[:, None]
    add_rows_(total, index.clamp(max=len(total) - 1), terms)
