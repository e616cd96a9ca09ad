"""Cross-entropy between a teacher's and a student's softmax over S, neither matrix stored.

    row_i    = -sum_j softmax_j(T_i.) log_softmax_j(S_i.)       S = scale * X Y^T, the student's
    column_j = -sum_i softmax_i(T_.j) log_softmax_i(S_.j)       T = teacher_scale * U V^T

as in open_clip's `DistillClipLoss`. With lse the log-sum-exps and m the mean of S under the
teacher's softmax, row = lse(S) - m. The backward forms S and T again:
dS_ij = a_i (softmax_j(S_i.) - softmax_j(T_i.)) and likewise for columns. The teacher gets no
gradient. Six products forward and backward, two of them of the teacher's width.

Shape suffixes: N pairs, D and E widths of student and teacher, C rows of one chunk.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.ops import backend as backends
from fastclip.ops import checks, reference
from fastclip.ops.chunks import chunk_rows, chunks
from fastclip.ops.gemm import accumulator_dtype, add_product, as_operand, product
from fastclip.ops.numerics import away_from_zero
from fastclip.ops.registration import Backward, Tensors, register


def distillation(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    teacher_x: Tensor,
    teacher_y: Tensor,
    teacher_scale: Tensor | float,
    *,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    precision: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Row and column cross-entropies, each (N,), float32 (float64 for float64 features).

    Args:
        x, y: (N, D), the student's features.
        teacher_x, teacher_y: (N, E), the teacher's.
        scale, teacher_scale: 0-d or (1,) tensors, or numbers.
        backend: "auto", "torch", or "reference", which differentiates the teacher too.
        chunk_bytes, precision: as `fastclip.ops.similarity.similarity_statistics`.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together, and when the
            teacher requires a gradient that the implementation does not give.
    """
    compute_dtype = checks.compute_dtype_of(x, precision)
    chunk = checks.chunk_argument(chunk_bytes)
    checks.check_pair(x, y, compute_dtype)
    teacher_dtype = checks.compute_dtype_of(teacher_x, precision)
    checks.check_pair(teacher_x, teacher_y, teacher_dtype)
    if len({t.shape[0] for t in (x, y, teacher_x, teacher_y)}) != 1:
        counts = [t.shape[0] for t in (x, y, teacher_x, teacher_y)]
        raise ValueError(f"student and teacher have {counts} rows; all need the same number")
    if x.device != teacher_x.device:
        raise ValueError(f"the student is on {x.device}, the teacher on {teacher_x.device}")
    scale = checks.as_scalar("logit_scale", scale, x)
    teacher_scale = checks.as_scalar("dist_logit_scale", teacher_scale, x)
    inputs = (x, y, scale, teacher_x, teacher_y, teacher_scale)
    chosen = backends.choose("distillation", backend, x.device, compute_dtype)
    if chosen == "reference":
        with checks.without_autocast(x.device):
            return reference.distillation(*inputs, compute_dtype, teacher_dtype)
    checks.refuse_transforms(*inputs)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs[3:]):
        raise ValueError(
            "the teacher requires a gradient; compute its features under torch.no_grad(), or use "
            "backend='reference' to train it too"
        )
    row, column, *_ = _distillation(
        *inputs, dtype=compute_dtype, teacher_dtype=teacher_dtype, chunk_bytes=chunk, needs=()
    )
    return row, column


class _Options(NamedTuple):
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    chunk_bytes: int
    needs: tuple[bool, ...]


class _Problem:
    """S and T in chunks of rows, in two buffers that every step may overwrite."""

    def __init__(self, inputs: Tensors, options: _Options) -> None:
        x, y, scale, teacher_x, teacher_y, teacher_scale = inputs
        self.dtype = accumulator_dtype(options.dtype)
        self.x_ND, self.y_ND = (as_operand(t.to(options.dtype)) for t in (x, y))
        # the teacher is rounded to its own dtype, and held as the student where that is wider
        self.u_NE, self.v_NE = (
            as_operand(t.to(options.teacher_dtype)) for t in (teacher_x, teacher_y)
        )
        if self.u_NE.dtype != torch.bfloat16:
            self.u_NE, self.v_NE = self.u_NE.to(self.dtype), self.v_NE.to(self.dtype)
        self.scale, self.teacher_scale = (
            away_from_zero(s.reshape(()), self.dtype) for s in (scale, teacher_scale)
        )
        self.n, device = x.shape[0], x.device.type
        size = options.chunk_bytes
        self.chunk = chunk_rows(self.n, self.n, self.dtype.itemsize, size, device)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        S_buffer, T_buffer = (
            self.x_ND.new_empty((self.chunk, self.n), dtype=self.dtype) for _ in range(2)
        )
        for start, stop in chunks(0, self.n, self.chunk):
            S_CN, T_CN = S_buffer[: stop - start], T_buffer[: stop - start]
            product(self.x_ND[start:stop], self.y_ND.T, out=S_CN).mul_(self.scale)
            product(self.u_NE[start:stop], self.v_NE.T, out=T_CN).mul_(self.teacher_scale)
            yield slice(start, stop), S_CN, T_CN


def _forward(*inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
    x = inputs[0]
    with checks.without_autocast(x.device):
        asked = _Problem(inputs, _Options(**options))
        n, dtype = asked.n, asked.dtype
        lse_N, teacher_lse_N, mean_N = (x.new_empty(n, dtype=dtype) for _ in range(3))
        maximum, teacher_maximum = (x.new_full((n,), -torch.inf, dtype=dtype) for _ in range(2))
        total, teacher_total, weighted = (x.new_zeros(n, dtype=dtype) for _ in range(3))
        for rows, S_CN, T_CN in asked:
            lse_N[rows] = S_CN.logsumexp(dim=1)
            teacher_lse_N[rows] = T_CN.logsumexp(dim=1)
            P_CN = torch.softmax(T_CN, dim=1)
            mean_N[rows] = P_CN.mul_(S_CN).sum(dim=1)
            # columns, over the chunks so far
            found = torch.maximum(teacher_maximum, T_CN.amax(dim=0))
            T_CN.sub_(found).exp_()
            shrink = torch.exp(teacher_maximum - found)
            teacher_total.mul_(shrink).add_(T_CN.sum(dim=0))
            weighted.mul_(shrink).add_(T_CN.mul_(S_CN).sum(dim=0))
            teacher_maximum = found
            found = torch.maximum(maximum, S_CN.amax(dim=0))
            total.mul_(torch.exp(maximum - found)).add_(S_CN.sub_(found).exp_().sum(dim=0))
            maximum = found
        column_lse_N = total.log_().add_(maximum)
        column_mean_N = weighted.div_(teacher_total)
        teacher_column_lse_N = teacher_total.log_().add_(teacher_maximum)
    row, column = lse_N - mean_N, column_lse_N - column_mean_N
    return row, column, lse_N, column_lse_N, teacher_lse_N, teacher_column_lse_N


def _fake(inputs: Tensors, options: _Options) -> list[Tensor]:
    x = inputs[0]
    return [x.new_empty(x.shape[0], dtype=accumulator_dtype(options.dtype)) for _ in range(6)]


def _gradient(
    inputs: Tensors, saved: Tensors, upstream: Tensors, options: _Options
) -> tuple[Tensor | None, ...]:
    x, y, *_ = inputs
    lse_N, column_lse_N, teacher_lse_N, teacher_column_lse_N = saved
    d_row_N, d_column_N = (torch.zeros_like(lse_N) if one is None else one for one in upstream)
    with checks.without_autocast(x.device):
        asked = _Problem(inputs, options)
        dx_ND = x.new_empty(x.shape, dtype=asked.dtype)
        dy_ND = y.new_zeros(y.shape, dtype=asked.dtype)
        dscale_N = x.new_empty(asked.n, dtype=asked.dtype)
        for rows, S_CN, T_CN in asked:
            G_CN = torch.exp(S_CN - lse_N[rows, None]).sub_(
                (T_CN - teacher_lse_N[rows, None]).exp_()
            )
            G_CN.mul_(d_row_N[rows, None])
            column_CN = torch.exp(S_CN - column_lse_N).sub_(T_CN.sub_(teacher_column_lse_N).exp_())
            G_CN.addcmul_(column_CN, d_column_N)
            dscale_N[rows] = S_CN.mul_(G_CN).sum(dim=1)
            G_CN = G_CN.mul_(asked.scale).to(asked.x_ND.dtype)
            product(G_CN, asked.y_ND, out=dx_ND[rows])
            add_product(dy_ND, G_CN.T, asked.x_ND[rows])
    found = dx_ND, dy_ND, dscale_N.sum() / asked.scale
    return tuple(g if need else None for g, need in zip(found, options.needs, strict=True))


def _flop(shapes: Sequence[Sequence[int]], options: _Options) -> int:
    """S and T, once."""
    (n, d), (_, e) = shapes[0], shapes[3]
    return 2 * n * n * (d + e)


def _gradient_flop(shapes: Sequence[Sequence[int]], options: _Options) -> int:
    (n, d), (_, e) = shapes[0], shapes[3]
    return 2 * n * n * (3 * d + e)


_distillation = register(
    "distillation",
    _forward,
    inputs="x y scale teacher_x teacher_y teacher_scale",
    outputs=6,
    record=_Options,
    fake=_fake,
    flop=_flop,
    backward=Backward(
        _gradient, inputs=3, saved=(2, 3, 4, 5), constant=(2, 3, 4, 5), flop=_gradient_flop
    ),
)
