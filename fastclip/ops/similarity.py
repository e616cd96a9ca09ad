"""Statistics of `S = scale * X @ Y.T` that softmax losses need, without ever storing S.

Row i has one positive; its negatives N(i) are the other columns, less those of its own group.
The operator returns, per row,

    row_lse_i     = logsumexp of S_ij over j in N(i)
    column_lse_j  = logsumexp of S_ij over i with j in N(i)                     (j < N, on request)
    row_max_i, column_max_j, the maxima of the same                            (on request)
    positive_i    = S_ip of row i's positive p
    row_mean_i    = mean of S_ij over all columns                               (on request)
    column_mean_j = mean of S_ij over all rows                                  (on request)

A column bias is added to S in row_lse and row_max, a row bias in column_lse and column_max: those
of a softmax's own row or column would cancel. Every softmax loss is a short formula of them, e.g.
CLIP's row term is softplus(row_lse - positive). Keeping positives out of the sums is what makes the
gradient exact where a softmax saturates: p - 1 never has to be formed.

A forward costs one N x M x D product, a backward two (dX, dY), or three where S is formed again
because its exponentials do not fit `keep_bytes` (`kept.py`). For a sum over rows of one direction,
`info_nce.py` makes do with three in any case; where both sides are the same, `symmetric.py` halves
that of S.

Over several processes a rank has rows and the columns that belong to them, gets the statistics of
these among the rows and columns of all, and the gradient of what all ranks made of theirs.

Shape suffixes: N rows, M columns, D feature width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.ops import backend as backends
from fastclip.ops import checks, kept, passes, problem, reference
from fastclip.ops.collectives import Ranks, check_columns
from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.problem import Options, Problem
from fastclip.ops.registration import Backward, Tensors, register
from fastclip.ops.tiles.base import LogSumExps


class Statistics(NamedTuple):
    """Each (N,) in float32 (float64 for float64 features), or empty where not asked for."""

    row_lse: Tensor
    row_max: Tensor
    column_lse: Tensor
    column_max: Tensor
    positive: Tensor
    row_mean: Tensor
    column_mean: Tensor


def similarity_statistics(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    column_statistics: bool = True,
    positive_index: Tensor | None = None,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
    row_bias: Tensor | None = None,
    column_bias: Tensor | None = None,
    first_negative: int = 0,
    columns_with_gradient: int | None = None,
    maxima: bool = False,
    means: bool = False,
    ranks: Ranks | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
    precision: str = "auto",
) -> Statistics:
    """Differentiable statistics of `scale * x @ y.T`; see the module's docstring.

    Those that are not named here are as `fastclip.functional.similarity_statistics` has them.

    Args:
        x: (N, D), the rows there.
        y: (M, D), the columns there, on x's device and, unless autocast casts both, of its dtype.
        scale: the logit_scale there.
        ranks: the processes whose rows and columns these are part of; without `first_negative` and
            `columns_with_gradient`. positive_index counts own columns, groups are the same on all
            ranks.
        backend: "auto", "cpp", "cuda", "torch", "triton" or "reference".
        chunk_bytes: size of a chunk of S, of which up to three are alive; None takes a fixed
            default.
        keep_bytes: as there.
        precision: "auto" computes in autocast's dtype where autocast is on; "input" in x's dtype.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together.
    """
    compute_dtype = checks.compute_dtype_of(x, precision)
    chunk = checks.chunk_argument(chunk_bytes)
    checks.check_pair(x, y, precision)
    scale = checks.as_scalar("logit_scale", scale, x)
    if means and y.shape[0] < x.shape[0]:
        raise ValueError(
            f"{x.shape[0]} rows but only {y.shape[0]} columns; means need a column for each row"
        )
    ids = checks.check_positives(
        x, y, column_statistics, positive_index, row_group, column_group, first_negative
    )
    biases = checks.check_biases(x, y, column_statistics, row_bias, column_bias)
    check_columns(ranks, y.shape[0])
    chosen = backends.choose("similarity", backend, x.device, compute_dtype)
    options = problem.options(
        compute_dtype,
        chosen,
        chunk,
        ranks,
        column_statistics=column_statistics,
        maxima=maxima,
        means=means,
        first_negative=first_negative,
        columns_with_gradient=-1 if columns_with_gradient is None else columns_with_gradient,
        keep_bytes=kept.keep_argument(keep_bytes, chosen, x, y, scale, *biases),
    )
    if chosen == "reference":
        with checks.without_autocast(x.device):
            found = reference.similarity_statistics(x, y, scale, *biases, *ids, Options(**options))
        return Statistics(*found)
    checks.refuse_transforms(x, y, scale, *(bias for bias in biases if bias is not None))
    return Statistics(*_statistics(x, y, scale, *biases, *ids, **options)[:7])


def _forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    column_bias: Tensor | None,
    positive_index: Tensor | None,
    row_group: Tensor | None,
    column_group: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    with checks.without_autocast(x.device):
        ids = positive_index, row_group, column_group
        asked = problem.rectangle(Options(**options), x, y, scale, None, *ids)
        asked = problem.biased(asked, row_bias, column_bias)
        collected = asked.columns.collect(asked.y_MD)
        rows, columns, kept_S = passes.statistics(asked, collected)
        rows = rows._replace(max=problem.raised(rows.max, asked.column_top))
        columns = columns._replace(max=problem.raised(columns.max, asked.row_top))
        factor, dtype = asked.scale_PP[0, 0], asked.tiles.dtype
        positive = asked.tiles.row_dot(asked.x_ND, asked.positives()).mul_(factor)
        if asked.paired:
            columns = asked.columns.own_statistics(columns)
        row_mean, column_mean = positive.new_empty(0), positive.new_empty(0)
        if asked.options.means:
            scale = scale.reshape(()).to(dtype)
            x_mean, y_mean = _means(asked)
            row_mean = torch.mv(asked.x_ND.to(dtype), y_mean).mul_(scale)
            column_mean = torch.mv(asked.y_MD[: len(x)].to(dtype), x_mean).mul_(scale)
        none = positive.new_empty(0)
        row_max, column_max = (
            (rows.max, columns.max) if asked.options.maxima else (none, none.clone())
        )
    lses = rows.lse(), row_max, columns.lse(), column_max
    return *lses, positive, row_mean, column_mean, collected, *kept_S


def _fake(inputs: Tensors, options: Options) -> list[Tensor]:
    x, y, *_ = inputs
    n, dtype = x.shape[0], accumulator_dtype(options.dtype)
    columns, means = n if options.column_statistics else 0, n if options.means else 0
    maxima = (n, columns) if options.maxima else (0, 0)
    sizes = (n, maxima[0], columns, maxima[1], n, means, means)
    collected = y.new_empty(problem.collected_shape(y, options), dtype=options.dtype)
    statistics = (x.new_empty(size, dtype=dtype) for size in sizes)
    return [*statistics, collected, *kept.fake_kept(x, y, options)]


def _gradient(
    inputs: Tensors, saved: Tensors, upstream: Tensors, options: Options
) -> tuple[Tensor | None, ...]:
    x, y, scale, row_bias, column_bias, *ids = inputs
    collected, row_lse, column_lse, *kept_S = saved
    d_row_lse, d_column_lse, d_positive, d_row_mean, d_column_mean = (
        torch.zeros_like(row_lse) if one is None else one for one in upstream
    )
    with checks.without_autocast(x.device):
        asked = problem.rectangle(options, x, y, scale, None, *ids)
        asked = problem.biased(asked, row_bias, column_bias)
        means = None
        if options.means:
            means = _MeansGradient(asked, d_row_mean, d_column_mean)
        columns = None
        if options.column_statistics:
            columns = asked.of_all_columns(LogSumExps(column_lse, d_column_lse))
            columns = columns._replace(lse=problem.lowered(columns.lse, asked.row_top))
        needs = options.needs[0], options.needs[1], options.needs[2]
        rows = LogSumExps(problem.lowered(row_lse, asked.column_top), d_row_lse)
        found = passes.gradient(asked, collected, kept.Kept(*kept_S), rows, columns, needs)
        if means is not None:
            means.add_to(found)
        coefficient = d_positive * asked.scale_PP[0, 0]
        dtypes = x.dtype, y.dtype
        dx, dy = passes.add_positives(asked, found.x, found.y, coefficient, dtypes)
        dscale = None
        if needs[2]:
            cosine = asked.tiles.row_dot(asked.x_ND, asked.positives())
            dscale = (d_positive * cosine).sum()
            if means is not None:
                dscale = dscale + means.scale()
            dscale = dscale + found.scale()
        of_row, of_column = found.biases or (None, None)
        if of_column is not None and options.needs[4]:
            of_column = asked.columns.sum(of_column)
            layout = asked.columns.layout
            own = [
                slice(s.column, s.column + s.stop - s.start) for s in layout.of_rank(layout.rank)
            ]
            of_column = torch.cat([of_column[columns] for columns in own])
    return (
        dx,
        dy,
        dscale,
        of_row if options.needs[3] else None,
        of_column if options.needs[4] else None,
    )


class _MeansGradient:
    """The terms of row and column means (label smoothing): S averaged over columns and rows."""

    def __init__(self, asked: Problem, d_row_N: Tensor, d_column_N: Tensor) -> None:
        self.d_row_N, self.d_column_N = d_row_N, d_column_N
        self._scale = asked.scale_PP[0, 0]
        x_ND, y_MD, dtype = asked.x_ND, asked.y_MD, asked.tiles.dtype
        self.x_mean_D, self.y_mean_D = _means(asked)
        # over this rank's own rows and columns
        self.x_sum_D = torch.mv(x_ND.to(dtype).T, d_row_N)
        self.y_sum_D = torch.mv(y_MD[: len(x_ND)].to(dtype).T, d_column_N)
        everyone = asked.columns.sum(torch.stack((self.x_sum_D, self.y_sum_D)))
        self.x_total_D, self.y_total_D = everyone
        self.rows, self.columns = asked.rows, asked.columns.layout.columns()
        self._with_gradient = asked.columns_with_gradient

    def add_to(self, found: passes.Gradients) -> None:
        """Add to both sides' gradients, in place."""
        scale = self._scale
        if found.x is not None:
            found.x.addcmul_((self.d_row_N * scale)[:, None], self.y_mean_D)
            found.x.add_(self.y_total_D * scale, alpha=1 / self.rows)
        if found.y is not None:
            own = min(len(self.d_column_N), self._with_gradient)
            found.y[:own].addcmul_((self.d_column_N * scale)[:own, None], self.x_mean_D)
            found.y[: self._with_gradient].add_(self.x_total_D * scale, alpha=1 / self.columns)

    def scale(self) -> Tensor:
        """To the scale's gradient."""
        return torch.dot(self.x_sum_D, self.y_mean_D) + torch.dot(self.y_sum_D, self.x_mean_D)


def _means(asked: Problem) -> tuple[Tensor, Tensor]:
    """The means of all rows and of all columns, (D,) each."""
    sides, dtype = (asked.x_ND, asked.y_MD), asked.tiles.dtype
    sums = torch.stack([features.sum(dim=0, dtype=dtype) for features in sides])
    x_D, y_D = asked.columns.sum(sums)
    return x_D / asked.rows, y_D / asked.columns.layout.columns()


def _flop(shapes: Sequence[Any], options: Options) -> int:
    return problem.one_product(shapes[0], shapes[1], options)


def _gradient_flop(shapes: Sequence[Any], options: Options) -> int:
    again = (
        not kept.kept_entries(shapes[0][0], shapes[1][0], options)
        or options.needs[2] > options.needs[0]
    )
    return _flop(shapes, options) * (again + sum(options.needs[:2]))


_statistics = register(
    "similarity_statistics",
    _forward,
    inputs="x y scale row_bias? column_bias? positive_index? row_group? column_group?",
    outputs=10,
    record=Options,
    fake=_fake,
    flop=_flop,
    backward=Backward(
        _gradient, inputs=5, saved=(7, 0, 2, 8, 9), constant=(1, 3, 7, 8, 9), flop=_gradient_flop
    ),
)
