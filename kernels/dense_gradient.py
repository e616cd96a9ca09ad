"""The backward of losses by way of their cosines, whole in memory; see `dense.py`.

A program has a tile of G, or a tile of the features' gradients, to itself. What a positive's logit
pulls with stays out of G, which may be in 16 bits, and is added in float32 where it is finished.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.dense import (
    KINDS,
    LABELS,
    LSE,
    NUMBERS,
    PULL,
    SHARE,
    SIGMOID,
    TERMS,
    WEIGHT,
    domain_of,
    ids_of,
    number,
    options_of,
    packed_domains,
    side_of,
    sigmoid,
)
from fastclip.kernels.dense_matrix import Matrix, Upstream
from fastclip.kernels.launch import INTERPRETED, launch
from fastclip.kernels.tile import rounded

TILE_ROWS, TILE_COLUMNS = 32, 64
ROWS, WIDTH = 16, 128


@triton.jit
def _upstream(up_ptr, divisor_ptr, stride_up, factor, i, mask, HAS_DIVISOR: tl.constexpr):
    """The gradient of an anchor's loss."""
    up = tl.load(up_ptr + i * stride_up, mask=mask, other=0.0) * factor
    if HAS_DIVISOR:
        up = up / tl.load(divisor_ptr)
    return up


@triton.jit
def _pull(
    planes_ptr,
    up_ptr,
    divisor_ptr,
    stride_up,
    factor,
    smoothing,
    lines,
    base,
    r,
    s,
    b,
    c,
    mask,
    COLUMNS: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
):
    """The gradient of the logit of a positive in row r of block b, column s of block c."""
    up = _upstream(up_ptr, divisor_ptr, stride_up, factor, r, mask, HAS_DIVISOR)
    q = tl.load(planes_ptr + (PULL + c) * lines + r, mask=mask, other=0.0)
    found = (smoothing - q) * up
    if COLUMNS:
        up = _upstream(up_ptr, divisor_ptr, stride_up, factor, s, mask, HAS_DIVISOR)
        q = tl.load(planes_ptr + (PULL + b) * lines + base + s, mask=mask, other=0.0)
        found += (smoothing - q) * up
    return found


@triton.jit(do_not_specialize=[*NUMBERS, "slots"])
def gradient_kernel(
    cos_ptr,
    out_ptr,
    sums_ptr,
    up_ptr,
    divisor_ptr,
    planes_ptr,
    scale,
    offset,
    row_id_ptr,
    column_id_ptr,
    index_ptr,
    stride,
    stride_out,
    stride_up,
    lines,
    base,
    pairs,
    beside,
    paired,
    blocks,
    domains,
    first_negative,
    smoothing,
    factor,
    slots,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    SCALARS: tl.constexpr,
    SCALE_SIDE: tl.constexpr,
    OFFSET_SIDE: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_s = tl.cdiv(beside, BLOCK_S)
    tiles = tl.cdiv(pairs, BLOCK_R) * tiles_s
    b, c = pid // tiles // blocks, pid // tiles % blocks
    i_r = (pid % tiles // tiles_s) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_s = (pid % tiles % tiles_s) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_r, m_s = i_r < pairs, i_s < beside
    r, s = b * pairs + i_r, c * pairs + i_s
    mask = m_r[:, None] & m_s[None, :]
    partner = i_r
    if HAS_INDEX:
        partner = tl.load(index_ptr + i_r, mask=m_r, other=0).to(tl.int32)
    own_scale = number(scale, domains, b, c, SCALE_SIDE)
    shift = number(offset, domains, b, c, OFFSET_SIDE)
    o_r, o_s = r[:, None], s[None, :]
    cos = tl.load(cos_ptr + o_r * stride + o_s, mask=mask, other=0.0)
    logits = cos * own_scale + shift
    apart = partner[:, None] != i_s[None, :]
    keep = mask & apart & (i_s >= first_negative)[None, :]
    candidate = mask
    if HAS_IDS:
        row_id = tl.load(row_id_ptr + r, mask=m_r, other=0)
        column_id = tl.load(column_id_ptr + s, mask=m_s, other=0)
        if KIND == LABELS:
            candidate = keep & (row_id[:, None] == column_id[None, :])
        else:
            differ = row_id[:, None] != column_id[None, :]
            candidate = mask & (differ | (apart == 0))
            keep = keep & differ
    up_r = _upstream(up_ptr, divisor_ptr, stride_up, factor, r, m_r, HAS_DIVISOR)
    if KIND == SIGMOID:
        value = sigmoid(logits) * up_r[:, None]
    else:
        a = tl.load(planes_ptr + WEIGHT * lines + r, mask=m_r, other=0.0) * up_r
        lse = tl.load(planes_ptr + LSE * lines + r, mask=m_r, other=0.0)
        value = tl.exp(logits - lse[:, None]) * a[:, None]
        if COLUMNS:
            # further columns have no statistics
            m_p = s < paired
            up_s = _upstream(up_ptr, divisor_ptr, stride_up, factor, s, m_p, HAS_DIVISOR)
            p_s = planes_ptr + base + s
            a = tl.load(p_s + WEIGHT * lines, mask=m_p, other=0.0) * up_s
            lse = tl.load(p_s + LSE * lines, mask=m_p, other=float("inf"))
            value += tl.exp(logits - lse[None, :]) * a[None, :]
    value = tl.where(keep, value, 0.0)
    if SMOOTHED or KIND == LABELS:
        share = tl.load(planes_ptr + SHARE * lines + r, mask=m_r, other=0.0) * up_r
        taken = share[:, None] + tl.zeros_like(value)
        if COLUMNS:
            share = tl.load(p_s + SHARE * lines, mask=m_p, other=0.0) * up_s
            taken += share[None, :]
        value -= tl.where(candidate, taken, 0.0)
    p_out = out_ptr + o_r * stride_out + o_s
    tl.store(p_out, rounded(value * own_scale, out_ptr, EMULATE), mask=mask)
    if SCALARS:
        if KIND != LABELS:
            pull = _pull(
                planes_ptr, up_ptr, divisor_ptr, stride_up, factor, smoothing, lines, base, r,
                c * pairs + partner, b, c, m_r, COLUMNS, HAS_DIVISOR,
            )  # fmt: skip
            if SYMMETRIC:
                pull = tl.where(b == c, 0.0, pull)
            value += tl.where(mask & (apart == 0), pull[:, None], 0.0)
        tl.store(sums_ptr + pid, tl.sum(tl.sum(value * cos, 1), 0))
        tl.store(sums_ptr + slots + pid, tl.sum(tl.sum(value, 1), 0))


@triton.jit
def _add_partners(
    total_ptr,
    out_ptr,
    partner_ptr,
    planes_ptr,
    up_ptr,
    divisor_ptr,
    index_ptr,
    scale,
    stride_partner,
    stride_up,
    lines,
    base,
    pairs,
    with_partner,
    blocks,
    domains,
    smoothing,
    factor,
    width,
    pid,
    COLUMNS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    SCALE_SIDE: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles_d = tl.cdiv(width, BLOCK_D)
    tiles_l = tl.cdiv(pairs, BLOCK_L)
    b = pid // tiles_d // tiles_l
    i_l = (pid // tiles_d % tiles_l) * BLOCK_L + tl.arange(0, BLOCK_L)
    i_d = (pid % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    line = b * pairs + i_l
    at = line[:, None] * width + i_d[None, :]
    mask = (i_l < pairs)[:, None] & (i_d < width)[None, :]
    total = tl.load(total_ptr + at, mask=mask, other=0.0)
    m_l = i_l < with_partner
    partner = i_l
    if HAS_INDEX:
        partner = tl.load(index_ptr + i_l, mask=m_l, other=0).to(tl.int32)
    for c in range(blocks):
        other = c * pairs + partner
        # rows and columns of a pair have one number
        pull = _pull(
            planes_ptr, up_ptr, divisor_ptr, stride_up, factor, smoothing, lines, base, line,
            other, b, c, m_l, COLUMNS, HAS_DIVISOR,
        ) * number(scale, domains, b, c, SCALE_SIDE)  # fmt: skip
        if SYMMETRIC:
            pull = tl.where(b == c, 0.0, pull)
        o_partner = other[:, None] * stride_partner + i_d[None, :]
        m_partner = m_l[:, None] & (i_d < width)[None, :]
        features = tl.load(partner_ptr + o_partner, mask=m_partner, other=0.0)
        total += pull[:, None] * features.to(tl.float32)
    tl.store(out_ptr + at, rounded(total, out_ptr, EMULATE), mask=mask)


@triton.jit(do_not_specialize=[*NUMBERS, "own", "of_rows", "rows"])
def finish_kernel(
    total_ptr,
    out_ptr,
    x_ptr,
    y_ptr,
    planes_ptr,
    up_ptr,
    divisor_ptr,
    index_ptr,
    scale,
    stride_x,
    stride_y,
    stride_up,
    lines,
    base,
    pairs,
    rows,
    own,
    paired,
    blocks,
    domains,
    smoothing,
    factor,
    width,
    of_rows,
    COLUMNS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    SCALE_SIDE: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`rows` rows' gradients, then `own` columns', in one matrix; of an index the rows' alone."""
    pid = tl.program_id(0)
    if pid < of_rows:
        _add_partners(
            total_ptr, out_ptr, y_ptr, planes_ptr, up_ptr, divisor_ptr, index_ptr, scale, stride_y,
            stride_up, lines, base, pairs, pairs, blocks, domains, smoothing, factor, width, pid,
            COLUMNS, SYMMETRIC, HAS_INDEX, HAS_DIVISOR, SCALE_SIDE, EMULATE, BLOCK_L, BLOCK_D,
        )  # fmt: skip
    else:
        first = rows * width
        _add_partners(
            total_ptr + first, out_ptr + first, x_ptr, planes_ptr, up_ptr, divisor_ptr, index_ptr,
            scale, stride_x, stride_up, lines, base, own, paired, blocks, domains, smoothing,
            factor, width, pid - of_rows, COLUMNS, SYMMETRIC, False, HAS_DIVISOR, SCALE_SIDE,
            EMULATE, BLOCK_L, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["slots", "tiles", "domains"])
def scalars_kernel(
    sums_ptr,
    scale_ptr,
    offset_ptr,
    slots,
    tiles,
    blocks,
    domains,
    share,
    of_scale,
    SCALE_SIDE: tl.constexpr,
    OFFSET_SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of G * cos and of G over all tiles, each entry of a table by those of its domains."""
    entry = tl.program_id(0)
    if entry < of_scale:
        found = _entry(sums_ptr, tiles, blocks, domains, entry, SCALE_SIDE, BLOCK)
        tl.store(scale_ptr + entry, (share * found).to(scale_ptr.dtype.element_ty))
    else:
        entry = entry - of_scale
        found = _entry(sums_ptr + slots, tiles, blocks, domains, entry, OFFSET_SIDE, BLOCK)
        tl.store(offset_ptr + entry, (share * found).to(offset_ptr.dtype.element_ty))


@triton.jit
def _entry(sums_ptr, tiles, blocks, domains, entry, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    if SIDE <= 0:
        # of all pairs of blocks, which lie one behind the other
        count = blocks * blocks * tiles
        for start in range(0, count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            total += tl.load(sums_ptr + i, mask=i < count, other=0.0)
    else:
        for index in range(blocks * blocks):
            p, q = domain_of(domains, index // blocks), domain_of(domains, index % blocks)
            is_here = tl.minimum(p, q) * SIDE + tl.maximum(p, q) == entry
            wanted = tl.where(is_here, tiles, 0)
            for start in range(0, wanted, BLOCK):
                i = start + tl.arange(0, BLOCK)
                total += tl.load(sums_ptr + index * tiles + i, mask=i < wanted, other=0.0)
    return tl.sum(total, 0)


def gradient(
    matrix: Matrix, planes: Tensor, upstream: Upstream, out: Tensor, scalars: bool
) -> Tensor:
    """G into out (R, S), which may be the cosines; sums of G * cos and G by tile, (2, tiles)."""
    blocks = len(matrix.domains)
    tiles = -(-matrix.pairs // TILE_ROWS) * -(-matrix.beside // TILE_COLUMNS)
    slots = blocks * blocks * tiles
    sums = planes.new_empty(2, slots if scalars else 0)
    row_id, column_id = ids_of(matrix)
    columns, base, paired = _columns(matrix)
    launch(
        gradient_kernel,
        slots,
        matrix.cos,
        out,
        sums,
        upstream.values,
        planes if upstream.divisor is None else upstream.divisor,
        planes,
        matrix.scale,
        matrix.offset,
        row_id,
        column_id,
        matrix.cos if matrix.positive is None else matrix.positive,
        matrix.cos.stride(0),
        out.stride(0),
        upstream.stride,
        matrix.lines,
        base,
        matrix.pairs,
        matrix.beside,
        paired,
        blocks,
        packed_domains(matrix),
        matrix.first_negative,
        matrix.smoothing,
        upstream.factor,
        slots,
        COLUMNS=columns,
        KIND=KINDS[matrix.kind],
        HAS_IDS=matrix.ids is not None,
        SMOOTHED=matrix.smoothing > 0,
        HAS_DIVISOR=upstream.divisor is not None,
        SCALARS=scalars,
        OFFSET_SIDE=side_of(matrix.offset),
        EMULATE=INTERPRETED,
        BLOCK_R=TILE_ROWS,
        BLOCK_S=TILE_COLUMNS,
        **options_of(matrix),
    )
    return sums


def finish(
    matrix: Matrix,
    planes: Tensor,
    upstream: Upstream,
    features: tuple[Tensor, Tensor],
    total: Tensor,
    rows: int,
    out: Tensor,
) -> None:
    """out = total + positives' terms; (rows + columns, D), contiguous; rows are all or none.

    With an index the columns' are not added.
    """
    width, own = total.shape[1], len(total) - rows
    x, y = features
    columns, base, _ = _columns(matrix)
    tiles_d, tiles_r = -(-width // WIDTH), -(-matrix.pairs // ROWS)
    of_rows = tiles_d * tiles_r * len(matrix.domains) if rows else 0
    of_columns = tiles_d * -(-own // ROWS)
    launch(
        finish_kernel,
        of_rows + of_columns,
        total,
        out,
        x,
        y,
        planes,
        upstream.values,
        planes if upstream.divisor is None else upstream.divisor,
        planes if matrix.positive is None else matrix.positive,
        matrix.scale,
        x.stride(0),
        y.stride(0),
        upstream.stride,
        matrix.lines,
        base,
        matrix.pairs,
        rows,
        own,
        0 if matrix.positive is not None else min(len(x), own),
        len(matrix.domains),
        packed_domains(matrix),
        matrix.smoothing,
        upstream.factor,
        width,
        of_rows,
        COLUMNS=columns,
        HAS_DIVISOR=upstream.divisor is not None,
        EMULATE=INTERPRETED,
        BLOCK_L=ROWS,
        BLOCK_D=WIDTH,
        **options_of(matrix),
    )


def scalars(
    matrix: Matrix, sums: Tensor, of_scale: Tensor | None, of_offset: Tensor | None
) -> None:
    """The gradients of the scale and offset from the sums of tiles; entries that none has are 0."""
    blocks = len(matrix.domains)
    entries = 0 if of_scale is None else of_scale.numel()
    launch(
        scalars_kernel,
        entries + (0 if of_offset is None else of_offset.numel()),
        sums,
        sums if of_scale is None else of_scale,
        sums if of_offset is None else of_offset,
        sums.shape[1],
        sums.shape[1] // blocks**2,
        blocks,
        packed_domains(matrix),
        # a pair of rows is there twice, and each time for both of its sides
        0.5 if matrix.symmetric else 1.0,
        entries,
        SCALE_SIDE=side_of(matrix.scale),
        OFFSET_SIDE=side_of(matrix.offset),
        BLOCK=TERMS,
    )


def _columns(matrix: Matrix) -> tuple[bool, int, int]:
    """Whether columns' statistics enter G, where their planes begin, and how many have them."""
    if matrix.symmetric:
        return True, 0, len(matrix.cos)
    return matrix.paired > 0, len(matrix.cos), matrix.paired
