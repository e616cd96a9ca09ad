"""The gradient of attention over short sequences: dQ, dK and dV without atomics or scratch.

    P = exp(S - lse);  dP = dO V^T;  delta_i = sum_d O_id dO_id;  dS = P * (dP - delta)
    dV = P^T dO;       dK = scale dS^T Q;       dQ = scale dS K

One program has one head. `whole_kernel`, for sequences that fit: Q and dO stay on chip, dQ in
registers, tiles of keys pass: five products. `two_pass_kernel`: dQ tile by tile of queries, then
dK and dV tile by tile of keys, with S and dP formed twice: seven products; the second pass finds
delta (B, H, Sq) where the first left it, and the head's lines in the caches.

A key past the end is zero, and so are its dK and dV, never written; a query past the end has
lse = inf, hence P = 0.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastclip.kernels.attention import (
    NUMBERS,
    accumulate,
    empty_lines,
    end_of,
    group,
    head_of,
    lines,
    masked,
    padded,
    product,
    shared_options,
    store_lines,
    strides_of,
)
from fastclip.kernels.attention_plans import GradientPlan, run_options, tiles
from fastclip.kernels.launch import launch
from fastclip.kernels.tile import LOG2E

GRADIENT_NUMBERS = "do_b do_h do_s dq_b dq_h dq_s dk_b dk_h dk_s dv_b dv_h dv_s".split()


@triton.jit
def _numbers(pointer, first, LENGTH: tl.constexpr, SIZE: tl.constexpr, OTHER: tl.constexpr):
    # one number for each query
    o_q = first + tl.arange(0, SIZE)
    return tl.load(pointer + o_q, mask=o_q < LENGTH, other=OTHER)


@triton.jit
def _store_delta(pointer, out, do, first, LENGTH: tl.constexpr, SIZE: tl.constexpr):
    o_q = first + tl.arange(0, SIZE)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(pointer + o_q, delta, mask=o_q < LENGTH)


@triton.jit
def _pair(
    q, k, v, do, lse_ptr, delta_ptr, dq, dk, dv, first_q, first_k, limit, scale,
    LENGTH_Q: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    AXIS: tl.constexpr,
    WANT_Q: tl.constexpr,
    WANT_K: tl.constexpr,
    TURN_Q: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """What a tile of queries and one of keys add to dQ / scale, dK / scale and dV.

    S lies with its queries along AXIS. Without DELTA these are all keys, and it is summed here.
    """
    o_q = tl.expand_dims(first_q + tl.arange(0, QUERIES), 1 - AXIS)
    o_k = tl.expand_dims(first_k + tl.arange(0, KEYS), AXIS)
    # loaded again for each pair: held, they would fill the registers
    lse = _numbers(lse_ptr, first_q, LENGTH_Q, QUERIES, float("inf"))
    scores = product(q, k, PRECISION, EMULATE) if AXIS == 0 else product(k, q, PRECISION, EMULATE)
    scores = masked(scores, o_q, o_k, limit, MASK, CAUSAL)
    p = tl.exp2(scores * (scale * LOG2E) - tl.expand_dims(lse, 1 - AXIS))
    if WANT_K:
        # before dP exists: fewer registers
        p_k = p if EMULATE else p.to(q.dtype)
        p_k = tl.trans(p_k) if AXIS == 0 else p_k
        dv = accumulate(dv, p_k, do, KEYS < 64, PRECISION, EMULATE)
    dp = product(do, v, PRECISION, EMULATE) if AXIS == 0 else product(v, do, PRECISION, EMULATE)
    if DELTA:
        delta = _numbers(delta_ptr, first_q, LENGTH_Q, QUERIES, 0.0)
    else:
        delta = tl.sum(p * dp, 1 - AXIS)
    ds = p * (dp - tl.expand_dims(delta, 1 - AXIS))
    ds = ds if EMULATE else ds.to(q.dtype)
    if WANT_K:
        ds_k = tl.trans(ds) if AXIS == 0 else ds
        dk = accumulate(dk, ds_k, q, KEYS < 64, PRECISION, EMULATE)
    if WANT_Q:
        ds_q = ds if AXIS == 0 else tl.trans(ds)
        dq = accumulate(dq, ds_q, k, TURN_Q, PRECISION, EMULATE)
    return dq, dk, dv


@triton.jit
def _whole_keys(
    k, v, q_held, do_held, lse_ptr, delta_ptr, dq, first_k, limit, scale,
    LENGTH_Q: tl.constexpr,
    FIRST_K: tl.constexpr,
    KEYS: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DELTA: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    # dK and dV of a tile of keys whole, and its part of all dQ
    dk = empty_lines(KEYS, BLOCK_D, KEYS < 64)
    dv = empty_lines(KEYS, BLOCK_D, KEYS < 64)
    new_dq = ()
    for g in tl.static_range(len(QUERY_TILES)):
        if CAUSAL and end_of(QUERY_TILES[g]) <= FIRST_K:
            new_dq += (dq[g],)
        else:
            part, dk, dv = _pair(
                q_held[g], k, v, do_held[g], lse_ptr, delta_ptr, dq[g], dk, dv, QUERY_TILES[g][0],
                first_k, limit, scale, LENGTH_Q, QUERY_TILES[g][1], KEYS,
                1 if KEYS >= 64 or QUERY_TILES[g][1] < 64 else 0, True, True, True, MASK, CAUSAL,
                DELTA, PRECISION, EMULATE,
            )  # fmt: skip
            new_dq += (part,)
    return dk, dv, new_dq


@triton.jit(do_not_specialize=[*NUMBERS, *GRADIENT_NUMBERS])
def whole_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    do_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
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
    do_b,
    do_h,
    do_s,
    dq_b,
    dq_h,
    dq_s,
    dk_b,
    dk_h,
    dk_s,
    dv_b,
    dv_h,
    dv_s,
    LENGTH_Q: tl.constexpr,
    LENGTH_K: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
    UNIT: tl.constexpr,
    LENGTHS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    pair = tl.program_id(0)
    q_ptr = head_of(q_ptr, q_b, q_h, pair, heads, UNIT)
    k_ptr = head_of(k_ptr, k_b, k_h, pair, heads, UNIT)
    v_ptr = head_of(v_ptr, v_b, v_h, pair, heads, UNIT)
    out_ptr = head_of(out_ptr, o_b, o_h, pair, heads, UNIT)
    do_ptr = head_of(do_ptr, do_b, do_h, pair, heads, UNIT)
    dq_ptr = head_of(dq_ptr, dq_b, dq_h, pair, heads, UNIT)
    dk_ptr = head_of(dk_ptr, dk_b, dk_h, pair, heads, UNIT)
    dv_ptr = head_of(dv_ptr, dv_b, dv_h, pair, heads, UNIT)
    q_s *= UNIT
    k_s *= UNIT
    v_s *= UNIT
    o_s *= UNIT
    do_s *= UNIT
    dq_s *= UNIT
    dk_s *= UNIT
    dv_s *= UNIT
    lse_ptr += pair.to(tl.int64) * LENGTH_Q
    delta_ptr += pair.to(tl.int64) * LENGTH_Q
    limit = LENGTH_K
    if LENGTHS:
        limit = tl.minimum(tl.load(length_ptr + pair // heads), LENGTH_K)
    # with all keys in one tile, delta_i = sum_j P_ij dP_ij, and O is not read
    DELTA: tl.constexpr = len(KEY_TILES) > 1 or KEY_TILES[0][2] > 1
    q_held = ()
    do_held = ()
    dq = ()
    for g in tl.static_range(len(QUERY_TILES)):
        q_held += (group(q_ptr, q_s, LENGTH_Q, QUERY_TILES, g, LENGTH_Q, False, WIDTH, BLOCK_D),)
        do = group(do_ptr, do_s, LENGTH_Q, QUERY_TILES, g, LENGTH_Q, False, WIDTH, BLOCK_D)
        do_held += (do,)
        if DELTA:
            out = group(out_ptr, o_s, LENGTH_Q, QUERY_TILES, g, LENGTH_Q, False, WIDTH, BLOCK_D)
            _store_delta(delta_ptr, out, do, QUERY_TILES[g][0], LENGTH_Q, QUERY_TILES[g][1])
        dq += (empty_lines(QUERY_TILES[g][1], BLOCK_D, True),)
    if DELTA:
        # the program's other threads read what these wrote
        tl.debug_barrier()
    # 1, which the compiler does not know: loops stay loops, and addresses inside them
    once = tl.minimum(heads, 1)
    for g in tl.static_range(len(KEY_TILES)):
        for n in tl.range(0, KEY_TILES[g][2] * once, num_stages=1, disable_licm=True):
            first_k = KEY_TILES[g][0] + n * KEY_TILES[g][1]
            k = lines(
                k_ptr, k_s, first_k, limit, KEY_TILES[g][1], WIDTH, BLOCK_D,
                LENGTHS or padded(KEY_TILES[g], LENGTH_K),
            )  # fmt: skip
            v = lines(
                v_ptr, v_s, first_k, limit, KEY_TILES[g][1], WIDTH, BLOCK_D,
                LENGTHS or padded(KEY_TILES[g], LENGTH_K),
            )  # fmt: skip
            dk, dv, dq = _whole_keys(
                k, v, q_held, do_held, lse_ptr, delta_ptr, dq, first_k, limit,
                scale, LENGTH_Q, KEY_TILES[g][0], KEY_TILES[g][1], QUERY_TILES,
                LENGTHS or padded(KEY_TILES[g], LENGTH_K), CAUSAL, DELTA, BLOCK_D, PRECISION,
                EMULATE,
            )  # fmt: skip
            store_lines(
                dk_ptr, dk_s, first_k, LENGTH_K, dk * scale, KEY_TILES[g][1],
                KEY_TILES[g][1] < 64, WIDTH, BLOCK_D, EMULATE,
            )  # fmt: skip
            store_lines(
                dv_ptr, dv_s, first_k, LENGTH_K, dv, KEY_TILES[g][1], KEY_TILES[g][1] < 64, WIDTH,
                BLOCK_D, EMULATE,
            )  # fmt: skip
    for g in tl.static_range(len(QUERY_TILES)):
        store_lines(
            dq_ptr, dq_s, QUERY_TILES[g][0], LENGTH_Q, dq[g] * scale, QUERY_TILES[g][1], True,
            WIDTH, BLOCK_D, EMULATE,
        )  # fmt: skip


@triton.jit
def _queries(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr,
    q_s, k_s, v_s, o_s, do_s, dq_s, k_held, v_held, first_q, limit, scale,
    QUERIES: tl.constexpr,
    END_Q: tl.constexpr,
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
):  # fmt: skip
    # delta and dQ of a tile of queries
    MASK_Q: tl.constexpr = END_Q > LENGTH_Q
    AXIS: tl.constexpr = 1 if QUERIES < 64 else 0
    q = lines(q_ptr, q_s, first_q, LENGTH_Q, QUERIES, WIDTH, BLOCK_D, MASK_Q)
    do = lines(do_ptr, do_s, first_q, LENGTH_Q, QUERIES, WIDTH, BLOCK_D, MASK_Q)
    out = lines(out_ptr, o_s, first_q, LENGTH_Q, QUERIES, WIDTH, BLOCK_D, MASK_Q)
    _store_delta(delta_ptr, out, do, first_q, LENGTH_Q, QUERIES)
    tl.debug_barrier()
    dq = empty_lines(QUERIES, BLOCK_D, QUERIES < 64)
    for g in tl.static_range(len(KEY_TILES)):
        if not (CAUSAL and KEY_TILES[g][0] >= END_Q):
            if HELD:
                dq, _, _ = _pair(
                    q, k_held[g], v_held[g], do, lse_ptr, delta_ptr, dq, 0.0, 0.0, first_q,
                    KEY_TILES[g][0], limit, scale, LENGTH_Q, QUERIES, KEY_TILES[g][1], AXIS,
                    True, False, QUERIES < 64, LENGTHS or padded(KEY_TILES[g], LENGTH_K), CAUSAL,
                    True, PRECISION, EMULATE,
                )  # fmt: skip
            else:
                for n in tl.range(0, KEY_TILES[g][2], num_stages=STAGES):
                    first_k = KEY_TILES[g][0] + n * KEY_TILES[g][1]
                    k = lines(
                        k_ptr, k_s, first_k, limit, KEY_TILES[g][1], WIDTH, BLOCK_D,
                        LENGTHS or padded(KEY_TILES[g], LENGTH_K),
                    )  # fmt: skip
                    v = lines(
                        v_ptr, v_s, first_k, limit, KEY_TILES[g][1], WIDTH, BLOCK_D,
                        LENGTHS or padded(KEY_TILES[g], LENGTH_K),
                    )  # fmt: skip
                    dq, _, _ = _pair(
                        q, k, v, do, lse_ptr, delta_ptr, dq, 0.0, 0.0, first_q, first_k, limit,
                        scale, LENGTH_Q, QUERIES, KEY_TILES[g][1], AXIS, True, False,
                        QUERIES < 64, LENGTHS or padded(KEY_TILES[g], LENGTH_K), CAUSAL, True,
                        PRECISION, EMULATE,
                    )  # fmt: skip
    store_lines(
        dq_ptr, dq_s, first_q, LENGTH_Q, dq * scale, QUERIES, QUERIES < 64, WIDTH, BLOCK_D, EMULATE
    )


@triton.jit
def _keys(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
    q_s, k_s, v_s, do_s, dk_s, dv_s, q_held, do_held, first_k, limit, scale,
    KEYS: tl.constexpr,
    FIRST_K: tl.constexpr,
    MASK: tl.constexpr,
    LENGTH_Q: tl.constexpr,
    LENGTH_K: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    HELD: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    # dK and dV of a tile of keys
    AXIS: tl.constexpr = 0 if KEYS < 64 else 1
    k = lines(k_ptr, k_s, first_k, limit, KEYS, WIDTH, BLOCK_D, MASK)
    v = lines(v_ptr, v_s, first_k, limit, KEYS, WIDTH, BLOCK_D, MASK)
    dk = empty_lines(KEYS, BLOCK_D, KEYS < 64)
    dv = empty_lines(KEYS, BLOCK_D, KEYS < 64)
    for g in tl.static_range(len(QUERY_TILES)):
        if not (CAUSAL and end_of(QUERY_TILES[g]) <= FIRST_K):
            if HELD:
                _, dk, dv = _pair(
                    q_held[g], k, v, do_held[g], lse_ptr, delta_ptr, 0.0, dk, dv,
                    QUERY_TILES[g][0], first_k, limit, scale, LENGTH_Q, QUERY_TILES[g][1], KEYS,
                    AXIS, False, True, True, MASK, CAUSAL, True, PRECISION, EMULATE,
                )  # fmt: skip
            else:
                for n in tl.range(0, QUERY_TILES[g][2], num_stages=STAGES):
                    first_q = QUERY_TILES[g][0] + n * QUERY_TILES[g][1]
                    q = lines(
                        q_ptr, q_s, first_q, LENGTH_Q, QUERY_TILES[g][1], WIDTH, BLOCK_D,
                        padded(QUERY_TILES[g], LENGTH_Q),
                    )  # fmt: skip
                    do = lines(
                        do_ptr, do_s, first_q, LENGTH_Q, QUERY_TILES[g][1], WIDTH, BLOCK_D,
                        padded(QUERY_TILES[g], LENGTH_Q),
                    )  # fmt: skip
                    _, dk, dv = _pair(
                        q, k, v, do, lse_ptr, delta_ptr, 0.0, dk, dv, first_q, first_k, limit,
                        scale, LENGTH_Q, QUERY_TILES[g][1], KEYS, AXIS, False, True, True, MASK,
                        CAUSAL, True, PRECISION, EMULATE,
                    )  # fmt: skip
    store_lines(
        dk_ptr, dk_s, first_k, LENGTH_K, dk * scale, KEYS, KEYS < 64, WIDTH, BLOCK_D, EMULATE
    )
    store_lines(dv_ptr, dv_s, first_k, LENGTH_K, dv, KEYS, KEYS < 64, WIDTH, BLOCK_D, EMULATE)


@triton.jit(do_not_specialize=[*NUMBERS, *GRADIENT_NUMBERS])
def two_pass_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    do_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
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
    do_b,
    do_h,
    do_s,
    dq_b,
    dq_h,
    dq_s,
    dk_b,
    dk_h,
    dk_s,
    dv_b,
    dv_h,
    dv_s,
    LENGTH_Q: tl.constexpr,
    LENGTH_K: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
    QUERY_LOOPS: tl.constexpr,
    KEY_LOOPS: tl.constexpr,
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
    pair = tl.program_id(0)
    q_ptr = head_of(q_ptr, q_b, q_h, pair, heads, UNIT)
    k_ptr = head_of(k_ptr, k_b, k_h, pair, heads, UNIT)
    v_ptr = head_of(v_ptr, v_b, v_h, pair, heads, UNIT)
    out_ptr = head_of(out_ptr, o_b, o_h, pair, heads, UNIT)
    do_ptr = head_of(do_ptr, do_b, do_h, pair, heads, UNIT)
    dq_ptr = head_of(dq_ptr, dq_b, dq_h, pair, heads, UNIT)
    dk_ptr = head_of(dk_ptr, dk_b, dk_h, pair, heads, UNIT)
    dv_ptr = head_of(dv_ptr, dv_b, dv_h, pair, heads, UNIT)
    q_s *= UNIT
    k_s *= UNIT
    v_s *= UNIT
    o_s *= UNIT
    do_s *= UNIT
    dq_s *= UNIT
    dk_s *= UNIT
    dv_s *= UNIT
    lse_ptr += pair.to(tl.int64) * LENGTH_Q
    delta_ptr += pair.to(tl.int64) * LENGTH_Q
    limit = LENGTH_K
    if LENGTHS:
        limit = tl.minimum(tl.load(length_ptr + pair // heads), LENGTH_K)
    # 1, which the compiler does not know
    once = tl.minimum(heads, 1)
    k_held = ()
    v_held = ()
    if HELD:
        for g in tl.static_range(len(KEY_TILES)):
            k_held += (group(k_ptr, k_s, limit, KEY_TILES, g, LENGTH_K, LENGTHS, WIDTH, BLOCK_D),)
            v_held += (group(v_ptr, v_s, limit, KEY_TILES, g, LENGTH_K, LENGTHS, WIDTH, BLOCK_D),)
    for g in tl.static_range(len(QUERY_LOOPS)):
        for n in tl.range(0, QUERY_LOOPS[g][2] * once, num_stages=1, disable_licm=True):
            _queries(
                q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr,
                q_s, k_s, v_s, o_s, do_s, dq_s, k_held, v_held,
                QUERY_LOOPS[g][0] + n * QUERY_LOOPS[g][1], limit, scale, QUERY_LOOPS[g][1],
                end_of(QUERY_LOOPS[g]), LENGTH_Q, LENGTH_K, KEY_TILES, HELD, LENGTHS, CAUSAL,
                WIDTH, BLOCK_D, STAGES, PRECISION, EMULATE,
            )  # fmt: skip
    tl.debug_barrier()
    q_held = ()
    do_held = ()
    if HELD:
        for g in tl.static_range(len(QUERY_TILES)):
            q_held += (
                group(q_ptr, q_s, LENGTH_Q, QUERY_TILES, g, LENGTH_Q, False, WIDTH, BLOCK_D),
            )
            do_held += (
                group(do_ptr, do_s, LENGTH_Q, QUERY_TILES, g, LENGTH_Q, False, WIDTH, BLOCK_D),
            )
    for g in tl.static_range(len(KEY_LOOPS)):
        for n in tl.range(0, KEY_LOOPS[g][2] * once, num_stages=1, disable_licm=True):
            _keys(
                q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
                q_s, k_s, v_s, do_s, dk_s, dv_s, q_held, do_held,
                KEY_LOOPS[g][0] + n * KEY_LOOPS[g][1], limit, scale, KEY_LOOPS[g][1],
                KEY_LOOPS[g][0], LENGTHS or padded(KEY_LOOPS[g], LENGTH_K), LENGTH_Q, LENGTH_K,
                QUERY_TILES, HELD, CAUSAL, WIDTH, BLOCK_D, STAGES, PRECISION, EMULATE,
            )  # fmt: skip


def walk_options(length_q: int, length_k: int, plan: GradientPlan) -> dict[str, Any]:
    """Keyword arguments of the gradient that a plan decides."""
    walk = {
        "QUERY_TILES": tiles(length_q, plan.queries, unrolled=plan.whole or plan.held),
        "KEY_TILES": tiles(length_k, plan.keys, unrolled=plan.held),
    }
    if plan.whole:
        return walk
    return walk | {
        "QUERY_LOOPS": tiles(length_q, plan.queries),
        "KEY_LOOPS": tiles(length_k, plan.keys),
        "HELD": plan.held,
        "STAGES": plan.stages,
    }


def gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    upstream: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    lengths: Tensor | None,
    scale: float,
    causal: bool,
    plan: GradientPlan,
) -> None:
    """Write `dq`, `dk` and `dv`, of any strides but the last."""
    b, h, s_q, _ = q.shape
    strides, unit = strides_of(q, k, v, out, upstream, dq, dk, dv)
    launch(
        whole_kernel if plan.whole else two_pass_kernel,
        b * h,
        q,
        k,
        v,
        out,
        upstream,
        dq,
        dk,
        dv,
        lse,
        torch.empty_like(lse),
        lse if lengths is None else lengths,
        scale,
        h,
        *strides,
        UNIT=unit,
        **walk_options(s_q, k.shape[2], plan),
        **run_options(plan),
        **shared_options(q, k, lengths, causal),
    )
