"""The one-direction softmax loss, summed over rows, with its gradient in the forward.

    loss = sum_i softplus(row_lse_i - positive_i)          (statistics as in `similarity.py`)

A row's log-sum-exp is complete when its chunk has been seen, so the same product serves the
statistics and G: three products of N x M x D forward and backward together, one without gradient.

Shape suffixes: N rows, M columns, D feature width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastclip.ops import backend as backends
from fastclip.ops import checks, rectangle
from fastclip.ops.collectives import Ranks, check_columns, plain, unplain
from fastclip.ops.forward_gradient import multiply_saved, save_gradients, wants_gradient
from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.similarity import (
    check_pair,
    check_positives,
    one_product,
    rectangle_of,
    similarity_statistics,
)
from fastclip.ops.tiles import softplus, tiles_of


def info_nce_sum(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    positive_index: Tensor | None = None,
    first: int = 0,
    trainable: int | None = None,
    ranks: Ranks | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    precision: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The loss, 0-d, and each row's positive less its greatest negative, (N,), without gradient.

    Arguments and errors are those of `fastclip.ops.similarity.similarity_statistics`.
    """
    compute_dtype = checks.compute_dtype_of(x, precision)
    chosen = backends.choose("similarity", backend, x.device, compute_dtype)
    in_parts = ranks is not None and ranks.way == "ring"
    if chosen == "reference" or in_parts:
        # a ring brings a row's columns one part after the other: S is formed twice
        found = similarity_statistics(
            x,
            y,
            scale,
            both=False,
            positive_index=positive_index,
            first=first,
            trainable=trainable,
            ranks=ranks,
            backend=chosen,
            chunk_bytes=chunk_bytes,
            precision=precision,
        )
        margin = found.positive.detach() - found.row_max
        return softplus(found.row_lse - found.positive).sum(), margin
    chunk = checks.chunk_argument(chunk_bytes)
    check_pair(x, y, compute_dtype)
    positive_index, _, _ = check_positives(x, y, False, positive_index, None, None, first)
    scale = checks.as_scalar("logit_scale", scale, x)
    check_columns(ranks, y.shape[0])
    checks.refuse_transforms(x, y, scale)
    return _info_nce(
        x,
        y,
        scale,
        positive_index,
        first,
        y.shape[0] if trainable is None else trainable,
        *plain(ranks),
        *wants_gradient(x, y, scale),
        compute_dtype,
        chosen,
        chunk,
    )[:2]


@torch.library.custom_op("fastclip::info_nce", mutates_args=())
def _info_nce(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positive_index: Tensor | None,
    first: int,
    trainable: int,
    way: str,
    group: str,
    sizes: Sequence[int],
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with checks.without_autocast(x.device):
        shape, columns = rectangle_of(
            x,
            y,
            False,
            unplain(way, group, sizes),
            positive_index,
            first=first,
            trainable=trainable,
        )
        loss, margin, *gradients = rectangle.info_nce(
            tiles_of(backend, compute_dtype),
            x.to(compute_dtype),
            y.to(compute_dtype),
            scale,
            shape,
            columns,
            (need_x, need_y, need_scale),
            chunk_bytes,
        )
    dx, dy, dscale = (loss.new_empty(0) if g is None else g for g in gradients)
    return loss, margin, dx, dy, dscale


@_info_nce.register_fake
def _(x, y, scale, positive_index, first, trainable, way, group, sizes, *rest):
    need_x, need_y, need_scale, compute_dtype = rest[:4]
    dtype = accumulator_dtype(compute_dtype)
    shapes = [(), x.shape[:1]]
    for shape, need in ((x.shape, need_x), (y.shape, need_y), ((), need_scale)):
        shapes.append(shape if need else (0,))
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save_gradients(ctx, inputs[:3], output[2:], output[1:2])


def _autograd_backward(ctx: Any, upstream: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    return *multiply_saved(ctx, upstream), *(None,) * 12


_info_nce.register_autograd(_autograd_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastclip.info_nce)
def _info_nce_flop(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    need_x, need_y = args[7:9]
    return one_product(x_shape, y_shape, *args[4:7]) * (1 + bool(need_x) + bool(need_y))
