"""Losses of small batches by way of their cosines, whole in memory: what lies around the products.

    S_ij = scale * cos_ij + offset      each by the domains of the blocks that i and j are in
    lines        each row's and column's log-sum-exp over its negatives, its loss, and with what
                 weight its positives pull: q = weight * sigmoid(log-sum-exp - positive)
    total        the losses' sum or mean
    gradient     G_ij = scale * (a_i exp(S_ij - lse_i) + b_j exp(S_ij - lse_j)) on negatives, 0 at
                 positives; sums of G * cos and of G, positives' terms with them
    finish       out = product with G + scale * (-q_ij - q_ji) * partner over positives, cast once
    scalars      the gradients of the scale and of the offset

cos (R, S) in float32, rows at a stride, of fewer than 2^31 entries; R and S are `blocks` blocks
each of a symmetric matrix, or one. Rows and columns that have statistics are lines: rows first. Of
each line there are planes, one after the other: lse, a (the sum of its q), share (of a mean that is
subtracted: label smoothing's, or that of a row's class), and q towards each block.

A small batch's time is the number of launches: every kernel here is one, and an operand that is a
number comes as one instead of being filled into a tensor first. A program has its lines to itself,
so nothing is merged, and a shape's bits repeat.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.dense_matrix import Matrix
from fastclip.kernels.launch import launch
from fastclip.kernels.tile import finite

KINDS = {"softmax": 0, "sigmoid": 1, "labels": 2}
SIGMOID, LABELS = tl.constexpr(KINDS["sigmoid"]), tl.constexpr(KINDS["labels"])
LSE, WEIGHT, SHARE, PULL = (tl.constexpr(plane) for plane in range(4))
PLANES = 3
"""Those that every line has, before the ones towards each block."""
# neighbors in float32 are 2 apart there: exp(S - lse) has no correct digit
LARGEST_LOGIT = tl.constexpr(2.0**24)

LINES, BESIDE = 16, 64
# of the lines' kernel; the compiler, left alone, takes fewer and spills a few
REGISTERS = 128
TERMS = 1024

NUMBERS = ["pairs", "beside", "lines", "base", "paired", "domains", "first_negative"]


@triton.jit
def _softplus(x):
    e = tl.exp(-tl.abs(x))
    above = 1.0 + e
    # what 1 + e has rounded away is put back
    log1p = tl.where(above == 1.0, e, tl.log(above) * (e / tl.where(above == 1.0, 1.0, above - 1)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), whatever the size of x."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def number(table, domains, b, c, SIDE: tl.constexpr):
    """A number, a tensor's only element (SIDE 0), or the entry of two blocks' domains."""
    if SIDE < 0:
        value = table
    elif SIDE == 0:
        value = tl.load(table).to(tl.float32)
    else:
        p, q = domain_of(domains, b), domain_of(domains, c)
        value = tl.load(table + tl.minimum(p, q) * SIDE + tl.maximum(p, q)).to(tl.float32)
    return value


@triton.jit
def domain_of(domains, block):
    """A block's of those that are packed."""
    # wide, as the ninth block's are 32 bits along, however few bits are set
    return ((tl.cast(domains, tl.int64) >> (4 * block)) & 15).to(tl.int32)


@triton.jit
def _lines(
    cos_ptr,
    scale,
    offset,
    weight,
    id_ptr,
    beside_id_ptr,
    index_ptr,
    planes_ptr,
    term_ptr,
    hit_ptr,
    stride,
    lines,
    base,
    pairs,
    beside,
    blocks,
    domains,
    first_negative,
    smoothing,
    pid,
    ALONG_ROWS: tl.constexpr,
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HITS: tl.constexpr,
    SCALE_SIDE: tl.constexpr,
    OFFSET_SIDE: tl.constexpr,
    WEIGHT_SIDE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    AXIS: tl.constexpr = 1 if ALONG_ROWS else 0
    tiles = tl.cdiv(pairs, BLOCK_L)
    b = pid // tiles
    i_l = (pid % tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = i_l < pairs
    line = b * pairs + i_l
    partner = i_l
    if HAS_INDEX:
        partner = tl.load(index_ptr + i_l, mask=m_l, other=0).to(tl.int32)
    top = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    mean = tl.zeros((BLOCK_L,), tl.float32)
    count = tl.zeros((BLOCK_L,), tl.float32)
    for c in range(blocks):
        factor = number(scale, domains, b, c, SCALE_SIDE)
        shift = number(offset, domains, b, c, OFFSET_SIDE)
        for start in range(0, beside, BLOCK_K):
            i_k = start + tl.arange(0, BLOCK_K)
            mask = tl.expand_dims(m_l, AXIS) & tl.expand_dims(i_k < beside, 1 - AXIS)
            o_l = tl.expand_dims(line, AXIS)
            o_k = tl.expand_dims(c * pairs + i_k, 1 - AXIS)
            at = o_l * stride + o_k if ALONG_ROWS else o_k * stride + o_l
            logits = tl.load(cos_ptr + at, mask=mask, other=0.0) * factor + shift
            apart = tl.expand_dims(partner, AXIS) != tl.expand_dims(i_k, 1 - AXIS)
            keep = mask & apart
            if ALONG_ROWS:
                keep = keep & tl.expand_dims(i_k >= first_negative, 1 - AXIS)
            candidate = mask
            if HAS_IDS:
                own = tl.load(id_ptr + line, mask=m_l, other=0)
                other = tl.load(beside_id_ptr + i_k, mask=i_k < beside, other=0)
                if KIND == LABELS:
                    same = tl.expand_dims(own, AXIS) == tl.expand_dims(other, 1 - AXIS)
                    candidate = keep & same
                else:
                    differ = tl.expand_dims(own, AXIS) != tl.expand_dims(other, 1 - AXIS)
                    candidate = mask & (differ | (apart == 0))
                    keep = keep & differ
            if KIND == SIGMOID:
                total += tl.sum(tl.where(keep, _softplus(logits), 0.0), AXIS)
            else:
                kept = tl.where(keep, logits, float("-inf"))
                higher = tl.maximum(top, tl.max(kept, AXIS))
                anchor = finite(higher)
                found = tl.sum(tl.exp(kept - tl.expand_dims(anchor, AXIS)), AXIS)
                total = total * tl.exp(top - anchor) + found
                top = higher
            if SMOOTHED or KIND == LABELS:
                mean += tl.sum(tl.where(candidate, logits, 0.0), AXIS)
                count += tl.sum(tl.where(candidate, 1.0, 0.0), AXIS)
    lse = total
    if KIND != SIGMOID:
        lse = finite(top) + tl.log(total)
        beyond = (tl.abs(top) > LARGEST_LOGIT) & (top != float("-inf"))
        lse = tl.where(beyond, float("nan"), lse)
    mean = mean / tl.maximum(count, 1.0)
    share = 1.0 / tl.maximum(count, 1.0)
    o_plane = planes_ptr + base + line
    pulled = tl.zeros((BLOCK_L,), tl.float32)
    term = tl.zeros((BLOCK_L,), tl.float32)
    hits = tl.zeros((BLOCK_L,), tl.float32)
    if KIND == LABELS:
        # a row alone in its class is no anchor
        pulled = tl.where(count > 0, 1.0, 0.0)
        share = tl.where(count > 0, share, 0.0)
        term = tl.where(count > 0, lse - mean, 0.0)
    else:
        for c in range(blocks):
            o_k = c * pairs + partner
            at = line * stride + o_k if ALONG_ROWS else o_k * stride + line
            factor = number(scale, domains, b, c, SCALE_SIDE)
            shift = number(offset, domains, b, c, OFFSET_SIDE)
            positive = tl.load(cos_ptr + at, mask=m_l, other=0.0) * factor + shift
            part = number(weight, domains, b, c, WEIGHT_SIDE)
            if SYMMETRIC:
                # itself is no positive
                part = tl.where(b == c, 0.0, part / (blocks - 1))
            if KIND == SIGMOID:
                term = total + _softplus(-positive)
                q = sigmoid(-positive)
            else:
                term += part * _softplus(lse - positive)
                q = part * sigmoid(lse - positive)
            pulled += q
            tl.store(o_plane + (PULL + c) * lines, q, mask=m_l)
            if SMOOTHED:
                term += smoothing * (positive - mean)
            if HITS:
                hit = positive > top
                if SYMMETRIC:
                    hit = hit & (b != c)
                hits += tl.where(hit, 1.0, 0.0)
        share = smoothing * share
    tl.store(o_plane + LSE * lines, lse, mask=m_l)
    tl.store(o_plane + WEIGHT * lines, pulled, mask=m_l)
    tl.store(o_plane + SHARE * lines, share, mask=m_l)
    tl.store(term_ptr + base + line, term, mask=m_l)
    if HITS:
        tl.store(hit_ptr + base + line, hits, mask=m_l)


@triton.jit(do_not_specialize=NUMBERS)
def lines_kernel(
    cos_ptr,
    scale,
    offset,
    weight,
    row_id_ptr,
    column_id_ptr,
    index_ptr,
    planes_ptr,
    term_ptr,
    hit_ptr,
    stride,
    lines,
    base,
    pairs,
    beside,
    blocks,
    domains,
    first_negative,
    smoothing,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HITS: tl.constexpr,
    SCALE_SIDE: tl.constexpr,
    OFFSET_SIDE: tl.constexpr,
    WEIGHT_SIDE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Lines of rows, then those of columns: a program has BLOCK_L of them whole."""
    pid = tl.program_id(0)
    of_rows = blocks * tl.cdiv(pairs, BLOCK_L)
    # a branch that is not there is not compiled
    if (not COLUMNS) or pid < of_rows:
        _lines(
            cos_ptr, scale, offset, weight, row_id_ptr, column_id_ptr, index_ptr, planes_ptr,
            term_ptr, hit_ptr, stride, lines, 0, pairs, beside, blocks, domains, first_negative,
            smoothing, pid, True, KIND, SYMMETRIC, HAS_IDS, HAS_INDEX, SMOOTHED, HITS, SCALE_SIDE,
            OFFSET_SIDE, WEIGHT_SIDE, BLOCK_L, BLOCK_K,
        )  # fmt: skip
    if COLUMNS:
        if pid >= of_rows:
            # among the rows
            _lines(
                cos_ptr, scale, offset, weight, column_id_ptr, row_id_ptr, index_ptr, planes_ptr,
                term_ptr, hit_ptr, stride, lines, base, pairs, pairs, blocks, domains, 0,
                smoothing, pid - of_rows, False, KIND, SYMMETRIC, HAS_IDS, False, SMOOTHED, HITS,
                SCALE_SIDE, OFFSET_SIDE, WEIGHT_SIDE, BLOCK_L, BLOCK_K,
            )  # fmt: skip


@triton.jit(do_not_specialize=["lines"])
def total_kernel(
    term_ptr, weight_ptr, out_ptr, divisor_ptr, lines, factor, HAS_DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """factor * sum of terms; with a divisor over the number of lines that weigh."""
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, lines, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(term_ptr + i, mask=i < lines, other=0.0)
        if HAS_DIVISOR:
            count += tl.load(weight_ptr + i, mask=i < lines, other=0.0)
    found = tl.sum(total, 0) * factor
    if HAS_DIVISOR:
        divisor = tl.maximum(tl.sum(count, 0), 1.0)
        tl.store(divisor_ptr, divisor)
        found = found / divisor
    tl.store(out_ptr, found)


def lines(matrix: Matrix, planes: Tensor, terms: Tensor, hits: Tensor | None) -> None:
    """Statistics into planes (PLANES + blocks, lines); each line's loss, and positives on top."""
    blocks = len(matrix.domains)
    programs = blocks * -(-matrix.pairs // LINES) + -(-matrix.paired // LINES)
    row_id, column_id = ids_of(matrix)
    launch(
        lines_kernel,
        programs,
        matrix.cos,
        matrix.scale,
        matrix.offset,
        matrix.weight,
        row_id,
        column_id,
        matrix.cos if matrix.positive is None else matrix.positive,
        planes,
        terms,
        terms if hits is None else hits,
        matrix.cos.stride(0),
        matrix.lines,
        len(matrix.cos),
        matrix.pairs,
        matrix.beside,
        blocks,
        packed_domains(matrix),
        matrix.first_negative,
        matrix.smoothing,
        COLUMNS=matrix.paired > 0,
        KIND=KINDS[matrix.kind],
        HAS_IDS=matrix.ids is not None,
        SMOOTHED=matrix.smoothing > 0,
        HITS=hits is not None,
        OFFSET_SIDE=side_of(matrix.offset),
        WEIGHT_SIDE=side_of(matrix.weight),
        BLOCK_L=LINES,
        BLOCK_K=BESIDE,
        maxnreg=REGISTERS,
        **options_of(matrix),
    )


def total(terms: Tensor, weight: Tensor, factor: float, divisor: Tensor | None) -> Tensor:
    """factor * sum of terms, 0-d; with a divisor that receives the number of lines that weigh."""
    out = terms.new_empty(())
    launch(
        total_kernel,
        1,
        terms,
        weight,
        out,
        out if divisor is None else divisor,
        len(terms),
        factor,
        HAS_DIVISOR=divisor is not None,
        BLOCK=TERMS,
    )
    return out


def side_of(table: Tensor | float) -> int:
    """Of a table by pair of domains; 0 for one element in memory, -1 for a number."""
    if not isinstance(table, Tensor):
        return -1
    return 0 if table.numel() == 1 else table.shape[0]


def packed_domains(matrix: Matrix) -> int:
    """Domains at four bits a block."""
    return sum(domain << 4 * block for block, domain in enumerate(matrix.domains))


def options_of(matrix: Matrix) -> dict[str, Any]:
    """Constants that several kernels have."""
    return {
        "SYMMETRIC": matrix.symmetric,
        "HAS_INDEX": matrix.positive is not None,
        "SCALE_SIDE": side_of(matrix.scale),
    }


def ids_of(matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Of rows and columns; any tensors where there are none."""
    return (matrix.cos, matrix.cos) if matrix.ids is None else matrix.ids
