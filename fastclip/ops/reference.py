"""Dense oracles, written to be read: plain autograd, any dtype, differentiable twice.

Shape suffixes: N rows (anchors), M columns, D feature width; B blocks of N rows, P domains.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastclip.ops.collectives import Ranks, gather_rows_with_grad
from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.numerics import softplus
from fastclip.ops.problem import Options, couples

TensorOrNone = TypeVar("TensorOrNone", Tensor, Tensor | None)


def similarity_statistics(
    x_ND: Tensor,
    y_MD: Tensor,
    scale: Tensor,
    row_bias_N: Tensor | None,
    column_bias_M: Tensor | None,
    positive_index_N: Tensor | None,
    row_group_N: Tensor | None,
    column_group_M: Tensor | None,
    options: Options,
) -> tuple[Tensor, ...]:
    """The statistics of `fastclip.ops.similarity`, with the whole of S in memory."""
    ranks, own, n = options.ranks, len(x_ND), len(x_ND)
    both, mine = options.column_statistics, slice(0, n)
    if ranks is not None:
        # every rank computes the whole of S and takes the rows that are its own
        blocks = [n, len(y_MD) - n] if both else [len(y_MD)]
        if positive_index_N is None and not both:
            positive_index_N = torch.arange(n, device=x_ND.device)
        first = sum(ranks.columns(len(y_MD))[: ranks.rank])
        mine = _own(ranks, own) if both else slice(first, first + own)
        if positive_index_N is not None:
            positive_index_N = _of_all(positive_index_N + first, ranks, [n])
        x_ND, row_group_N = _of_all(x_ND, ranks, [n]), _of_all(row_group_N, ranks, [n])
        y_MD = _of_all(y_MD, ranks, blocks)
        column_group_M = _of_all(column_group_M, ranks, blocks)
        row_bias_N = _of_all(row_bias_N, ranks, [n])
        column_bias_M = _of_all(column_bias_M, ranks, blocks)
        n = len(x_ND)
    m, with_gradient = len(y_MD), options.columns_with_gradient
    if ranks is None and with_gradient >= 0:
        y_MD = torch.cat([y_MD[:with_gradient], y_MD[with_gradient:].detach()])
    S_NM = _logits(x_ND, y_MD, scale, options.dtype)
    rows = torch.arange(n, device=S_NM.device)
    columns = torch.arange(m, device=S_NM.device)
    positives = rows if positive_index_N is None else positive_index_N
    left_out_NM = (positives[:, None] == columns) | (columns < options.first_negative)
    if row_group_N is not None and column_group_M is not None:
        left_out_NM = left_out_NM | (row_group_N[:, None] == column_group_M)
    of_rows_NM = S_NM if column_bias_M is None else S_NM + column_bias_M.to(S_NM.dtype)
    of_columns_NM = S_NM if row_bias_N is None else S_NM + row_bias_N.to(S_NM.dtype)[:, None]
    negatives_NM = of_rows_NM.masked_fill(left_out_NM, -torch.inf)
    paired_NN = of_columns_NM.masked_fill(left_out_NM, -torch.inf)[:, : n if both else 0]
    found: tuple[Tensor, ...] = (
        _logsumexp(negatives_NM, dim=1),
        _maximum(negatives_NM, dim=1) if options.maxima else S_NM.new_empty(0),
        _logsumexp(paired_NN, dim=0),
        _maximum(paired_NN, dim=0) if options.maxima else S_NM.new_empty(0),
        S_NM[rows, positives],
        S_NM.mean(dim=1) if options.means else S_NM.new_empty(0),
    )
    if ranks is not None:
        found = tuple(one[_own(ranks, own)] if len(one) else one for one in found)
    return *found, S_NM[:, mine].mean(dim=0) if options.means else S_NM.new_empty(0)


def sigmoid_rows(
    x_ND: Tensor,
    y_MD: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    row_group_N: Tensor | None,
    column_group_M: Tensor | None,
    options: Options,
) -> Tensor:
    """The row sums of `fastclip.ops.sigmoid`."""
    diagonal, ranks = 0, options.ranks
    if ranks is not None:
        y_MD, diagonal = _of_all(y_MD, ranks, [len(y_MD)]), _own(ranks, len(x_ND)).start
        if column_group_M is not None:
            column_group_M = _of_all(column_group_M, ranks, [len(column_group_M)])
    S_NM = _logits(x_ND, y_MD, scale, options.dtype)
    if offset is not None:
        S_NM = S_NM + offset.reshape(()).to(S_NM.dtype)
    own_NM = torch.zeros_like(S_NM, dtype=torch.bool)
    own_NM.diagonal(offset=diagonal).fill_(True)
    same_NM = torch.zeros_like(own_NM)
    if row_group_N is not None and column_group_M is not None:
        same_NM = row_group_N[:, None] == column_group_M
    positive_NM = own_NM | same_NM if options.positive_groups else own_NM
    terms_NM = softplus(torch.where(positive_NM, -S_NM, S_NM))
    return terms_NM.masked_fill(same_NM & ~positive_NM, 0.0).sum(dim=1)


def block_statistics(
    z_MD: Tensor,
    scale_PP: Tensor,
    offset_PP: Tensor | None,
    pair_group_N: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of `fastclip.ops.symmetric.block_statistics`."""
    ranks, domains = options.ranks, options.domains
    count, own = len(domains), len(z_MD) // len(domains)
    if ranks is not None:
        z_MD = _of_all(z_MD, ranks, [own] * count)
        pair_group_N = _of_all(pair_group_N, ranks, [own])
    pairs = len(z_MD) // count
    pair_M = torch.arange(len(z_MD), device=z_MD.device) % pairs
    z_MD = _round(z_MD, options.dtype)
    block = [slice(start, start + pairs) for start in range(0, len(z_MD), pairs)]

    def logits(b: int, c: int) -> Tensor:
        entry = domains[b], domains[c]
        S_NN = scale_PP.to(z_MD.dtype)[entry] * (z_MD[block[b]] @ z_MD[block[c]].T)
        return S_NN if offset_PP is None else S_NN + offset_PP.to(z_MD.dtype)[entry]

    # block by block, so that the gradient of a table's entry is one sum over a block
    S_MM = torch.cat([torch.cat([logits(b, c) for c in range(count)], 1) for b in range(count)])
    left_out_MM = pair_M[:, None] == pair_M
    if pair_group_N is not None:
        id_M = pair_group_N.repeat(count)
        left_out_MM = left_out_MM | (id_M[:, None] == id_M)
    negatives_MM = S_MM.masked_fill(left_out_MM, -torch.inf)
    positive_QN = torch.stack([S_MM[block[b], block[c]].diagonal() for b, c in couples(count)])
    lse, top = _logsumexp(negatives_MM, dim=1), _maximum(negatives_MM, dim=1)
    if ranks is not None:
        mine = _own(ranks, own)
        lse, top = (one.reshape(count, -1)[:, mine].reshape(-1) for one in (lse, top))
        positive_QN = positive_QN[:, mine]
    return lse, top if options.maxima else lse.new_empty(0), positive_QN


def label_statistics(
    z_MD: Tensor,
    labels_M: Tensor,
    scale: Tensor,
    ranks: Ranks | None,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """The statistics of `fastclip.ops.labels.label_statistics`."""
    own = slice(None) if ranks is None else _own(ranks, len(z_MD))
    if ranks is not None:
        z_MD, labels_M = (_of_all(one, ranks, [len(one)]) for one in (z_MD, labels_M))
    S_MM = _logits(z_MD, z_MD, scale, compute_dtype)
    itself_MM = torch.eye(len(z_MD), dtype=torch.bool, device=z_MD.device)
    same_MM = (labels_M[:, None] == labels_M) & ~itself_MM
    positives_M = same_MM.sum(dim=1).to(S_MM.dtype)
    mean_M = S_MM.masked_fill(~same_MM, 0.0).sum(dim=1) / positives_M.clamp(min=1)
    lse_M = _logsumexp(S_MM.masked_fill(itself_MM, -torch.inf), dim=1)
    return tuple(one[own] for one in (lse_M, mean_M, positives_M))


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


def _of_all(own: TensorOrNone, ranks: Ranks, blocks: Sequence[int]) -> TensorOrNone:
    """What all ranks have, block after block, where this one has blocks[b] rows in block b."""
    if own is None:
        return own
    parts = zip(own.split(list(blocks)), blocks, strict=True)
    return torch.cat(
        [gather_rows_with_grad(part, ranks, ranks.columns(rows)) for part, rows in parts]
    )


def _own(ranks: Ranks, rows: int) -> slice:
    """Where a rank's rows are among all."""
    return slice(ranks.first, ranks.first + rows)


def _logits(x_ND: Tensor, y_MD: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    product_NM = _round(x_ND, dtype) @ _round(y_MD, dtype).T
    return scale.reshape(()).to(product_NM.dtype) * product_NM


def _round(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Features rounded to `dtype` but held in the accumulator's; the gradient passes unrounded."""
    wide = features.to(accumulator_dtype(features.dtype))
    return wide + (wide.to(dtype).to(wide.dtype) - wide).detach()


def _logsumexp(logits: Tensor, dim: int) -> Tensor:
    # A row without negatives has the value -inf and no gradient; logsumexp alone gives NaN there.
    empty = (logits == -torch.inf).all(dim=dim, keepdim=True)
    lse = torch.logsumexp(logits.masked_fill(empty, 0.0), dim=dim)
    return lse.masked_fill(empty.squeeze(dim), -torch.inf)


def _maximum(logits: Tensor, dim: int) -> Tensor:
    return logits.detach().amax(dim=dim)
