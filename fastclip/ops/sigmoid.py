"""The sigmoid loss over S = scale * X @ Y.T + offset (Zhai et al. 2023), S never stored.

    row_i = sum_{j != i} softplus(S_ij) + softplus(-S_ii)

An entry's gradient depends on that entry alone, so a sum over rows has its gradient in the
forward: three products of N x M x D forward and backward together. Rows with upstream gradients
of their own (`reduction="none"`) are computed again in the backward: four.

Shape suffixes: N rows and columns of this process, D feature width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastclip.ops import backend as backends
from fastclip.ops import checks, rectangle, reference
from fastclip.ops.collectives import Ranks, plain, rows_of_all, unplain
from fastclip.ops.forward_gradient import multiply_saved, save_gradients, wants_gradient
from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.similarity import check_pair, one_product, rectangle_of
from fastclip.ops.tiles import tiles_of


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    offset: Tensor | float | None = None,
    *,
    per_row: bool = False,
    ranks: Ranks | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    precision: str = "auto",
) -> Tensor:
    """The sum of all rows' losses, 0-d, or the rows', (N,); float32 (float64 for float64).

    Args:
        x: (N, D) rows.
        y: (N, D) columns; row i's positive is column i.
        scale, offset: 0-d or (1,) tensors, or numbers.
        per_row: whether to return rows.
        ranks: the processes whose rows and columns these are part of. A sum's gradient is formed
            in the forward, so its upstream gradient must be the same on all ranks.
        backend, chunk_bytes, precision: as `fastclip.ops.similarity.similarity_statistics`.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together.
    """
    compute_dtype = checks.compute_dtype_of(x, precision)
    chunk = checks.chunk_argument(chunk_bytes)
    check_pair(x, y, compute_dtype)
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{x.shape[0]} rows and {y.shape[0]} columns; every row needs its positive column"
        )
    scale = checks.as_scalar("logit_scale", scale, x)
    offset = None if offset is None else checks.as_scalar("logit_bias", offset, x)
    chosen = backends.choose("sigmoid", backend, x.device, compute_dtype)
    if chosen == "reference":
        with checks.without_autocast(x.device):
            start = 0
            if ranks is not None:
                y = rows_of_all(y, ranks, ranks.sizes)
                start = sum(ranks.sizes[: ranks.rank])
            rows = reference.sigmoid_rows(x, y, scale, offset, start, compute_dtype)
        return rows if per_row else rows.sum()
    inputs = [t for t in (x, y, scale, offset) if t is not None]
    checks.refuse_transforms(*inputs)
    options = (*plain(ranks), compute_dtype, chosen, chunk)
    if per_row:
        return _rows(x, y, scale, offset, *options)
    return _sum(x, y, scale, offset, *wants_gradient(x, y, scale, offset), *options)[0]


@torch.library.custom_op("fastclip::sigmoid_sum", mutates_args=())
def _sum(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_offset: bool,
    way: str,
    group: str,
    sizes: Sequence[int],
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = (need_x, need_y, need_scale, need_offset)
    rows, *gradients = _walk(
        x, y, scale, offset, None, needs, way, group, sizes, compute_dtype, backend, chunk_bytes
    )
    dx, dy, dscale, doffset = (rows.new_empty(0) if g is None else g for g in gradients)
    return rows.sum(), dx, dy, dscale, doffset


@_sum.register_fake
def _(x, y, scale, offset, need_x, need_y, need_scale, need_offset, *rest):
    dtype = accumulator_dtype(rest[3])
    wanted = ((x.shape, need_x), (y.shape, need_y), ((), need_scale), ((), need_offset))
    shapes = [(), *(shape if need else (0,) for shape, need in wanted)]
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


def _sum_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save_gradients(ctx, inputs[:4], output[1:], ())


def _sum_backward(ctx: Any, upstream: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    return *multiply_saved(ctx, upstream), *(None,) * 10


_sum.register_autograd(_sum_backward, setup_context=_sum_context)


@torch.library.custom_op("fastclip::sigmoid_rows", mutates_args=())
def _rows(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    way: str,
    group: str,
    sizes: Sequence[int],
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> Tensor:
    needs = (False, False, False, False)
    return _walk(
        x, y, scale, offset, None, needs, way, group, sizes, compute_dtype, backend, chunk_bytes
    )[0]


@_rows.register_fake
def _(x, y, scale, offset, way, group, sizes, dtype, *rest):
    return x.new_empty(x.shape[0], dtype=accumulator_dtype(dtype))


@torch.library.custom_op("fastclip::sigmoid_rows_backward", mutates_args=())
def _rows_gradient(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    upstream: Tensor,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    need_offset: bool,
    way: str,
    group: str,
    sizes: Sequence[int],
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = (need_x, need_y, need_scale, need_offset)
    _, *gradients = _walk(
        x, y, scale, offset, upstream, needs, way, group, sizes, compute_dtype, backend, chunk_bytes
    )
    dx, dy, dscale, doffset = (
        upstream.new_empty(0)
        if g is None or t is None
        else g.to(t.dtype, copy=True).reshape(t.shape)
        for g, t in zip(gradients, (x, y, scale, offset), strict=True)
    )
    return dx, dy, dscale, doffset


@_rows_gradient.register_fake
def _(x, y, scale, offset, upstream, need_x, need_y, need_scale, need_offset, *rest):
    wanted = ((x, need_x), (y, need_y), (scale, need_scale), (offset, need_offset))
    return tuple(t.new_empty(t.shape) if need else upstream.new_empty(0) for t, need in wanted)


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.set_materialize_grads(False)
    ctx.options = inputs[4:]


def _rows_backward(ctx: Any, upstream: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:4]
    if upstream is None:
        return (None,) * 10
    gradients = _rows_gradient(*ctx.saved_tensors, upstream, *needs, *ctx.options)
    wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return *wanted, *(None,) * 6


_rows.register_autograd(_rows_backward, setup_context=_rows_context)
_rows_gradient.register_autograd(checks.no_double_backward)


def _walk(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    upstream: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    way: str,
    group: str,
    sizes: Sequence[int],
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    with checks.without_autocast(x.device):
        shape, columns = rectangle_of(x, y, False, unplain(way, group, sizes))
        return rectangle.sigmoid(
            tiles_of(backend, compute_dtype),
            x.to(compute_dtype),
            y.to(compute_dtype),
            scale,
            offset,
            upstream,
            shape,
            columns,
            needs,
            chunk_bytes,
        )


@register_flop_formula(torch.ops.fastclip.sigmoid_sum)
def _sum_flop(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    need_x, need_y = args[2:4]
    return one_product(x_shape, y_shape, *args[6:9]) * (1 + bool(need_x) + bool(need_y))


@register_flop_formula(torch.ops.fastclip.sigmoid_rows)
def _rows_flop(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    return one_product(x_shape, y_shape, *args[2:5])


@register_flop_formula(torch.ops.fastclip.sigmoid_rows_backward)
def _rows_gradient_flop(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    need_x, need_y = args[3:5]
    return one_product(x_shape, y_shape, *args[7:10]) * (1 + bool(need_x) + bool(need_y))
