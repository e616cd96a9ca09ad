"""Sums of the columns of each row's group, or outside it, and what losses with groups make of them.

A row's candidates are its own column and all columns outside its group; where a group is positive,
a row's positives are its own column and all of its group. Sums are in float64, which bears a
difference of them: linear in the rows. Over several processes the sums' gradient is the same sums,
of the rows' gradients by the columns' groups: one operator is its own backward.

Shape suffixes: N own rows, M own columns, D width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip.ops import checks, problem
from fastclip.ops.classes import Classes, slices
from fastclip.ops.collectives import Ranks
from fastclip.ops.columns import columns_of
from fastclip.ops.problem import Options
from fastclip.ops.registration import Backward, Tensors, register


def candidate_mean(
    x_ND: Tensor, y_MD: Tensor, row_group_N: Tensor, column_group_M: Tensor, ranks: Ranks | None
) -> Tensor:
    """Each row's mean product with its candidates among the columns of all ranks, in float64.

    Row i's own column is column i; differentiable in both sides.
    """
    ids = row_group_N, column_group_M
    sums_ND, count_N, own_N = _sums(x_ND, y_MD, ids, ranks, _outside, _outside_of_all)
    sums_ND = sums_ND + y_MD[: len(x_ND)].double() * own_N[:, None]
    return (x_ND.double() * sums_ND).sum(dim=1) / (count_N + own_N)


def own_minus_group_mean(
    x_ND: Tensor, y_MD: Tensor, row_group_N: Tensor, column_group_M: Tensor, ranks: Ranks | None
) -> Tensor:
    """Each row's product with its own column less the mean of those with its group's, in float64.

    The group is that among the columns of all ranks, and the own column, which is column i. It is 0
    for a row alone in its group; differentiable in both sides.
    """
    ids = row_group_N, column_group_M
    sums_ND, count_N, own_N = _sums(x_ND, y_MD, ids, ranks, _inside, _inside_of_all)
    own_ND, count_N = y_MD[: len(x_ND)].double(), count_N + ~own_N
    mean_ND = (sums_ND + own_ND * ~own_N[:, None]) / count_N[:, None]
    above_N = (x_ND.double() * (own_ND - mean_ND)).sum(dim=1)
    return torch.where(count_N > 1, above_N, 0.0)


def _sums(
    x_ND: Tensor,
    y_MD: Tensor,
    ids: tuple[Tensor, Tensor],
    ranks: Ranks | None,
    local: Callable[..., tuple[Tensor, Tensor]],
    shared: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums and numbers of columns, and whether each row's own column is of its group."""
    dtype = torch.promote_types(ids[0].dtype, ids[1].dtype)
    row_group_N, column_group_M = (group.to(dtype) for group in ids)
    if ranks is None:
        found = local(y_MD.double(), column_group_M, row_group_N)
    else:
        options = problem.options(y_MD.dtype, "torch", 0, ranks)
        found = shared(y_MD, column_group_M, row_group_N, **options)
    return *found, column_group_M[: len(x_ND)] == row_group_N


def _inside(y_MD: Tensor, group_M: Tensor, row_group_N: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the sum and the number of the columns of its group, by autograd's code."""
    ids = group_M.sort().values
    place = torch.searchsorted(ids, group_M)
    # index_put adds in a fixed order where index_add uses atomics
    sums = torch.zeros_like(y_MD).index_put((place,), y_MD, accumulate=True)
    counts = torch.searchsorted(ids, ids, right=True) - torch.searchsorted(ids, ids)
    found = torch.searchsorted(ids, row_group_N).clamp(max=len(ids) - 1)
    there = ids[found] == row_group_N
    return sums[found] * there[:, None], counts[found] * there


def _outside(y_MD: Tensor, group_M: Tensor, row_group_N: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the columns outside its group."""
    sums_ND, count_N = _inside(y_MD, group_M, row_group_N)
    return y_MD.sum(dim=0) - sums_ND, len(y_MD) - count_N


def _inside_of(y: Tensor, group_of_y: Tensor, row_group: Tensor, **options: Any) -> Tensors:
    """`_inside` among the columns of all ranks, which travel in their own dtype."""
    return _of_all(y, group_of_y, row_group, Options(**options), outside=False)


def _outside_of(y: Tensor, group_of_y: Tensor, row_group: Tensor, **options: Any) -> Tensors:
    """`_outside` among them."""
    return _of_all(y, group_of_y, row_group, Options(**options), outside=True)


def _of_all(
    y: Tensor, group_of_y: Tensor, row_group: Tensor, options: Options, outside: bool
) -> tuple[Tensor, Tensor]:
    columns = columns_of(options.ranks, [len(y)])
    with checks.without_autocast(y.device):
        classes = Classes(row_group, columns.of_all_ranks(group_of_y))
        sums = y.new_zeros((len(row_group), y.shape[1]), dtype=torch.float64)
        total = y.new_zeros(y.shape[1], dtype=torch.float64)
        for part in columns.parts(y, columns.collect(y)):
            for width in slices(part.features):
                rows = part.features[:, width].double()
                total[width] += rows.sum(dim=0)
                sums[:, width] += classes.sum(rows, part.segments[0].column)
        count = classes.others + 1
        if outside:
            return total - sums, columns.layout.columns() - count
        return sums, count


def _fake(inputs: Tensors, options: Options) -> list[Tensor]:
    y, _, row_group = inputs
    sums = y.new_empty((len(row_group), y.shape[1]), dtype=torch.float64)
    return [sums, row_group.new_empty(len(row_group), dtype=torch.int64)]


def _no_product(shapes: Sequence[Any], options: Options) -> int:
    return 0


def _registered(name: str, function: Callable[..., Tensors]) -> Callable[..., Any]:
    def swap_sides(
        inputs: Tensors, saved: Tensors, upstream: Tensors, options: Options
    ) -> tuple[Tensor]:
        y, group_of_y, row_group = inputs
        # sent in float32 at least: float16 would flush a gradient to zero
        d_sums = upstream[0].to(torch.promote_types(y.dtype, torch.float32))
        return (function(d_sums, row_group, group_of_y, **options._asdict())[0],)

    return register(
        name,
        function,
        inputs="y group_of_y row_group",
        outputs=2,
        record=Options,
        fake=_fake,
        flop=_no_product,
        backward=Backward(swap_sides, inputs=1, saved=(), constant=(1,), flop=_no_product),
    )


_inside_of_all = _registered("inside_of_all", _inside_of)
_outside_of_all = _registered("outside_of_all", _outside_of)
