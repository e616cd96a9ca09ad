"""The one-direction softmax loss, summed over rows, with its gradient in the forward.

    loss = sum_i w_i softplus(row_lse_i - positive_i)      (statistics as in `similarity.py`)

A row's log-sum-exp is complete when its chunk has been seen, so the same product serves the
statistics and G: three products of N x M x D forward and backward together, one without gradient.

Shape suffixes: N rows, M columns, D feature width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip.ops import backend as backends
from fastclip.ops import checks, passes, problem
from fastclip.ops.collectives import Ranks, check_columns
from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.numerics import softplus
from fastclip.ops.problem import Options
from fastclip.ops.registration import Tensors, register, wants_gradient
from fastclip.ops.similarity import similarity_statistics


def info_nce_sum(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    positive_index: Tensor | None = None,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
    first_negative: int = 0,
    columns_with_gradient: int | None = None,
    maxima: bool = True,
    weights: Tensor | None = None,
    ranks: Ranks | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
    precision: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The loss, 0-d, and each row's positive less its greatest negative, (N,), without gradient.

    Without `maxima` the second may be empty.

    Args:
        weights: (N,), the rows' in the sum.
        x, y, scale: and all others as `fastclip.ops.similarity.similarity_statistics` has them.

    Raises:
        ValueError: as there.
    """
    compute_dtype = checks.compute_dtype_of(x, precision)
    chosen = backends.choose("similarity", backend, x.device, compute_dtype)
    in_parts = ranks is not None and ranks.exchange == "ring"
    if chosen == "reference" or in_parts:
        # a ring brings a row's columns one part after the other: S is kept, or formed twice
        found = similarity_statistics(
            x,
            y,
            scale,
            column_statistics=False,
            positive_index=positive_index,
            row_group=row_group,
            column_group=column_group,
            first_negative=first_negative,
            columns_with_gradient=columns_with_gradient,
            maxima=maxima,
            ranks=ranks,
            backend=chosen,
            chunk_bytes=chunk_bytes,
            keep_bytes=keep_bytes,
            precision=precision,
        )
        margin = found.row_max
        if maxima:
            margin = found.positive.detach() - margin
        loss_N = softplus(found.row_lse - found.positive)
        return (loss_N if weights is None else loss_N * weights).sum(), margin
    chunk = checks.chunk_argument(chunk_bytes)
    checks.check_pair(x, y, precision)
    ids = checks.check_positives(
        x, y, False, positive_index, row_group, column_group, first_negative
    )
    scale = checks.as_scalar("logit_scale", scale, x)
    check_columns(ranks, y.shape[0])
    checks.refuse_transforms(x, y, scale, *(() if weights is None else (weights,)))
    options = problem.options(
        compute_dtype,
        chosen,
        chunk,
        ranks,
        needs=wants_gradient(x, y, scale, weights),
        maxima=True,
        first_negative=first_negative,
        columns_with_gradient=-1 if columns_with_gradient is None else columns_with_gradient,
    )
    column_N1 = None if weights is None else weights[:, None]
    loss, margin, *_ = _info_nce(x, y, scale, column_N1, *ids, **options)
    return loss, margin


def _forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    weights_N1: Tensor | None,
    positive_index: Tensor | None,
    row_group: Tensor | None,
    column_group: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    with checks.without_autocast(x.device):
        ids = positive_index, row_group, column_group
        asked = problem.rectangle(Options(**options), x, y, scale, None, *ids)
        need_x, need_y, need_scale, need_weights = options["needs"]
        weights_N = None if weights_N1 is None else weights_N1[:, 0].to(asked.tiles.dtype)
        needs = need_x, need_y, need_scale
        loss_N, margin, *gradients = passes.info_nce(asked, needs, weights_N)
    gradients.append(loss_N[:, None] if need_weights else None)
    loss = loss_N.sum() if weights_N is None else torch.dot(loss_N, weights_N)
    return loss, margin, *(loss.new_empty(0) if g is None else g for g in gradients)


def _fake(inputs: Tensors, options: Options) -> list[Tensor]:
    x, dtype = inputs[0], accumulator_dtype(options.dtype)
    return [x.new_empty(shape, dtype=dtype) for shape in ((), x.shape[:1])]


def _flop(shapes: Sequence[Any], options: Options) -> int:
    return problem.one_product(shapes[0], shapes[1], options) * (1 + sum(options.needs[:2]))


_info_nce = register(
    "info_nce",
    _forward,
    inputs="x y scale weights? positive_index? row_group? column_group?",
    outputs=6,
    record=Options,
    fake=_fake,
    flop=_flop,
    gradients=4,
)
