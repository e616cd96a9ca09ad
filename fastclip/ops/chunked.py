"""The `torch` implementation: rows in chunks, memory O((N + M) D + chunk M), any device.

Shape suffixes: N rows, M columns, D width, C rows of one chunk. S is never rounded: products
arrive in the accumulator's dtype, where scale, exponentials and sums happen too. Every reduction
runs in a fixed order, so a shape gives the same bits every time on the same device.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastclip.ops.gemm import accumulator_dtype, add_product, as_operand, product

# Large enough that the products run at full speed and dY is swept few times, small enough that
# the sweeps over a chunk stay near the cache. Fixed, so that a shape has one summation order.
DEFAULT_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
MINIMUM_CHUNK_ROWS = 16


def chunk_rows(rows: int, columns: int, itemsize: int, chunk_bytes: int, device_type: str) -> int:
    """Rows of S held at a time; `chunk_bytes` 0 means the device's default."""
    budget = chunk_bytes or DEFAULT_CHUNK_BYTES.get(device_type, 64 << 20)
    fitting = max(budget // (columns * itemsize), 1 if chunk_bytes else MINIMUM_CHUNK_ROWS)
    # equal chunks: a short last one would run its products at a worse rate
    count = -(-rows // fitting)
    return -(-rows // count)


def statistics_forward(
    x_ND: Tensor,
    y_MD: Tensor,
    scale: Tensor,
    row_group_N: Tensor | None,
    column_group_M: Tensor | None,
    means: bool,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five statistics of `fastclip.ops.similarity`; 1 product of N x M x D."""
    n, m = x_ND.shape[0], y_MD.shape[0]
    x_ND, y_MD = as_operand(x_ND), as_operand(y_MD)
    dtype = accumulator_dtype(x_ND.dtype)
    scale = scale.reshape(()).to(dtype)
    chunk = chunk_rows(n, m, dtype.itemsize, chunk_bytes, x_ND.device.type)

    row_lse_N = x_ND.new_empty(n, dtype=dtype)
    column_max_N = x_ND.new_full((n,), -torch.inf, dtype=dtype)
    column_sum_N = x_ND.new_zeros(n, dtype=dtype)
    S_buffer = x_ND.new_empty((chunk, m), dtype=dtype)
    exp_buffer = torch.empty_like(S_buffer)
    for start, stop in _chunks(n, chunk):
        S_CM = S_buffer[: stop - start]
        exp_CM = exp_buffer[: stop - start]
        product(x_ND[start:stop], y_MD.T, out=S_CM).mul_(scale)
        _leave_out(S_CM, start, row_group_N, column_group_M)

        row_max_C = _finite(S_CM.amax(dim=1))
        torch.sub(S_CM, row_max_C[:, None], out=exp_CM).exp_()
        row_lse_N[start:stop] = exp_CM.sum(dim=1).log_().add_(row_max_C)

        S_CN, exp_CN = S_CM[:, :n], exp_CM[:, :n]
        new_max_N = torch.maximum(column_max_N, S_CN.amax(dim=0))
        anchor_N = _finite(new_max_N)
        torch.sub(S_CN, anchor_N, out=exp_CN).exp_()
        column_sum_N.mul_(torch.exp(column_max_N - anchor_N)).add_(exp_CN.sum(dim=0))
        column_max_N = new_max_N
    column_lse_N = column_sum_N.log_().add_(_finite(column_max_N))

    x_ND, y_MD = x_ND.to(dtype), y_MD.to(dtype)
    positive_N = _row_dot(x_ND, y_MD[:n]).mul_(scale)
    if not means:
        none = x_ND.new_empty(0, dtype=dtype)
        return row_lse_N, column_lse_N, positive_N, none, none.clone()
    row_mean_N = torch.mv(x_ND, y_MD.mean(dim=0)).mul_(scale)
    column_mean_N = torch.mv(y_MD[:n], x_ND.mean(dim=0)).mul_(scale)
    return row_lse_N, column_lse_N, positive_N, row_mean_N, column_mean_N


def statistics_backward(
    x_ND: Tensor,
    y_MD: Tensor,
    scale: Tensor,
    row_group_N: Tensor | None,
    column_group_M: Tensor | None,
    row_lse_N: Tensor,
    column_lse_N: Tensor,
    upstream: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    needs: tuple[bool, bool, bool],
    chunk_bytes: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX, dY (accumulator's dtype) and dscale; at most 3 products of N x M x D.

    With upstream gradients a (row_lse) and b (column_lse), the gradient of a negative's logit is
    G_ij = a_i exp(S_ij - row_lse_i) + b_j exp(S_ij - column_lse_j); positives and means are added
    afterwards, outside the product.
    """
    n, m = x_ND.shape[0], y_MD.shape[0]
    x_ND, y_MD = as_operand(x_ND), as_operand(y_MD)
    dtype = accumulator_dtype(x_ND.dtype)
    scale = scale.reshape(()).to(dtype)
    need_x, need_y, need_scale = needs
    d_row_lse_N, d_column_lse_N, d_positive_N, d_row_mean_N, d_column_mean_N = upstream
    # A line without negatives has lse -inf, all exponents -inf: any finite anchor gives exp 0.
    row_anchor_N, column_anchor_N = _finite(row_lse_N), _finite(column_lse_N)
    chunk = chunk_rows(n, m, dtype.itemsize, chunk_bytes, x_ND.device.type)

    dx_ND = x_ND.new_empty(x_ND.shape, dtype=dtype) if need_x else None
    dy_MD = y_MD.new_zeros(y_MD.shape, dtype=dtype) if need_y else None
    dscale_N = x_ND.new_empty(n, dtype=dtype) if need_scale else None
    S_buffer = x_ND.new_empty((chunk, m), dtype=dtype)
    G_buffer = torch.empty_like(S_buffer)
    for start, stop in _chunks(n, chunk):
        S_CM = S_buffer[: stop - start]
        G_CM = G_buffer[: stop - start]
        product(x_ND[start:stop], y_MD.T, out=S_CM).mul_(scale)
        _leave_out(S_CM, start, row_group_N, column_group_M)

        torch.sub(S_CM, row_anchor_N[start:stop, None], out=G_CM).exp_()
        G_CM.mul_(d_row_lse_N[start:stop, None])
        # a second buffer only for the columns' term: S itself is needed for dscale
        column_CN = torch.sub(S_CM[:, :n], column_anchor_N).exp_()
        G_CM[:, :n].addcmul_(column_CN, d_column_lse_N)
        del column_CN

        if dscale_N is not None:
            # sum of G * S here, divided by the scale at the end; -inf would make 0 * -inf
            _leave_out(S_CM, start, row_group_N, column_group_M, value=0.0)
            torch.sum(S_CM.mul_(G_CM), dim=1, out=dscale_N[start:stop])
        G_CM = G_CM.to(x_ND.dtype)
        if dx_ND is not None:
            product(G_CM, y_MD, out=dx_ND[start:stop])
        if dy_MD is not None:
            add_product(dy_MD, G_CM.T, x_ND[start:stop])

    x_ND, y_MD = x_ND.to(dtype), y_MD.to(dtype)
    if dscale_N is not None:
        dscale_N.div_(scale).add_(d_positive_N * _row_dot(x_ND, y_MD[:n]))
    if dx_ND is not None:
        dx_ND.addcmul_(d_positive_N[:, None], y_MD[:n])
    if dy_MD is not None:
        dy_MD[:n].addcmul_(d_positive_N[:, None], x_ND)
    if d_row_mean_N is not None and d_column_mean_N is not None:
        y_mean_D, x_mean_D = y_MD.mean(dim=0), x_ND.mean(dim=0)
        if dscale_N is not None:
            dscale_N.add_(d_row_mean_N * torch.mv(x_ND, y_mean_D))
            dscale_N.add_(d_column_mean_N * torch.mv(y_MD[:n], x_mean_D))
        if dx_ND is not None:
            dx_ND.addcmul_(d_row_mean_N[:, None], y_mean_D)
            dx_ND.add_(torch.mv(y_MD[:n].T, d_column_mean_N), alpha=1 / n)
        if dy_MD is not None:
            dy_MD[:n].addcmul_(d_column_mean_N[:, None], x_mean_D)
            dy_MD.add_(torch.mv(x_ND.T, d_row_mean_N), alpha=1 / m)
    dscale = None if dscale_N is None else dscale_N.sum()
    for gradient in (dx_ND, dy_MD):
        if gradient is not None:
            gradient.mul_(scale)
    return dx_ND, dy_MD, dscale


def _chunks(rows: int, chunk: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, chunk):
        yield start, min(start + chunk, rows)


def _leave_out(
    S_CM: Tensor,
    start: int,
    row_group_N: Tensor | None,
    column_group_M: Tensor | None,
    value: float = -torch.inf,
) -> None:
    """Overwrite the positives and the columns of a row's own group, in place."""
    S_CM.diagonal(offset=start).fill_(value)
    if row_group_N is not None and column_group_M is not None:
        group_C = row_group_N[start : start + S_CM.shape[0]]
        S_CM.masked_fill_(group_C[:, None] == column_group_M[None, :], value)


def _finite(anchor: Tensor) -> Tensor:
    """-inf replaced by 0, so that -inf - anchor is -inf and not NaN; NaN stays."""
    return anchor.masked_fill(anchor == -torch.inf, 0)


def _row_dot(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    return torch.linalg.vecdot(a_ND, b_ND)
