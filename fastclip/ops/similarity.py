"""Statistics of `S = scale * X @ Y.T` that contrastive losses need, without ever storing S.

For row i the positive is column i; its negatives N(i) are the other columns, less those of its
own group. The operator returns, per pair,

    row_lse_i     = logsumexp of S_ij over j in N(i)
    column_lse_j  = logsumexp of S_ij over i with j in N(i)      (the first N columns)
    positive_i    = S_ii
    row_mean_i    = mean of S_ij over all columns                (on request)
    column_mean_j = mean of S_ij over all rows                   (on request)

and every softmax loss is a short formula of them, e.g. CLIP's row term is
softplus(row_lse - positive). Keeping positives out of the sums is what makes the gradient exact
where a softmax saturates: p - 1 never has to be formed.

A forward costs one N x M x D product, a backward three (S again, dX, dY).

Shape suffixes: N rows, M columns (M >= N), D feature width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastclip.ops import backend as backends
from fastclip.ops import chunked, reference
from fastclip.ops.gemm import accumulator_dtype


class Statistics(NamedTuple):
    """Per-pair statistics, each (N,) in float32 (float64 for float64 features)."""

    row_lse: Tensor
    column_lse: Tensor
    positive: Tensor
    row_mean: Tensor
    column_mean: Tensor


def similarity_statistics(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
    means: bool = False,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    precision: str = "auto",
) -> Statistics:
    """Differentiable statistics of `scale * x @ y.T`; see the module's docstring.

    Args:
        x: (N, D) rows, N >= 1.
        y: (M, D) columns, M >= N, on x's device and, unless autocast casts both, of its dtype;
            column i is row i's positive.
        scale: 0-d or (1,) tensor, or a number; not zero.
        row_group, column_group: (N,) and (M,) integer ids, both or neither. Columns of a row's
            group other than its positive are left out of the negatives.
        means: whether row_mean and column_mean are wanted; otherwise they are empty.
        backend: "auto", "torch" or "reference".
        chunk_bytes: size of a chunk of S, of which up to three are alive; None takes a fixed
            default.
        precision: "auto" computes in autocast's dtype where autocast is on; "input" in x's dtype.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together.
    """
    compute_dtype = _compute_dtype(x, precision)
    _check_features(x, y, compute_dtype)
    scale = _as_scalar(scale, x)
    _check_groups(row_group, column_group, x, y)
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; give a positive number of bytes or None")
    chosen = backends.choose("similarity", backend, x.device, compute_dtype)
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            dense = reference.similarity_statistics(
                x, y, scale, row_group, column_group, compute_dtype
            )
        return Statistics(*dense)
    _refuse_forward_mode(x, y, scale)
    return Statistics(
        *_statistics(
            x, y, scale, row_group, column_group, means, compute_dtype, chosen, chunk_bytes or 0
        )
    )


@torch.library.custom_op("fastclip::similarity_statistics", mutates_args=())
def _statistics(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_group: Tensor | None,
    column_group: Tensor | None,
    means: bool,
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return _FORWARD[backend](
            x.to(compute_dtype),
            y.to(compute_dtype),
            scale,
            row_group,
            column_group,
            means,
            chunk_bytes,
        )


@_statistics.register_fake
def _(x, y, scale, row_group, column_group, means, compute_dtype, backend, chunk_bytes):
    n, dtype = x.shape[0], accumulator_dtype(compute_dtype)
    mean_size = n if means else 0
    sizes = (n, n, n, mean_size, mean_size)
    return tuple(x.new_empty(size, dtype=dtype) for size in sizes)


@torch.library.custom_op("fastclip::similarity_statistics_backward", mutates_args=())
def _statistics_backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_group: Tensor | None,
    column_group: Tensor | None,
    row_lse: Tensor,
    column_lse: Tensor,
    d_row_lse: Tensor,
    d_column_lse: Tensor,
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
    with torch.autocast(x.device.type, enabled=False):
        dx, dy, dscale = _BACKWARD[backend](
            x.to(compute_dtype),
            y.to(compute_dtype),
            scale,
            row_group,
            column_group,
            row_lse,
            column_lse,
            (d_row_lse, d_column_lse, d_positive, d_row_mean, d_column_mean),
            (need_x, need_y, need_scale),
            chunk_bytes,
        )
    return (
        x.new_empty(0) if dx is None else dx.to(x.dtype),
        y.new_empty(0) if dy is None else dy.to(y.dtype),
        scale.new_empty(0) if dscale is None else dscale.to(scale.dtype).reshape(scale.shape),
    )


@_statistics_backward.register_fake
def _(x, y, scale, *rest):
    need_x, need_y, need_scale = rest[9:12]
    wanted = ((x, need_x), (y, need_y), (scale, need_scale))
    return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in wanted)


_FORWARD = {"torch": chunked.statistics_forward}
_BACKWARD = {"torch": chunked.statistics_backward}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, row_group, column_group, means, compute_dtype, backend, chunk_bytes = inputs
    row_lse, column_lse = output[:2]
    ctx.save_for_backward(x, y, scale, row_group, column_group, row_lse, column_lse)
    ctx.means, ctx.options = means, (compute_dtype, backend, chunk_bytes)


def _autograd_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    x, y, scale, row_group, column_group, row_lse, column_lse = ctx.saved_tensors
    zeros = torch.zeros_like(row_lse)
    filled = [zeros if gradient is None else gradient for gradient in upstream]
    needs = ctx.needs_input_grad[:3]
    gradients = _statistics_backward(
        x,
        y,
        scale,
        row_group,
        column_group,
        row_lse,
        column_lse,
        *filled[:3],
        *(filled[3:] if ctx.means else (None, None)),
        *needs,
        *ctx.options,
    )
    wanted = tuple(g if need else None for g, need in zip(gradients, needs, strict=True))
    return *wanted, None, None, None, None, None, None


def _no_double_backward(ctx: Any, *upstream: Tensor | None) -> None:
    raise RuntimeError(
        "fastclip's fused losses are differentiable once; use backend='reference' "
        "for second derivatives"
    )


_statistics.register_autograd(_autograd_backward, setup_context=_setup_context)
_statistics_backward.register_autograd(_no_double_backward)


@register_flop_formula(torch.ops.fastclip.similarity_statistics)
def _statistics_flop(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * y_shape[0] * x_shape[1]


@register_flop_formula(torch.ops.fastclip.similarity_statistics_backward)
def _statistics_backward_flop(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    need_x, need_y = args[10], args[11]
    return 2 * x_shape[0] * y_shape[0] * x_shape[1] * (1 + bool(need_x) + bool(need_y))


def _compute_dtype(x: Tensor, precision: str) -> torch.dtype:
    if precision not in ("auto", "input"):
        raise ValueError(f"precision is {precision!r}; use 'auto' or 'input'")
    # autocast itself leaves float64 alone
    if precision == "input" or x.dtype == torch.float64:
        return x.dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _as_scalar(scale: Tensor | float, x: Tensor) -> Tensor:
    if not isinstance(scale, Tensor):
        return torch.tensor(scale, dtype=accumulator_dtype(x.dtype), device=x.device)
    if scale.numel() != 1:
        raise ValueError(f"logit_scale has shape {tuple(scale.shape)}; give a 0-d or (1,) tensor")
    if scale.device.type == "cpu" and scale.ndim == 0:
        # as in torch's own arithmetic, a number on the CPU goes anywhere
        return scale.to(x.device)
    if scale.device != x.device:
        raise ValueError(
            f"logit_scale is on {scale.device} but the features are on {x.device}; move one of them"
        )
    return scale


def _check_features(x: Tensor, y: Tensor, compute_dtype: torch.dtype) -> None:
    for name, features in (("first", x), ("second", y)):
        if type(features).__name__ == "DTensor":
            raise ValueError(
                f"the {name} features are a DTensor; pass its local part (x.to_local())"
            )
        if features.ndim != 2:
            raise ValueError(
                f"the {name} features have shape {tuple(features.shape)}; give (rows, width)"
            )
        if not features.is_floating_point():
            raise ValueError(f"the {name} features are {features.dtype}; give floating point")
    if x.device != y.device:
        raise ValueError(f"the features are on {x.device} and {y.device}; move them to one device")
    # under autocast the towers may end in different dtypes, and both are cast to its own
    cast = compute_dtype != x.dtype or torch.is_autocast_enabled(x.device.type)
    if x.dtype != y.dtype and (not cast or torch.float64 in (x.dtype, y.dtype)):
        raise ValueError(f"the features are {x.dtype} and {y.dtype}; cast them to one dtype")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"the features are {x.shape[1]} and {y.shape[1]} wide; both sides need one width"
        )
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"the features have shape {tuple(x.shape)}; at least one row is needed")
    if y.shape[0] < x.shape[0]:
        raise ValueError(
            f"{x.shape[0]} rows but only {y.shape[0]} columns; row i needs column i as its "
            "positive, further columns are hard negatives"
        )


def _check_groups(
    row_group: Tensor | None, column_group: Tensor | None, x: Tensor, y: Tensor
) -> None:
    if row_group is None and column_group is None:
        return
    if row_group is None or column_group is None:
        raise ValueError("give both row_group and column_group, or neither")
    for name, group, features in (("row_group", row_group, x), ("column_group", column_group, y)):
        if group.shape != features.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(group.shape)}; one id per row, ({features.shape[0]},)"
            )
        if group.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is {group.dtype}; give int32 or int64 ids")
        if group.device != features.device:
            raise ValueError(f"{name} is on {group.device}, the features on {features.device}")


def _refuse_forward_mode(*inputs: Tensor) -> None:
    # Forward mode through a custom op silently gives a zero tangent.
    if torch.compiler.is_compiling():
        return
    for value in inputs:
        if torch.autograd.forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                "fastclip's fused losses have no forward-mode derivative; "
                "use backend='reference' for it"
            )
