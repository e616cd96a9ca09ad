"""Cross-entropy between a teacher's and a student's softmax over S, neither matrix stored.

    row_i    = -sum_j softmax_j(T_i.) log_softmax_j(S_i.)       S = scale * X Y^T, the student's
    column_j = -sum_i softmax_i(T_.j) log_softmax_i(S_.j)       T = teacher_scale * U V^T

as in open_clip's `DistillClipLoss`. With lse the log-sum-exps and m the mean of S under the
teacher's softmax, row = lse(S) - m. The backward forms S and T again:
dS_ij = a_i (softmax_j(S_i.) - softmax_j(T_i.)) and likewise for columns. The teacher gets no
gradient. Six products forward and backward, two of them of the teacher's width.

Rows alone may be asked for, of any number of columns: what a process has of a loss that several
share, with its own images as rows and all texts as columns, and the reverse.

Shape suffixes: N rows, M columns, D and E widths of student and teacher, C rows of one chunk.
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
    columns: bool = True,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    precision: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Row and column cross-entropies, (N,) and (M,), float32 (float64 for float64 features).

    Args:
        x, y: (N, D) and (M, D), the student's features.
        teacher_x, teacher_y: (N, E) and (M, E), the teacher's.
        scale, teacher_scale: 0-d or (1,) tensors, or numbers.
        columns: whether those of columns are wanted, which else are empty.
        backend: "auto", "torch", or "reference", which differentiates the teacher too.
        chunk_bytes, precision: as `fastclip.ops.similarity.similarity_statistics`.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together, and when the
            teacher requires a gradient that the implementation does not give.
    """
    compute_dtype = checks.compute_dtype_of(x, precision)
    chunk = checks.chunk_argument(chunk_bytes)
    checks.check_pair(x, y, precision)
    teacher_dtype = checks.compute_dtype_of(teacher_x, precision)
    checks.check_pair(teacher_x, teacher_y, precision)
    counts = [t.shape[0] for t in (x, y, teacher_x, teacher_y)]
    if counts[:2] != counts[2:]:
        raise ValueError(f"student and teacher have {counts} rows; both need the same numbers")
    if x.device != teacher_x.device:
        raise ValueError(f"the student is on {x.device}, the teacher on {teacher_x.device}")
    scale = checks.as_scalar("logit_scale", scale, x)
    teacher_scale = checks.as_scalar("the teacher's logit scale", teacher_scale, x)
    inputs = (x, y, scale, teacher_x, teacher_y, teacher_scale)
    chosen = backends.choose("distillation", backend, x.device, compute_dtype)
    if chosen == "reference":
        with checks.without_autocast(x.device):
            row, column = reference.distillation(*inputs, compute_dtype, teacher_dtype)
            return row, column if columns else column[:0]
    checks.refuse_transforms(*inputs)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs[3:]):
        raise ValueError(
            "the teacher requires a gradient; compute its features under torch.no_grad(), or use "
            "backend='reference' to train it too"
        )
    row, column, *_ = _distillation(
        *inputs,
        dtype=compute_dtype,
        teacher_dtype=teacher_dtype,
        chunk_bytes=chunk,
        columns=columns,
        needs=(),
    )
    return row, column


class _Options(NamedTuple):
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    chunk_bytes: int
    columns: bool
    needs: tuple[bool, ...]


class _Problem:
    """S and T in chunks of rows, in two buffers that every step may overwrite."""

    def __init__(self, inputs: Tensors, options: _Options) -> None:
        x, y, scale, teacher_x, teacher_y, teacher_scale = inputs
        self.dtype = accumulator_dtype(options.dtype)
        self.x_ND, self.y_MD = (as_operand(t.to(options.dtype)) for t in (x, y))
        # the teacher is rounded to its own dtype, and held as the student where that is wider
        self.u_NE, self.v_ME = (
            as_operand(t.to(options.teacher_dtype)) for t in (teacher_x, teacher_y)
        )
        if self.u_NE.dtype != torch.bfloat16 or self.dtype == torch.float64:
            self.u_NE, self.v_ME = self.u_NE.to(self.dtype), self.v_ME.to(self.dtype)
        self.scale, self.teacher_scale = (
            away_from_zero(s.reshape(()), self.dtype) for s in (scale, teacher_scale)
        )
        self.n, self.m, device = x.shape[0], y.shape[0], x.device.type
        size = options.chunk_bytes
        self.chunk = chunk_rows(self.n, self.m, self.dtype.itemsize, size, device)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        S_buffer, T_buffer = (
            self.x_ND.new_empty((self.chunk, self.m), dtype=self.dtype) for _ in range(2)
        )
        for start, stop in chunks(0, self.n, self.chunk):
            S_CM, T_CM = S_buffer[: stop - start], T_buffer[: stop - start]
            product(self.x_ND[start:stop], self.y_MD.T, out=S_CM).mul_(self.scale)
            product(self.u_NE[start:stop], self.v_ME.T, out=T_CM).mul_(self.teacher_scale)
            yield slice(start, stop), S_CM, T_CM


def _forward(*inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
    x = inputs[0]
    with checks.without_autocast(x.device):
        asked = _Problem(inputs, _Options(**options))
        n, dtype = asked.n, asked.dtype
        m = asked.m if options["columns"] else 0
        lse_N, teacher_lse_N, mean_N = (x.new_empty(n, dtype=dtype) for _ in range(3))
        maximum, teacher_maximum = (x.new_full((m,), -torch.inf, dtype=dtype) for _ in range(2))
        total, teacher_total, weighted = (x.new_zeros(m, dtype=dtype) for _ in range(3))
        for rows, S_CM, T_CM in asked:
            lse_N[rows] = S_CM.logsumexp(dim=1)
            teacher_lse_N[rows] = T_CM.logsumexp(dim=1)
            P_CM = torch.softmax(T_CM, dim=1)
            mean_N[rows] = P_CM.mul_(S_CM).sum(dim=1)
            if m == 0:
                continue
            # columns, over the chunks so far
            found = torch.maximum(teacher_maximum, T_CM.amax(dim=0))
            T_CM.sub_(found).exp_()
            shrink = torch.exp(teacher_maximum - found)
            teacher_total.mul_(shrink).add_(T_CM.sum(dim=0))
            weighted.mul_(shrink).add_(T_CM.mul_(S_CM).sum(dim=0))
            teacher_maximum = found
            found = torch.maximum(maximum, S_CM.amax(dim=0))
            total.mul_(torch.exp(maximum - found)).add_(S_CM.sub_(found).exp_().sum(dim=0))
            maximum = found
        column_lse_M = total.log_().add_(maximum)
        column_mean_M = weighted.div_(teacher_total)
        teacher_column_lse_M = teacher_total.log_().add_(teacher_maximum)
    row, column = lse_N - mean_N, column_lse_M - column_mean_M
    return row, column, lse_N, column_lse_M, teacher_lse_N, teacher_column_lse_M


def _fake(inputs: Tensors, options: _Options) -> list[Tensor]:
    x, y, dtype = inputs[0], inputs[1], accumulator_dtype(options.dtype)
    n, m = x.shape[0], y.shape[0] if options.columns else 0
    return [x.new_empty(size, dtype=dtype) for size in (n, m, n, m, n, m)]


def _gradient(
    inputs: Tensors, saved: Tensors, upstream: Tensors, options: _Options
) -> tuple[Tensor | None, ...]:
    x, y, *_ = inputs
    lse_N, column_lse_M, teacher_lse_N, teacher_column_lse_M = saved
    d_row_N, d_column_M = (
        torch.zeros_like(lse) if one is None else one
        for one, lse in zip(upstream, (lse_N, column_lse_M), strict=True)
    )
    with checks.without_autocast(x.device):
        asked = _Problem(inputs, options)
        dx_ND = x.new_empty(x.shape, dtype=asked.dtype)
        dy_MD = y.new_zeros(y.shape, dtype=asked.dtype)
        dscale_N = x.new_empty(asked.n, dtype=asked.dtype)
        for rows, S_CM, T_CM in asked:
            G_CM = (S_CM - lse_N[rows, None]).exp_().sub_((T_CM - teacher_lse_N[rows, None]).exp_())
            G_CM.mul_(d_row_N[rows, None])
            if options.columns:
                column_CM = (S_CM - column_lse_M).exp_()
                column_CM.sub_(T_CM.sub_(teacher_column_lse_M).exp_())
                G_CM.addcmul_(column_CM, d_column_M)
            dscale_N[rows] = S_CM.mul_(G_CM).sum(dim=1)
            G_CM = G_CM.mul_(asked.scale).to(asked.x_ND.dtype)
            product(G_CM, asked.y_MD, out=dx_ND[rows])
            add_product(dy_MD, G_CM.T, asked.x_ND[rows])
    found = dx_ND, dy_MD, dscale_N.sum() / asked.scale
    return tuple(g if need else None for g, need in zip(found, options.needs, strict=True))


def _flop(shapes: Sequence[Sequence[int]], options: _Options) -> int:
    """S and T, once."""
    (n, d), (m, e) = shapes[0], shapes[4]
    return 2 * n * m * (d + e)


def _gradient_flop(shapes: Sequence[Sequence[int]], options: _Options) -> int:
    (n, d), (m, e) = shapes[0], shapes[4]
    return 2 * n * m * (3 * d + e)


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
