"""Dense oracles, written to be read: plain autograd, any dtype, differentiable twice.

Shape suffixes: N rows (images), M columns (texts, M >= N), D feature width.
"""

import torch
from torch import Tensor

from fastclip.ops.gemm import accumulator_dtype


def similarity_statistics(
    x_ND: Tensor,
    y_MD: Tensor,
    scale: Tensor,
    row_group_N: Tensor | None,
    column_group_M: Tensor | None,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five statistics of `fastclip.ops.similarity`, with the whole of S in memory."""
    x_ND = _round(x_ND, compute_dtype)
    y_MD = _round(y_MD, compute_dtype)
    n = x_ND.shape[0]
    scale = scale.reshape(()).to(x_ND.dtype)
    S_NM = scale * (x_ND @ y_MD.T)

    rows = torch.arange(n, device=S_NM.device)
    left_out_NM = torch.zeros_like(S_NM, dtype=torch.bool)
    left_out_NM[rows, rows] = True
    if row_group_N is not None and column_group_M is not None:
        left_out_NM = left_out_NM | (row_group_N[:, None] == column_group_M[None, :])
    negatives_NM = S_NM.masked_fill(left_out_NM, -torch.inf)

    return (
        _logsumexp(negatives_NM, dim=1),
        _logsumexp(negatives_NM[:, :n], dim=0),
        S_NM[rows, rows],
        S_NM.mean(dim=1),
        S_NM[:, :n].mean(dim=0),
    )


def _round(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Features rounded to `dtype` but held in the accumulator's; the gradient passes unrounded."""
    wide = features.to(accumulator_dtype(features.dtype))
    return wide + (wide.to(dtype).to(wide.dtype) - wide).detach()


def _logsumexp(logits: Tensor, dim: int) -> Tensor:
    # A line without negatives has the value -inf and no gradient; logsumexp alone gives NaN there.
    empty = (logits == -torch.inf).all(dim=dim, keepdim=True)
    lse = torch.logsumexp(logits.masked_fill(empty, 0.0), dim=dim)
    return lse.masked_fill(empty.squeeze(dim), -torch.inf)
