"""Attention over short sequences: softmax(scale Q K^T) V, the scores never in memory.

    S = scale Q K^T;   lse_i = log sum_j exp(S_ij);   O_i = sum_j exp(S_ij - lse_i) V_j

Q (B, H, Sq, D), K and V (B, H, Sk, D), any strides but the last; O in the operands' dtype; lse
(B, H, Sq) in float32, to base 2, +inf for a query that sees no key. One program has one head, or
one tile of its queries: the sequence is an unrolled list of tiles, and K and V of the head are
read once and stay on chip (`HELD`) or, of longer sequences, pass through it.

A tile narrower than 64 is always the right side of a product: tensor cores of Hopper take 64 lines
on the left and any multiple of 8 on the right, so that 257 = 4 x 64 + 16 wastes little.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import constexpr_function

from fastclip.kernels.attention_plans import Plan, run_options, tiles
from fastclip.kernels.launch import INTERPRETED, launch, precision_of
from fastclip.kernels.tile import LOG2E, finite, rounded

NUMBERS = ["heads", *"q_b q_h q_s k_b k_h k_s v_b v_h v_s o_b o_h o_s".split()]


@constexpr_function
def end_of(group: tuple[int, int, int]) -> int:
    """The first line after a group of tiles."""
    first, size, count = group
    return first + size * count


@constexpr_function
def padded(group: tuple[int, int, int], length: int) -> bool:
    """Whether a group of tiles passes the end of the sequence."""
    first, size, count = group
    return first + size * count > length


@triton.jit
def head_of(pointer, stride_b, stride_h, pair, heads, UNIT: tl.constexpr):
    """Where the lines of one (batch, head) begin; strides count UNITs, which shows alignment."""
    return (
        pointer
        + ((pair // heads).to(tl.int64) * stride_b + (pair % heads).to(tl.int64) * stride_h) * UNIT
    )


@triton.jit
def lines(
    pointer,
    stride,
    first,
    limit,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK: tl.constexpr,
):
    """A tile of lines; zeros at and past `limit` and beyond the width."""
    o_s = first + tl.arange(0, SIZE)
    o_d = tl.arange(0, BLOCK_D)
    p = pointer + o_s[:, None] * stride + o_d[None, :]
    if MASK:
        return tl.load(p, mask=(o_s < limit)[:, None] & (o_d < WIDTH)[None, :], other=0.0)
    elif WIDTH < BLOCK_D:
        return tl.load(p, mask=(o_d < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def group(
    pointer,
    stride,
    limit,
    TILES: tl.constexpr,
    g: tl.constexpr,
    LENGTH: tl.constexpr,
    MASK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The lines of one tile of an unrolled list."""
    return lines(
        pointer,
        stride,
        TILES[g][0],
        limit,
        TILES[g][1],
        WIDTH,
        BLOCK_D,
        MASK or padded(TILES[g], LENGTH),
    )


@triton.jit
def store_lines(
    pointer,
    stride,
    first,
    limit,
    value,
    SIZE: tl.constexpr,
    TURNED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Round and write a tile of lines that `accumulate` made."""
    if TURNED:
        value = tl.trans(value)
    o_s = first + tl.arange(0, SIZE)
    o_d = tl.arange(0, BLOCK_D)
    p = pointer + o_s[:, None] * stride + o_d[None, :]
    keep = (o_s < limit)[:, None] & (o_d < WIDTH)[None, :]
    tl.store(p, rounded(value, p, EMULATE), mask=keep)


@triton.jit
def product(a, b, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """a @ b.T in float32."""
    if EMULATE:
        # the interpreter's 16-bit product is wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def empty_lines(SIZE: tl.constexpr, BLOCK_D: tl.constexpr, TURNED: tl.constexpr):
    """Zeros for `accumulate`."""
    if TURNED:
        return tl.zeros((BLOCK_D, SIZE), dtype=tl.float32)
    else:
        return tl.zeros((SIZE, BLOCK_D), dtype=tl.float32)


@triton.jit
def accumulate(acc, a, b, TURNED: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """acc + a @ b, or where acc is transposed, acc + b.T @ a.T."""
    if EMULATE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if TURNED:
        return tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def masked(scores, i_query, i_key, limit, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """-inf where the key lies at or past `limit` or, under CAUSAL, after the query."""
    if CAUSAL:
        keep = i_key <= i_query
        if MASK:
            keep = keep & (i_key < limit)
        return tl.where(keep, scores, float("-inf"))
    elif MASK:
        return tl.where(i_key < limit, scores, float("-inf"))
    else:
        return scores


@triton.jit
def _step(
    q,
    k,
    v,
    top,
    total,
    acc,
    first_q,
    first_k,
    limit,
    scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    # one tile of keys joins the running maximum, sum and output of a tile of queries;
    # `scale` contains log2(e), so that exp2 does
    AXIS: tl.constexpr = 0 if QUERIES < 64 else 1
    o_q = tl.expand_dims(first_q + tl.arange(0, QUERIES), AXIS)
    o_k = tl.expand_dims(first_k + tl.arange(0, KEYS), 1 - AXIS)
    if QUERIES < 64:
        scores = product(k, q, PRECISION, EMULATE)
    else:
        scores = product(q, k, PRECISION, EMULATE)
    scores = masked(scores, o_q, o_k, limit, MASK, CAUSAL)
    new_top = tl.maximum(top, tl.max(scores, AXIS) * scale)
    anchor = new_top
    if MASK or CAUSAL:
        anchor = finite(new_top)
    p = tl.exp2(scores * scale - tl.expand_dims(anchor, AXIS))
    shrink = tl.exp2(top - anchor)
    total = total * shrink + tl.sum(p, AXIS)
    p = p if EMULATE else p.to(v.dtype)
    acc = acc * tl.expand_dims(shrink, AXIS)
    acc = accumulate(acc, tl.trans(p) if QUERIES < 64 else p, v, QUERIES < 64, PRECISION, EMULATE)
    return new_top, total, acc


@triton.jit
def _stream(
    q,
    k_ptr,
    v_ptr,
    stride_k,
    stride_v,
    top,
    total,
    acc,
    first_q,
    limit,
    scale,
    QUERIES: tl.constexpr,
    FIRST_K: tl.constexpr,
    KEYS: tl.constexpr,
    COUNT: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    # a group of tiles of keys, one after the other
    for n in tl.range(0, COUNT, num_stages=STAGES):
        first_k = FIRST_K + n * KEYS
        k = lines(k_ptr, stride_k, first_k, limit, KEYS, WIDTH, BLOCK_D, MASK)
        v = lines(v_ptr, stride_v, first_k, limit, KEYS, WIDTH, BLOCK_D, MASK)
        top, total, acc = _step(
            q, k, v, top, total, acc, first_q, first_k, limit, scale,
            QUERIES, KEYS, MASK, CAUSAL, PRECISION, EMULATE,
        )  # fmt: skip
    return top, total, acc


@triton.jit
def _rows(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    k_held,
    v_held,
    first_q,
    limit,
    scale,
    QUERIES: tl.constexpr,
    LAST_Q: tl.constexpr,
    LENGTH_Q: tl.constexpr,
    LENGTH_K: tl.constexpr,
    KEY_TILES: tl.constexpr,
    HELD: tl.constexpr,
    LENGTHS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    # a tile of queries against all keys
    q = lines(q_ptr, stride_q, first_q, LENGTH_Q, QUERIES, WIDTH, BLOCK_D, LAST_Q > LENGTH_Q)
    top = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    acc = empty_lines(QUERIES, BLOCK_D, QUERIES < 64)
    for g in tl.static_range(len(KEY_TILES)):
        if not (CAUSAL and KEY_TILES[g][0] >= LAST_Q):
            if HELD:
                top, total, acc = _step(
                    q, k_held[g], v_held[g], top, total, acc, first_q, KEY_TILES[g][0], limit,
                    scale, QUERIES, KEY_TILES[g][1], LENGTHS or padded(KEY_TILES[g], LENGTH_K),
                    CAUSAL, PRECISION, EMULATE,
                )  # fmt: skip
            else:
                top, total, acc = _stream(
                    q, k_ptr, v_ptr, stride_k, stride_v, top, total, acc, first_q, limit, scale,
                    QUERIES, KEY_TILES[g][0], KEY_TILES[g][1], KEY_TILES[g][2],
                    LENGTHS or padded(KEY_TILES[g], LENGTH_K), CAUSAL, WIDTH, BLOCK_D, STAGES,
                    PRECISION, EMULATE,
                )  # fmt: skip
    # a query without keys: output 0, and exp(S - inf) = 0 in the gradient
    lse = tl.where(total > 0.0, top + tl.log2(total), float("inf"))
    # a NaN stays one
    lse = tl.where(total == total, lse, total)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    out = acc * tl.expand_dims(inverse, 0 if QUERIES < 64 else 1)
    store_lines(
        out_ptr, stride_o, first_q, LENGTH_Q, out, QUERIES, QUERIES < 64, WIDTH, BLOCK_D, EMULATE
    )
    o_q = first_q + tl.arange(0, QUERIES)
    tl.store(lse_ptr + o_q, lse, mask=o_q < LENGTH_Q)


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    length_ptr,
    scale,
    heads,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    o_b,
    o_h,
    o_s,
    LENGTH_Q: tl.constexpr,
    LENGTH_K: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HELD: tl.constexpr,
    UNIT: tl.constexpr,
    LENGTHS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    pair = tl.program_id(0) // PROGRAMS
    part = tl.program_id(0) % PROGRAMS
    q_ptr = head_of(q_ptr, q_b, q_h, pair, heads, UNIT)
    k_ptr = head_of(k_ptr, k_b, k_h, pair, heads, UNIT)
    v_ptr = head_of(v_ptr, v_b, v_h, pair, heads, UNIT)
    out_ptr = head_of(out_ptr, o_b, o_h, pair, heads, UNIT)
    q_s *= UNIT
    k_s *= UNIT
    v_s *= UNIT
    o_s *= UNIT
    lse_ptr += pair.to(tl.int64) * LENGTH_Q
    # for exp2
    scale *= LOG2E
    limit = LENGTH_K
    if LENGTHS:
        limit = tl.minimum(tl.load(length_ptr + pair // heads), LENGTH_K)
    k_held = ()
    v_held = ()
    if HELD:
        for g in tl.static_range(len(KEY_TILES)):
            k_held += (group(k_ptr, k_s, limit, KEY_TILES, g, LENGTH_K, LENGTHS, WIDTH, BLOCK_D),)
            v_held += (group(v_ptr, v_s, limit, KEY_TILES, g, LENGTH_K, LENGTHS, WIDTH, BLOCK_D),)
    # 1, which the compiler does not know: a loop stays one, and addresses are not held across it
    once = tl.minimum(heads, 1)
    # tiles before this group's
    before = 0
    for g in tl.static_range(len(QUERY_TILES)):
        begin = 0
        end = QUERY_TILES[g][2] * once
        if PROGRAMS > 1:
            begin = tl.minimum(tl.maximum(part - before, 0), QUERY_TILES[g][2])
            end = tl.minimum(tl.maximum(part - before + 1, 0), QUERY_TILES[g][2])
        for n in tl.range(begin, end, num_stages=1, disable_licm=True):
            _rows(
                q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_s, k_s, v_s, o_s, k_held, v_held,
                QUERY_TILES[g][0] + n * QUERY_TILES[g][1], limit, scale, QUERY_TILES[g][1],
                end_of(QUERY_TILES[g]), LENGTH_Q, LENGTH_K, KEY_TILES, HELD, LENGTHS, CAUSAL,
                WIDTH, BLOCK_D, STAGES, PRECISION, EMULATE,
            )  # fmt: skip
        before += QUERY_TILES[g][2]


def shared_options(q: Tensor, k: Tensor, lengths: Tensor | None, causal: bool) -> dict[str, Any]:
    """Keyword arguments that all kernels of this operator take."""
    return {
        "LENGTH_Q": q.shape[2],
        "LENGTH_K": k.shape[2],
        "LENGTHS": lengths is not None,
        "CAUSAL": causal,
        "WIDTH": q.shape[3],
        "BLOCK_D": max(triton.next_power_of_2(q.shape[3]), 16),
        "PRECISION": "tf32" if precision_of(q.dtype) == "tf32" else "ieee",
        "EMULATE": INTERPRETED,
    }


def walk_options(length_q: int, length_k: int, plan: Plan) -> dict[str, Any]:
    """Keyword arguments of the forward that a plan decides."""
    query_tiles = tiles(length_q, plan.queries)
    return {
        "QUERY_TILES": query_tiles,
        "KEY_TILES": tiles(length_k, plan.keys, unrolled=plan.held),
        "PROGRAMS": 1 if plan.whole else sum(count for _, _, count in query_tiles),
        "HELD": plan.held,
        "STAGES": plan.stages,
    }


def strides_of(*tensors: Tensor) -> tuple[list[int], int]:
    """Batch, head and line strides of (B, H, S, D) tensors in the largest unit, 8 or 1."""
    strides = [stride for t in tensors for stride in t.stride()[:3]]
    # eight numbers of 16 bits are what a thread loads at once
    unit = 1 if any(stride % 8 for stride in strides) else 8
    return [stride // unit for stride in strides], unit


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lengths: Tensor | None,
    scale: float,
    causal: bool,
    plan: Plan,
) -> Tensor:
    """Write `out`, (B, H, Sq, D) of any strides but the last; returns lse (B, H, Sq)."""
    b, h, s_q, _ = q.shape
    lse = q.new_empty((b, h, s_q), dtype=torch.float32)
    walk = walk_options(s_q, k.shape[2], plan)
    strides, unit = strides_of(q, k, v, out)
    launch(
        forward_kernel,
        b * h * walk["PROGRAMS"],
        q,
        k,
        v,
        out,
        lse,
        lse if lengths is None else lengths,
        scale,
        h,
        *strides,
        UNIT=unit,
        **walk,
        **run_options(plan),
        **shared_options(q, k, lengths, causal),
    )
    return lse
