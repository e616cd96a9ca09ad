"""The sigmoid loss over S = scale * X @ Y.T + offset (Zhai et al. 2023), S never stored.

    row_i = sum_{j != i} softplus(S_ij) + softplus(-S_ii)

An entry's gradient depends on that entry alone, so a sum over rows, with weights or without, has
its gradient in the forward: three products of N x M x D forward and backward together. Rows with
upstream gradients of their own (`reduction="none"`) are computed again in the backward: four.

Shape suffixes: N rows and columns of this process, D feature width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip.ops import backend as backends
from fastclip.ops import checks, passes, problem, reference
from fastclip.ops.collectives import Ranks
from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.problem import Options
from fastclip.ops.registration import Backward, Tensors, register, wants_gradient


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    offset: Tensor | float | None = None,
    *,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
    positive_groups: bool = False,
    per_row: bool = False,
    weights: Tensor | None = None,
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
        row_group, column_group: (N,) ids; columns of a row's group other than its own are left out
            or, with `positive_groups`, positives.
        per_row: whether to return rows.
        weights: (N,), the rows' in the sum; not with `per_row`.
        ranks: the processes whose rows and columns these are part of. A sum's gradient is formed
            in the forward, so its upstream gradient must be the same on all ranks.
        backend, chunk_bytes, precision: as `fastclip.ops.similarity.similarity_statistics`.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together.
    """
    compute_dtype = checks.compute_dtype_of(x, precision)
    chunk = checks.chunk_argument(chunk_bytes)
    checks.check_pair(x, y, precision)
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{x.shape[0]} rows and {y.shape[0]} columns; every row needs its positive column"
        )
    scale = checks.as_scalar("logit_scale", scale, x)
    offset = None if offset is None else checks.as_scalar("logit_bias", offset, x)
    ids = checks.check_positives(x, y, False, None, row_group, column_group, 0)[1:]
    chosen = backends.choose("sigmoid", backend, x.device, compute_dtype)
    if chosen == "reference":
        with checks.without_autocast(x.device):
            options = problem.options(
                compute_dtype, chosen, chunk, ranks, positive_groups=positive_groups
            )
            rows = reference.sigmoid_rows(x, y, scale, offset, *ids, Options(**options))
        return rows if per_row else (rows if weights is None else rows * weights).sum()
    inputs = x, y, scale, offset
    checks.refuse_transforms(*(t for t in (*inputs, weights) if t is not None))
    options = problem.options(compute_dtype, chosen, chunk, ranks, positive_groups=positive_groups)
    if per_row:
        of_rows: Tensor = _rows(*inputs, *ids, **options)
        return of_rows
    needs = {"needs": wants_gradient(*inputs, weights)}
    column_N1 = None if weights is None else weights[:, None]
    total: Tensor = _sum(*inputs, column_N1, *ids, **options | needs)[0]
    return total


def _sigmoid(
    inputs: Tensors,
    upstream: Tensor | None,
    needs: Sequence[bool],
    options: Options,
    *,
    scaled: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    x, y, scale, offset, *ids = inputs
    need_x, need_y, need_scale, need_offset = needs
    with checks.without_autocast(x.device):
        asked = problem.rectangle(options, x, y, scale, offset, None, *ids)
        needs = need_x, need_y, need_scale, need_offset
        return passes.sigmoid(asked, upstream, needs, scaled=scaled)


def _forward_sum(*inputs: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    x, y, scale, offset, weights_N1, *ids = inputs
    asked, weights_N = Options(**options), None
    if weights_N1 is not None:
        weights_N = weights_N1[:, 0].to(accumulator_dtype(asked.dtype))
    rows_N, *gradients = _sigmoid((x, y, scale, offset, *ids), weights_N, asked.needs[:4], asked)
    gradients.append(rows_N[:, None] if asked.needs[4] else None)
    found = (rows_N.new_empty(0) if g is None else g for g in gradients)
    return rows_N.sum() if weights_N is None else torch.dot(rows_N, weights_N), *found


def _forward_rows(*inputs: Tensor | None, **options: Any) -> Tensor:
    return _sigmoid(inputs, None, (False,) * 4, Options(**options))[0]


def _gradient(
    inputs: Tensors, saved: Tensors, upstream: Tensors, options: Options
) -> tuple[Tensor | None, ...]:
    return _sigmoid(inputs, upstream[0], options.needs, options, scaled=True)[1:]


def _flop(shapes: Sequence[Any], options: Options) -> int:
    return problem.one_product(shapes[0], shapes[1], options) * (1 + sum(options.needs[:2]))


_sum = register(
    "sigmoid_sum",
    _forward_sum,
    inputs="x y scale offset? weights? row_group? column_group?",
    outputs=6,
    record=Options,
    fake=lambda inputs, options: [inputs[0].new_empty((), dtype=accumulator_dtype(options.dtype))],
    flop=_flop,
    gradients=5,
)
_rows = register(
    "sigmoid_rows",
    _forward_rows,
    inputs="x y scale offset? row_group? column_group?",
    outputs=1,
    record=Options,
    fake=lambda inputs, options: [
        inputs[0].new_empty(inputs[0].shape[0], dtype=accumulator_dtype(options.dtype))
    ],
    flop=_flop,
    backward=Backward(_gradient, inputs=4, saved=(), constant=(), flop=_flop),
)
