"""Dense oracles, written to be read: plain autograd, any dtype, differentiable twice.

Shape suffixes: N rows (anchors), M columns, D feature width; B blocks of N rows, P domains.
"""

import torch
from torch import Tensor

from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.tiles import softplus
from fastclip.ops.triangle import Blocks


def similarity_statistics(
    x_ND: Tensor,
    y_MD: Tensor,
    scale: Tensor,
    both: bool,
    positive_index_N: Tensor | None,
    row_group_N: Tensor | None,
    column_group_M: Tensor | None,
    first: int,
    trainable: int,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """The statistics of `fastclip.ops.similarity`, with the whole of S in memory."""
    n, m = x_ND.shape[0], y_MD.shape[0]
    y_MD = torch.cat([y_MD[:trainable], y_MD[trainable:].detach()])
    S_NM = _logits(x_ND, y_MD, scale, compute_dtype)
    rows = torch.arange(n, device=S_NM.device)
    columns = torch.arange(m, device=S_NM.device)
    positives = rows if positive_index_N is None else positive_index_N
    left_out_NM = (positives[:, None] == columns) | (columns < first)
    if row_group_N is not None and column_group_M is not None:
        left_out_NM = left_out_NM | (row_group_N[:, None] == column_group_M)
    negatives_NM = S_NM.masked_fill(left_out_NM, -torch.inf)
    paired_NN = negatives_NM[:, : n if both else 0]
    return (
        _logsumexp(negatives_NM, dim=1),
        _maximum(negatives_NM, dim=1),
        _logsumexp(paired_NN, dim=0),
        _maximum(paired_NN, dim=0),
        S_NM[rows, positives],
        S_NM.mean(dim=1),
        S_NM[:, :n].mean(dim=0),
    )


def sigmoid_rows(
    x_ND: Tensor,
    y_MD: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    diagonal: int,
    compute_dtype: torch.dtype,
) -> Tensor:
    """The row sums of `fastclip.ops.sigmoid`."""
    S_NM = _logits(x_ND, y_MD, scale, compute_dtype)
    if offset is not None:
        S_NM = S_NM + offset.reshape(()).to(S_NM.dtype)
    signs_NM = torch.ones_like(S_NM)
    signs_NM.diagonal(offset=diagonal).fill_(-1)
    return softplus(signs_NM * S_NM).sum(dim=1)


def block_statistics(
    z_MD: Tensor,
    scale_PP: Tensor,
    offset_PP: Tensor | None,
    shape: Blocks,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of `fastclip.ops.symmetric.block_statistics`."""
    pair_M = torch.arange(shape.rows, device=z_MD.device) % shape.pairs
    z_MD = _round(z_MD, compute_dtype)

    def logits(b: int, c: int) -> Tensor:
        entry = shape.domains[b], shape.domains[c]
        S_NN = scale_PP.to(z_MD.dtype)[entry] * (z_MD[shape.block(b)] @ z_MD[shape.block(c)].T)
        return S_NN if offset_PP is None else S_NN + offset_PP.to(z_MD.dtype)[entry]

    # block by block, so that the gradient of a table's entry is one sum over a block
    blocks = range(len(shape.domains))
    S_MM = torch.cat([torch.cat([logits(b, c) for c in blocks], dim=1) for b in blocks])
    negatives_MM = S_MM.masked_fill(pair_M[:, None] == pair_M, -torch.inf)
    positives = [S_MM[shape.block(b), shape.block(c)].diagonal() for b, c in shape.couples()]
    return _logsumexp(negatives_MM, dim=1), _maximum(negatives_MM, dim=1), torch.stack(positives)


def label_statistics(
    z_MD: Tensor, labels_M: Tensor, scale: Tensor, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of `fastclip.ops.symmetric.label_statistics`."""
    S_MM = _logits(z_MD, z_MD, scale, compute_dtype)
    itself_MM = torch.eye(len(z_MD), dtype=torch.bool, device=z_MD.device)
    same_MM = (labels_M[:, None] == labels_M) & ~itself_MM
    positives_M = same_MM.sum(dim=1).to(S_MM.dtype)
    mean_M = S_MM.masked_fill(~same_MM, 0.0).sum(dim=1) / positives_M.clamp(min=1)
    return _logsumexp(S_MM.masked_fill(itself_MM, -torch.inf), dim=1), mean_M, positives_M


def distillation(
    x_ND: Tensor,
    y_ND: Tensor,
    scale: Tensor,
    teacher_x_NE: Tensor,
    teacher_y_NE: Tensor,
    teacher_scale: Tensor,
    compute_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The cross-entropies of `fastclip.ops.distillation`, by row and by column."""
    S_NN = _logits(x_ND, y_ND, scale, compute_dtype)
    T_NN = _logits(teacher_x_NE, teacher_y_NE, teacher_scale, teacher_dtype)
    row, column = (-(T_NN.softmax(dim) * S_NN.log_softmax(dim)).sum(dim) for dim in (1, 0))
    return row, column


def _logits(x_ND: Tensor, y_MD: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    product_NM = _round(x_ND, dtype) @ _round(y_MD, dtype).T
    return scale.reshape(()).to(product_NM.dtype) * product_NM


def _round(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Features rounded to `dtype` but held in the accumulator's; the gradient passes unrounded."""
    wide = features.to(accumulator_dtype(features.dtype))
    return wide + (wide.to(dtype).to(wide.dtype) - wide).detach()


def _logsumexp(logits: Tensor, dim: int) -> Tensor:
    # A line without negatives has the value -inf and no gradient; logsumexp alone gives NaN there.
    empty = (logits == -torch.inf).all(dim=dim, keepdim=True)
    lse = torch.logsumexp(logits.masked_fill(empty, 0.0), dim=dim)
    return lse.masked_fill(empty.squeeze(dim), -torch.inf)


def _maximum(logits: Tensor, dim: int) -> Tensor:
    return logits.detach().amax(dim=dim)
