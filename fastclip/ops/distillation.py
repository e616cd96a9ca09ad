"""Cross-entropy between a teacher's and a student's softmax over S, neither matrix stored.

    row_i    = -sum_j softmax_j(T_i.) log_softmax_j(S_i.)       S = scale * X Y^T, the student's
    column_j = -sum_i softmax_i(T_.j) log_softmax_i(S_.j)       T = teacher_scale * U V^T

as in open_clip's `DistillClipLoss`. With lse the log-sum-exps and m the mean of S under the
teacher's softmax, row = lse(S) - m. The backward forms S and T again:
dS_ij = a_i (softmax_j(S_i.) - softmax_j(T_i.)) and likewise for columns. The teacher gets no
gradient. Six products forward and backward, two of them of the teacher's width.

Shape suffixes: N pairs, D and E widths of student and teacher, C rows of one chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastclip.ops import backend as backends
from fastclip.ops import checks, reference
from fastclip.ops.gemm import accumulator_dtype, add_product, as_operand, product
from fastclip.ops.similarity import check_pair
from fastclip.ops.tiles import away_from_zero, chunk_rows, chunks


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
    check_pair(x, y, compute_dtype)
    teacher_dtype = checks.compute_dtype_of(teacher_x, precision)
    check_pair(teacher_x, teacher_y, teacher_dtype)
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
    row, column, *_ = _distillation(*inputs, compute_dtype, teacher_dtype, chunk)
    return row, column


@torch.library.custom_op("fastclip::distillation", mutates_args=())
def _distillation(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    teacher_x: Tensor,
    teacher_y: Tensor,
    teacher_scale: Tensor,
    compute_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with checks.without_autocast(x.device):
        walk = _Walk(
            x,
            y,
            scale,
            teacher_x,
            teacher_y,
            teacher_scale,
            compute_dtype,
            teacher_dtype,
            chunk_bytes,
        )
        n, dtype = walk.n, walk.dtype
        lse_N, teacher_lse_N, mean_N = (x.new_empty(n, dtype=dtype) for _ in range(3))
        maximum, teacher_maximum = (x.new_full((n,), -torch.inf, dtype=dtype) for _ in range(2))
        total, teacher_total, weighted = (x.new_zeros(n, dtype=dtype) for _ in range(3))
        for start, stop, S_CN, T_CN in walk:
            lse_N[start:stop] = S_CN.logsumexp(dim=1)
            teacher_lse_N[start:stop] = T_CN.logsumexp(dim=1)
            P_CN = torch.softmax(T_CN, dim=1)
            mean_N[start:stop] = P_CN.mul_(S_CN).sum(dim=1)
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


@_distillation.register_fake
def _(x, y, scale, teacher_x, teacher_y, teacher_scale, dtype, *rest):
    return tuple(x.new_empty(x.shape[0], dtype=accumulator_dtype(dtype)) for _ in range(6))


@torch.library.custom_op("fastclip::distillation_backward", mutates_args=())
def _distillation_backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    teacher_x: Tensor,
    teacher_y: Tensor,
    teacher_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    teacher_row_lse: Tensor,
    teacher_column_lse: Tensor,
    d_row: Tensor,
    d_column: Tensor,
    compute_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with checks.without_autocast(x.device):
        walk = _Walk(
            x,
            y,
            scale,
            teacher_x,
            teacher_y,
            teacher_scale,
            compute_dtype,
            teacher_dtype,
            chunk_bytes,
        )
        dx_ND = x.new_empty(x.shape, dtype=walk.dtype)
        dy_ND = y.new_zeros(y.shape, dtype=walk.dtype)
        dscale_N = x.new_empty(walk.n, dtype=walk.dtype)
        for start, stop, S_CN, T_CN in walk:
            rows = slice(start, stop)
            G_CN = torch.exp(S_CN - row_lse[rows, None]).sub_(
                (T_CN - teacher_row_lse[rows, None]).exp_()
            )
            G_CN.mul_(d_row[rows, None])
            column_CN = torch.exp(S_CN - column_lse).sub_(T_CN.sub_(teacher_column_lse).exp_())
            G_CN.addcmul_(column_CN, d_column)
            dscale_N[rows] = S_CN.mul_(G_CN).sum(dim=1)
            G_CN = G_CN.mul_(walk.scale).to(walk.x_ND.dtype)
            product(G_CN, walk.y_ND, out=dx_ND[rows])
            add_product(dy_ND, G_CN.T, walk.x_ND[rows])
    return (
        dx_ND.to(x.dtype),
        dy_ND.to(y.dtype),
        (dscale_N.sum() / walk.scale).to(scale.dtype).reshape(scale.shape),
    )


@_distillation_backward.register_fake
def _(x, y, scale, *rest):
    return tuple(t.new_empty(t.shape) for t in (x, y, scale))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs[:6], *output[2:])
    ctx.options = inputs[6:]


def _autograd_backward(ctx: Any, d_row: Tensor, d_column: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = _distillation_backward(*ctx.saved_tensors, d_row, d_column, *ctx.options)
    needs = ctx.needs_input_grad[:3]
    wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return *wanted, *(None,) * 6


_distillation.register_autograd(_autograd_backward, setup_context=_setup_context)
_distillation_backward.register_autograd(checks.no_double_backward)


class _Walk:
    """Chunks of rows of S and T, in two buffers that every step may spend."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        teacher_x: Tensor,
        teacher_y: Tensor,
        teacher_scale: Tensor,
        compute_dtype: torch.dtype,
        teacher_dtype: torch.dtype,
        chunk_bytes: int,
    ) -> None:
        self.dtype = accumulator_dtype(compute_dtype)
        self.x_ND, self.y_ND = (as_operand(t.to(compute_dtype)) for t in (x, y))
        # the teacher is rounded to its own dtype, and held as the student where that is wider
        self.u_NE, self.v_NE = (as_operand(t.to(teacher_dtype)) for t in (teacher_x, teacher_y))
        if self.u_NE.dtype != torch.bfloat16:
            self.u_NE, self.v_NE = self.u_NE.to(self.dtype), self.v_NE.to(self.dtype)
        self.scale, self.teacher_scale = (
            away_from_zero(s.reshape(()), self.dtype) for s in (scale, teacher_scale)
        )
        self.n = x.shape[0]
        self.chunk = chunk_rows(self.n, self.n, self.dtype.itemsize, chunk_bytes, x.device.type)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        S_buffer, T_buffer = (
            self.x_ND.new_empty((self.chunk, self.n), dtype=self.dtype) for _ in range(2)
        )
        for start, stop in chunks(0, self.n, self.chunk):
            S_CN, T_CN = S_buffer[: stop - start], T_buffer[: stop - start]
            product(self.x_ND[start:stop], self.y_ND.T, out=S_CN).mul_(self.scale)
            product(self.u_NE[start:stop], self.v_NE.T, out=T_CN).mul_(self.teacher_scale)
            yield start, stop, S_CN, T_CN
