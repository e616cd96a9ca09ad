"""What lies around the products where S is held whole: with torch's operations, in any dtype.

The formulas are those of `kernels/dense.py`. G is as wide as S here, so that it has the positives'
terms too.

Shape suffixes: N rows, M columns, L lines (rows, and columns that have statistics), B blocks, K
rows of a block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.kernels.dense_matrix import Matrix, Upstream
from fastclip.ops.numerics import softplus
from fastclip.ops.tiles.base import SoftmaxStats


class Lines(NamedTuple):
    """Of each line: log-sum-exp, sum of its pulls, share of its mean; and (B, L) its pulls."""

    lse: Tensor
    weight: Tensor
    share: Tensor
    pull: Tensor


def forward(
    matrix: Matrix, reduction: str, with_hits: bool
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """The loss, what the backward needs, the divisor where data decide it, and lines' hits."""
    S_NM, left_out_NM = _logits(matrix), _left_out(matrix)
    positive_BN = _positives(matrix, S_NM)
    if matrix.kind == "sigmoid":
        term_N = softplus(S_NM).masked_fill_(left_out_NM, 0.0).sum(dim=1)
        term_N += softplus(-positive_BN[0])
        pull = torch.sigmoid(-positive_BN)
        saved = Lines(term_N, pull[0], term_N, pull)
        return _reduced(matrix, term_N, reduction, None), saved, None, None
    negative_NM = S_NM.masked_fill(left_out_NM, -torch.inf)
    found = [_statistics(negative_NM, 1)]
    if matrix.paired:
        found.append(_statistics(negative_NM[:, : matrix.paired], 0))
        positive_BN = torch.cat([positive_BN, positive_BN], dim=1)
    top, lse = (torch.cat(lines) for lines in zip(*found, strict=True))
    if matrix.has_means:
        mean, count = _means(matrix, S_NM)
    if matrix.kind == "labels":
        # a row alone in its class is no anchor
        weight = (count > 0).to(lse.dtype)
        term = torch.where(count > 0, lse - mean, 0.0)
        saved = Lines(lse, weight, weight / count.clamp(min=1), lse.new_empty(0))
        divisor = weight.sum().clamp(min=1) if reduction == "mean" else None
        return _reduced(matrix, term, reduction, divisor), saved, divisor, None
    part = _parts(matrix, positive_BN)
    term = (part * softplus(lse - positive_BN)).sum(dim=0)
    pull = part * torch.sigmoid(lse - positive_BN)
    share = lse
    if matrix.has_means:
        term = term + matrix.smoothing * (positive_BN[0] - mean)
        share = matrix.smoothing / count
    hits = ((positive_BN > top) & _is_other(matrix, lse)).sum(dim=0) if with_hits else None
    saved = Lines(lse, pull.sum(dim=0), share, pull)
    return _reduced(matrix, term, reduction, None), saved, None, hits


def gradient(
    matrix: Matrix,
    saved: Sequence[Tensor],
    upstream: Upstream,
    out_NM: Tensor,
    d_scale: Tensor | None,
    d_offset: Tensor | None,
) -> None:
    """G times the scale into `out_NM`, which may be the cosines; the scalars' gradients."""
    lines = Lines(*saved)
    n, paired = len(matrix.cos), matrix.paired
    up = upstream.of_rows(n)
    S_NM, left_out_NM = _logits(matrix), _left_out(matrix)
    if matrix.kind == "sigmoid":
        G_NM = torch.sigmoid(S_NM).mul_(up[:, None])
    else:
        weight = lines.weight * (torch.cat([up, up]) if paired else up)
        G_NM = torch.exp(S_NM - lines.lse[:n, None]).mul_(weight[:n, None])
        if matrix.symmetric or paired:
            lse, weight = (one[:n] if matrix.symmetric else one[n:] for one in (lines.lse, weight))
            columns = len(lse)
            G_NM[:, :columns] += torch.exp(S_NM[:, :columns] - lse) * weight
    G_NM.masked_fill_(left_out_NM, 0.0)
    if matrix.has_means:
        share = lines.share[:n] * up
        taken_NM = share[:, None].expand_as(G_NM).clone()
        share = share if matrix.symmetric else lines.share[n:] * up
        taken_NM[:, : len(share)] += share
        G_NM.sub_(taken_NM.masked_fill_(~_candidates(matrix), 0.0))
    if matrix.kind != "labels":
        _add_positives(matrix, G_NM, _pulled(matrix, lines.pull, up))
    for room, scaled_by in ((d_scale, matrix.cos), (d_offset, None)):
        if room is not None:
            found = G_NM if scaled_by is None else G_NM * scaled_by
            _add_up(matrix, _blocks(matrix, found).sum(dim=(1, 3)), room)
    scale = _entries(matrix, matrix.scale)
    out_NM.copy_(_blocks(matrix, G_NM).mul_(scale).view(G_NM.shape))


def finish(
    matrix: Matrix,
    saved: Sequence[Tensor],
    upstream: Upstream,
    features: tuple[Tensor, Tensor],
    total: Tensor,
    rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """The products with G, rows' and then columns', cast once."""
    return total.to(dtype)


def _add_up(matrix: Matrix, sums_BB: Tensor, room: Tensor) -> None:
    """The gradient of a number or table from sums by block of row and of column."""
    if matrix.symmetric:
        # a pair of rows is there twice, and each time for both of its sides
        sums_BB = sums_BB / 2
    if room.numel() == 1:
        room.copy_(sums_BB.sum().view(room.shape))
        return
    room.zero_()
    for b, p in enumerate(matrix.domains):
        for c, q in enumerate(matrix.domains):
            room[min(p, q), max(p, q)] += sums_BB[b, c]


def _reduced(matrix: Matrix, term_L: Tensor, reduction: str, divisor: Tensor | None) -> Tensor:
    if reduction == "none":
        return term_L.view(2, -1).mean(dim=0) if matrix.paired else term_L
    total = term_L.sum() * matrix.factor(reduction)
    return total if divisor is None else total / divisor


def _statistics(S_NM: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Maxima and log-sum-exps."""
    top = S_NM.amax(dim=dim)
    anchor = top.masked_fill(top == -torch.inf, 0.0)
    total = torch.exp(S_NM - anchor.unsqueeze(dim)).sum(dim=dim)
    return top, SoftmaxStats(top, total).lse()


def _entries(matrix: Matrix, table: Tensor | float) -> Tensor | float:
    """A number, or the entries of a table by the domains of two blocks, (B, 1, B, 1)."""
    if not isinstance(table, Tensor):
        return table
    table = table.to(matrix.cos.dtype)
    if table.numel() == 1:
        return table.reshape(())
    domains, count = matrix.domains, len(matrix.domains)
    entries = [table[min(p, q), max(p, q)] for p in domains for q in domains]
    return torch.stack(entries).view(count, 1, count, 1)


def _blocks(matrix: Matrix, S_NM: Tensor) -> Tensor:
    """By block, row of it, block and column of it: (B, K, B, K)."""
    count = len(matrix.domains)
    found: Tensor = S_NM.unflatten(1, (count, matrix.beside))
    return found.unflatten(0, (count, matrix.pairs))  # type: ignore[no-any-return]


def _logits(matrix: Matrix) -> Tensor:
    scale, offset = _entries(matrix, matrix.scale), _entries(matrix, matrix.offset)
    return (_blocks(matrix, matrix.cos) * scale + offset).view(matrix.cos.shape)


def _left_out(matrix: Matrix) -> Tensor:
    """(N, M): where an entry is no negative of its row."""
    device = matrix.cos.device
    partner = (
        torch.arange(matrix.pairs, device=device) if matrix.positive is None else matrix.positive
    )
    columns = torch.arange(matrix.beside, device=device)
    count = len(matrix.domains)
    left_out = ((partner[:, None] == columns) | (columns < matrix.first_negative)).repeat(
        count, count
    )
    if matrix.ids is not None and matrix.kind == "softmax":
        left_out |= matrix.ids[0][:, None] == matrix.ids[1]
    return left_out


def _candidates(matrix: Matrix) -> Tensor:
    """(N, M): the entries whose mean is subtracted."""
    device = matrix.cos.device
    itself = torch.arange(matrix.pairs, device=device)[:, None] == torch.arange(
        matrix.beside, device=device
    )
    if matrix.ids is None:
        return torch.ones_like(itself)
    same = matrix.ids[0][:, None] == matrix.ids[1]
    return same & ~itself if matrix.kind == "labels" else ~same | itself


def _means(matrix: Matrix, S_NM: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the lines' candidates, and their number."""
    candidates = _candidates(matrix)
    held = S_NM.masked_fill(~candidates, 0.0)
    paired = matrix.paired
    total = torch.cat([held.sum(dim=1), held[:, :paired].sum(dim=0)])
    count = torch.cat([candidates.sum(dim=1), candidates[:, :paired].sum(dim=0)])
    count = count.to(total.dtype)
    return total / count.clamp(min=1), count


def _positives(matrix: Matrix, S_NM: Tensor) -> Tensor:
    """(B, N): of each row the entry of its pair in each block."""
    if matrix.positive is not None:
        return S_NM.gather(1, matrix.positive[:, None]).T
    # (B, B, K): a row's block, and that of its partner
    found = _blocks(matrix, S_NM).diagonal(dim1=1, dim2=3)
    return found.transpose(0, 1).reshape(len(matrix.domains), -1)


def _is_other(matrix: Matrix, like: Tensor) -> Tensor | bool:
    """(B, N): whether the block is another than the row's; of two sides always."""
    if not matrix.symmetric:
        return True
    other = ~torch.eye(len(matrix.domains), dtype=torch.bool, device=like.device)
    return other.repeat_interleave(matrix.pairs, dim=1)


def _parts(matrix: Matrix, like_BL: Tensor) -> Tensor | float:
    """Weights of positives, (B, L)."""
    if not matrix.symmetric:
        return 1.0
    weight = _entries(matrix, matrix.weight)
    if isinstance(weight, Tensor) and weight.ndim:
        weight = weight[:, 0, :, 0].repeat_interleave(matrix.pairs, dim=1)
    return _is_other(matrix, like_BL) * (weight / (len(matrix.domains) - 1))


def _pulled(matrix: Matrix, pull_BL: Tensor, up_N: Tensor) -> Tensor:
    """The gradients of the positives' logits, (B, N)."""
    n = len(up_N)
    found_BN = (matrix.smoothing - pull_BL[:, :n]) * up_N
    if matrix.symmetric:
        found: Tensor = found_BN.unflatten(1, (len(matrix.domains), matrix.pairs))
        return (found + found.transpose(0, 1)).view_as(found_BN)
    if matrix.paired:
        found_BN += (matrix.smoothing - pull_BL[:, n:]) * up_N
    return found_BN


def _add_positives(matrix: Matrix, G_NM: Tensor, pulled_BN: Tensor) -> None:
    if matrix.positive is not None:
        # 0 there
        G_NM.scatter_(1, matrix.positive[:, None], pulled_BN.T)
        return
    pulled = pulled_BN.unflatten(1, (len(matrix.domains), matrix.pairs)).transpose(0, 1)
    _blocks(matrix, G_NM).diagonal(dim1=1, dim2=3).add_(pulled)
