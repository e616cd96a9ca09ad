"""The last pass over gradients, and row-wise products.

    finish     out = total + coefficient * partner, row by row, cast once
    row_dot    sum over the width of a * b

All (R, D), rows contiguous; sums in float32.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.launch import INTERPRETED, launch
from fastclip.kernels.tile import rounded

ROWS, WIDTH = 16, 128


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["coefficient_ptr"])
def finish_kernel(
    total_ptr,
    coefficient_ptr,
    partner_ptr,
    out_ptr,
    stride_total,
    stride_partner,
    stride_out,
    rows,
    width,
    HAS_TERM: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles_d = tl.cdiv(width, BLOCK_D)
    pid = tl.program_id(0)
    i_r = (pid // tiles_d) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_d = (pid % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (i_r < rows)[:, None] & (i_d < width)[None, :]
    o_r = i_r.to(tl.int64)[:, None]
    total = tl.load(total_ptr + o_r * stride_total + i_d[None, :], mask=mask)
    if HAS_TERM:
        coefficient = tl.load(coefficient_ptr + i_r, mask=i_r < rows, other=0.0)
        partner = tl.load(partner_ptr + o_r * stride_partner + i_d[None, :], mask=mask, other=0.0)
        total += coefficient[:, None] * partner.to(tl.float32)
    p_out = out_ptr + o_r * stride_out + i_d[None, :]
    tl.store(p_out, rounded(total, out_ptr, EMULATE), mask=mask)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["out_ptr"])
def row_dot_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    stride_a,
    stride_b,
    rows,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_r = i_r.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        i_d = start + tl.arange(0, BLOCK_D)
        mask = (i_r < rows)[:, None] & (i_d < width)[None, :]
        a = tl.load(a_ptr + o_r * stride_a + i_d[None, :], mask=mask, other=0.0)
        b = tl.load(b_ptr + o_r * stride_b + i_d[None, :], mask=mask, other=0.0)
        total += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    tl.store(out_ptr + i_r, total, mask=i_r < rows)


def finish(total: Tensor, coefficient: Tensor | None, partner: Tensor | None, out: Tensor) -> None:
    """out (R, D) = total, plus coefficient (R,) * partner (R, D) where given."""
    rows, width = total.shape
    launch(
        finish_kernel,
        -(-rows // ROWS) * -(-width // WIDTH),
        total,
        total if coefficient is None else coefficient,
        total if partner is None else partner,
        out,
        total.stride(0),
        0 if partner is None else partner.stride(0),
        out.stride(0),
        rows,
        width,
        HAS_TERM=partner is not None,
        EMULATE=INTERPRETED,
        BLOCK_R=ROWS,
        BLOCK_D=WIDTH,
    )


def row_dot(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out (R,) = row sums of a * b, both (R, D)."""
    rows, width = a.shape
    launch(
        row_dot_kernel,
        -(-rows // ROWS),
        a,
        b,
        out,
        a.stride(0),
        b.stride(0),
        rows,
        width,
        BLOCK_R=ROWS,
        BLOCK_D=WIDTH,
    )
