"""Means of S over the candidates that groups leave to each row (label smoothing).

A row's candidates are its own column and all columns outside its group. Their sum is that of all
columns less the group's, in float64, which bears the difference: linear in the rows. Over several
processes the sums' gradient is the same sums, of the rows' gradients by the columns' groups: one
operator is its own backward.

Shape suffixes: N own rows, M own columns, D width.
"""

from typing import Any

import torch
from torch import Tensor

from fastclip.ops import checks, problem
from fastclip.ops.classes import Classes, slices
from fastclip.ops.collectives import Ranks
from fastclip.ops.columns import columns_of
from fastclip.ops.problem import Options
from fastclip.ops.registration import Backward, Tensors, register


def mean_left(
    x_ND: Tensor, y_MD: Tensor, row_group_N: Tensor, column_group_M: Tensor, ranks: Ranks | None
) -> Tensor:
    """Each row's mean product with its candidates among the columns of all ranks, in float64.

    Row i's own column is column i; differentiable in both sides.
    """
    n = len(x_ND)
    dtype = torch.promote_types(row_group_N.dtype, column_group_M.dtype)
    row_group_N, column_group_M = row_group_N.to(dtype), column_group_M.to(dtype)
    if ranks is None:
        sums_ND, count_N = _outside(y_MD.double(), column_group_M, row_group_N)
    else:
        options = problem.options(y_MD.dtype, "torch", 0, ranks)
        sums_ND, count_N = _outside_of_all(y_MD, column_group_M, row_group_N, **options)
    own_N = column_group_M[:n] == row_group_N
    sums_ND = sums_ND + y_MD[:n].double() * own_N[:, None]
    return (x_ND.double() * sums_ND).sum(dim=1) / (count_N + own_N)


def _outside(y_MD: Tensor, group_M: Tensor, row_group_N: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the sum and the number of the columns outside its group, by autograd's code."""
    ids = group_M.sort().values
    place = torch.searchsorted(ids, group_M)
    # index_put adds in a fixed order where index_add uses atomics
    sums = torch.zeros_like(y_MD).index_put((place,), y_MD, accumulate=True)
    counts = torch.searchsorted(ids, ids, right=True) - torch.searchsorted(ids, ids)
    found = torch.searchsorted(ids, row_group_N).clamp(max=len(ids) - 1)
    there = ids[found] == row_group_N
    return y_MD.sum(dim=0) - sums[found] * there[:, None], len(y_MD) - counts[found] * there


def _of_all(y: Tensor, group_of_y: Tensor, row_group: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """`_outside` among the columns of all ranks, which travel in their own dtype."""
    columns = columns_of(Options(**options).ranks, [len(y)])
    with checks.without_autocast(y.device):
        classes = Classes(row_group, columns.of_all_ranks(group_of_y))
        sums = y.new_zeros((len(row_group), y.shape[1]), dtype=torch.float64)
        total = y.new_zeros(y.shape[1], dtype=torch.float64)
        for part in columns.parts(y, columns.collect(y)):
            for width in slices(part.features):
                rows = part.features[:, width].double()
                total[width] += rows.sum(dim=0)
                sums[:, width] -= classes.sum(rows, part.segments[0].column)
        return sums.add_(total), columns.layout.columns() - 1 - classes.others


def _fake(inputs: Tensors, options: Options) -> list[Tensor]:
    y, _, row_group = inputs
    sums = y.new_empty((len(row_group), y.shape[1]), dtype=torch.float64)
    return [sums, row_group.new_empty(len(row_group), dtype=torch.int64)]


def _swap_sides(
    inputs: Tensors, saved: Tensors, upstream: Tensors, options: Options
) -> tuple[Tensor]:
    y, group_of_y, row_group = inputs
    # sent in float32 at least: float16 would flush a gradient to zero
    d_sums = upstream[0].to(torch.promote_types(y.dtype, torch.float32))
    return (_of_all(d_sums, row_group, group_of_y, **options._asdict())[0],)


_outside_of_all = register(
    "outside_of_all",
    _of_all,
    inputs="y group_of_y row_group",
    outputs=2,
    record=Options,
    fake=_fake,
    flop=lambda shapes, options: 0,
    backward=Backward(
        _swap_sides, inputs=1, saved=(), constant=(1,), flop=lambda shapes, options: 0
    ),
)
