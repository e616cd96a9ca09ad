"""Statistics of `S = scale * X @ Y.T` that softmax losses need, without ever storing S.

Row i has one positive; its negatives N(i) are the other columns, less those of its own group.
The operator returns, per row,

    row_lse_i     = logsumexp of S_ij over j in N(i), and row_max_i, their maximum
    column_lse_j  = logsumexp of S_ij over i with j in N(i), and column_max_j   (j < N, on request)
    positive_i    = S_ip of row i's positive p
    row_mean_i    = mean of S_ij over all columns                               (on request)
    column_mean_j = mean of S_ij over all rows                                  (on request)

and every softmax loss is a short formula of them, e.g. CLIP's row term is
softplus(row_lse - positive). Keeping positives out of the sums is what makes the gradient exact
where a softmax saturates: p - 1 never has to be formed.

A forward costs one N x M x D product, a backward three (S again, dX, dY). For a sum over rows of
one direction, `info_nce.py` makes do with three in all; where both sides are the same,
`symmetric.py` with two.

Over several processes a rank has rows and the columns that belong to them, is told the statistics
of these among the rows and columns of all, and gets the gradient of what all ranks made of theirs.

Shape suffixes: N rows, M columns, D feature width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastclip.ops import backend as backends
from fastclip.ops import checks, rectangle, reference
from fastclip.ops.collectives import Ranks, check_columns, plain, rows_of_all, unplain
from fastclip.ops.columns import Columns, columns_of
from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.tiles import tiles_of


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
    both: bool = True,
    positive_index: Tensor | None = None,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
    first: int = 0,
    trainable: int | None = None,
    means: bool = False,
    ranks: Ranks | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    precision: str = "auto",
) -> Statistics:
    """Differentiable statistics of `scale * x @ y.T`; see the module's docstring.

    Args:
        x: (N, D) rows, N >= 1.
        y: (M, D) columns, on x's device and, unless autocast casts both, of its dtype.
        scale: 0-d or (1,) tensor, or a number.
        both: whether columns have statistics too; needs M >= N.
        positive_index: (N,) integers in [0, M), the rows' positives; None: row i's is column i.
            Only without `both` and groups. Values out of range are the caller's fault.
        row_group, column_group: (N,) and (M,) integer ids, both or neither. Columns of a row's
            group other than its positive are left out of the negatives.
        first: columns before it are positives only, never negatives (a memory bank behind
            paired keys); only without `both`.
        trainable: columns from it on get no gradient; None: all do.
        means: whether row_mean and column_mean are wanted.
        ranks: the processes whose rows and columns these are part of; without `first` and
            `trainable`. positive_index counts own columns, groups are the same on all ranks.
        backend: "auto", "cpp", "cuda", "torch", "triton" or "reference".
        chunk_bytes: size of a chunk of S, of which up to three are alive; None takes a fixed
            default.
        precision: "auto" computes in autocast's dtype where autocast is on; "input" in x's dtype.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together.
    """
    compute_dtype = checks.compute_dtype_of(x, precision)
    chunk = checks.chunk_argument(chunk_bytes)
    check_pair(x, y, compute_dtype)
    scale = checks.as_scalar("logit_scale", scale, x)
    positive_index, row_group, column_group = check_positives(
        x, y, both, positive_index, row_group, column_group, first
    )
    check_columns(ranks, y.shape[0])
    options = (
        both,
        positive_index,
        row_group,
        column_group,
        first,
        y.shape[0] if trainable is None else trainable,
    )
    chosen = backends.choose("similarity", backend, x.device, compute_dtype)
    if chosen == "reference":
        with checks.without_autocast(x.device):
            if ranks is not None:
                return _shared_reference(x, y, scale, options, ranks, compute_dtype)
            return Statistics(
                *reference.similarity_statistics(x, y, scale, *options, compute_dtype)
            )
    checks.refuse_transforms(x, y, scale)
    return Statistics(
        *_statistics(x, y, scale, *options, *plain(ranks), means, compute_dtype, chosen, chunk)[:7]
    )


def rectangle_of(
    x: Tensor,
    y: Tensor,
    both: bool,
    ranks: Ranks | None,
    positive_index: Tensor | None = None,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
    first: int = 0,
    trainable: int | None = None,
) -> tuple[rectangle.Rectangle, Columns]:
    """S as its walk wants it: own rows x, own columns y, and where all columns come from."""
    n, m = x.shape[0], y.shape[0]
    # true captions apart from hard negatives: only they have statistics
    columns = columns_of(ranks, [n, m - n] if both else [m])
    if ranks is not None:
        trainable = None
        if column_group is not None:
            column_group = columns.all_lines(column_group)
    shape = rectangle.Rectangle(
        n,
        columns.layout.columns(),
        sum(columns.layout.sizes[0]) if both else 0,
        columns.layout.start(0, columns.layout.rank),
        positive_index,
        row_group,
        column_group,
        first,
        trainable,
    )
    return shape, columns


def _shared_reference(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    options: tuple[Any, ...],
    ranks: Ranks,
    compute_dtype: torch.dtype,
) -> Statistics:
    """Every rank computes the whole of S and takes the lines that are its own."""
    both, positive_index, row_group, column_group, *_ = options
    n, m = x.shape[0], y.shape[0]
    layout = columns_of(ranks, [n, m - n] if both else [m]).layout
    first = layout.start(0, ranks.rank)
    if positive_index is None and not both:
        positive_index = torch.arange(n, device=x.device)

    def everyone(own: Tensor, blocks: Sequence[Sequence[int]]) -> Tensor:
        parts = own.split([sizes[ranks.rank] for sizes in blocks])
        return torch.cat([rows_of_all(p, ranks, s) for p, s in zip(parts, blocks, strict=True)])

    def everyones(ids: Tensor | None, blocks: Sequence[Sequence[int]]) -> Tensor | None:
        return None if ids is None else everyone(ids, blocks)

    rows, columns = [ranks.sizes], layout.sizes
    y_all = everyone(y, columns)
    found = reference.similarity_statistics(
        everyone(x, rows),
        y_all,
        scale,
        both,
        everyones(None if positive_index is None else positive_index + first, rows),
        everyones(row_group, rows),
        everyones(column_group, columns),
        0,
        y_all.shape[0],
        compute_dtype,
    )
    start = sum(ranks.sizes[: ranks.rank])
    own = slice(start, start + n)
    return Statistics(*(line[own] for line in found))


@torch.library.custom_op("fastclip::similarity_statistics", mutates_args=())
def _statistics(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    both: bool,
    positive_index: Tensor | None,
    row_group: Tensor | None,
    column_group: Tensor | None,
    first: int,
    trainable: int,
    way: str,
    group: str,
    sizes: Sequence[int],
    means: bool,
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with checks.without_autocast(x.device):
        x, y = x.to(compute_dtype), y.to(compute_dtype)
        tiles = tiles_of(backend, compute_dtype)
        shape, columns = rectangle_of(
            x,
            y,
            both,
            unplain(way, group, sizes),
            positive_index,
            row_group,
            column_group,
            first,
            trainable,
        )
        collected = columns.collect(y)
        rows, own_columns, positive = rectangle.statistics(
            tiles, x, y, collected, scale, shape, columns, chunk_bytes
        )
        row_mean, column_mean = positive.new_empty(0), positive.new_empty(0)
        if means:
            factor = scale.reshape(()).to(tiles.dtype)
            x_mean, y_mean = rectangle.means(x, y, columns, tiles.dtype)
            row_mean = torch.mv(x.to(tiles.dtype), y_mean).mul_(factor)
            column_mean = torch.mv(y[: shape.rows].to(tiles.dtype), x_mean).mul_(factor)
    return (
        rows.lse(),
        rows.max,
        own_columns.lse(),
        own_columns.max,
        positive,
        row_mean,
        column_mean,
        collected,
    )


@_statistics.register_fake
def _(x, y, scale, both, *rest):
    way, group, sizes, means, compute_dtype = rest[5:10]
    n, dtype = x.shape[0], accumulator_dtype(compute_dtype)
    columns, mean_size = n if both else 0, n if means else 0
    lines = (n, n, columns, columns, n, mean_size, mean_size)
    outputs = [x.new_empty(size, dtype=dtype) for size in lines]
    collected = collected_shape(unplain(way, group, sizes), y)
    return *outputs, y.new_empty(collected, dtype=compute_dtype)


@torch.library.custom_op("fastclip::similarity_statistics_backward", mutates_args=())
def _statistics_backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    both: bool,
    positive_index: Tensor | None,
    row_group: Tensor | None,
    column_group: Tensor | None,
    first: int,
    trainable: int,
    way: str,
    group: str,
    sizes: Sequence[int],
    collected: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    d_row_lse: Tensor,
    d_column_lse: Tensor | None,
    d_positive: Tensor,
    d_row_mean: Tensor | None,
    d_column_mean: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    upstream = rectangle.Upstream(d_row_lse, d_column_lse, d_positive, d_row_mean, d_column_mean)
    with checks.without_autocast(x.device):
        shape, columns = rectangle_of(
            x,
            y,
            both,
            unplain(way, group, sizes),
            positive_index,
            row_group,
            column_group,
            first,
            trainable,
        )
        dx, dy, dscale = rectangle.statistics_gradient(
            tiles_of(backend, compute_dtype),
            x.to(compute_dtype),
            y.to(compute_dtype),
            collected,
            scale,
            shape,
            columns,
            row_lse,
            column_lse if both else None,
            upstream,
            (need_x, need_y, need_scale),
            (x.dtype, y.dtype),
            chunk_bytes,
        )
    return (
        x.new_empty(0) if dx is None else dx,
        y.new_empty(0) if dy is None else dy,
        scale.new_empty(0) if dscale is None else dscale.to(scale.dtype).reshape(scale.shape),
    )


@_statistics_backward.register_fake
def _(x, y, scale, *rest):
    need_x, need_y, need_scale = rest[17:20]
    wanted = ((x, need_x), (y, need_y), (scale, need_scale))
    return tuple(t.new_empty(t.shape) if need else t.new_empty(0) for t, need in wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, both, positive_index, row_group, column_group = inputs[:7]
    row_lse, row_max, column_lse, column_max = output[:4]
    collected = output[7]
    ctx.mark_non_differentiable(row_max, column_max, collected)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x, y, scale, positive_index, row_group, column_group, collected, row_lse, column_lse
    )
    # first, trainable and the ranks; then the dtype, the implementation and the chunk's size
    ctx.both, ctx.columns, ctx.means, ctx.options = both, inputs[7:12], inputs[12], inputs[13:]


def _autograd_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    x, y, scale, positive_index, row_group, column_group, *saved = ctx.saved_tensors
    row_lse = saved[1]
    d_row_lse, _, d_column_lse, _, d_positive, d_row_mean, d_column_mean = (
        torch.zeros_like(row_lse) if gradient is None else gradient for gradient in upstream[:7]
    )
    needs = ctx.needs_input_grad[:3]
    gradients = _statistics_backward(
        x,
        y,
        scale,
        ctx.both,
        positive_index,
        row_group,
        column_group,
        *ctx.columns,
        *saved,
        d_row_lse,
        d_column_lse if ctx.both else None,
        d_positive,
        *((d_row_mean, d_column_mean) if ctx.means else (None, None)),
        *needs,
        *ctx.options,
    )
    wanted = tuple(g if need else None for g, need in zip(gradients, needs, strict=True))
    return *wanted, *(None,) * 13


_statistics.register_autograd(_autograd_backward, setup_context=_setup_context)
_statistics_backward.register_autograd(checks.no_double_backward)


@register_flop_formula(torch.ops.fastclip.similarity_statistics)
def _statistics_flop(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    return one_product(x_shape, y_shape, *args[7:10])


@register_flop_formula(torch.ops.fastclip.similarity_statistics_backward)
def _statistics_backward_flop(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    need_x, need_y = args[18], args[19]
    return one_product(x_shape, y_shape, *args[7:10]) * (1 + bool(need_x) + bool(need_y))


def one_product(
    x_shape: Sequence[int], y_shape: Sequence[int], way: str, group: str, sizes: Sequence[int]
) -> int:
    """The FLOP of one product of this rank's rows with the columns of all."""
    ranks = unplain(way, group, sizes)
    columns = y_shape[0] if ranks is None else sum(ranks.columns(y_shape[0]))
    return 2 * x_shape[0] * columns * x_shape[1]


def collected_shape(ranks: Ranks | None, own: Tensor) -> tuple[int, ...]:
    """The shape of what `Columns.collect` gives."""
    if ranks is None or ranks.way != "gather":
        return (0,)
    return sum(ranks.columns(own.shape[0])), own.shape[1]


def check_pair(x: Tensor, y: Tensor, compute_dtype: torch.dtype) -> None:
    """Both sides' features, for every operator with two."""
    checks.check_features("first features", x)
    checks.check_features("second features", y)
    checks.check_alike(x, y, compute_dtype)


def check_positives(
    x: Tensor,
    y: Tensor,
    both: bool,
    positive_index: Tensor | None,
    row_group: Tensor | None,
    column_group: Tensor | None,
    first: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Positives and groups that fit the features; returned as the operators take them."""
    n, m = x.shape[0], y.shape[0]
    if positive_index is None and m < n:
        raise ValueError(
            f"{n} rows but only {m} columns; row i needs column i as its positive, further "
            "columns are hard negatives"
        )
    if not 0 <= first <= m:
        raise ValueError(f"negatives begin at column {first} of {m}")
    if positive_index is not None:
        assert not both and row_group is None and column_group is None
        checks.check_ids("positive_index", positive_index, n, x.device)
        positive_index = positive_index.contiguous().long()
    if (row_group is None) != (column_group is None):
        raise ValueError("give both row_group and column_group, or neither")
    if row_group is None or column_group is None:
        return positive_index, None, None
    checks.check_ids("row_group", row_group, n, x.device)
    checks.check_ids("column_group", column_group, m, x.device)
    dtype = torch.promote_types(row_group.dtype, column_group.dtype)
    return positive_index, row_group.to(dtype).contiguous(), column_group.to(dtype).contiguous()
