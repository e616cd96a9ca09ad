"""Attention over short sequences: softmax(scale Q K^T) V for image and text towers.

Towers see 50 to 577 lines with heads 64 wide; there attention costs what its memory traffic costs.
`triton` reads Q, K and V in place in any layout, a packed projection included, and writes the
gradients where the layout wants them (kernels/attention.py). `auto` is torch's operator but for
the shapes at which ours was measured to be faster (kernels/attention_plans.json).

Shape suffixes: B batch, H heads, S lines, D head width.
"""

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastclip.ops import attention_reference as plain
from fastclip.ops import backend as backends
from fastclip.ops import checks
from fastclip.ops.gemm import count_product

WIDEST = 128


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """softmax(scale * query @ key.T) @ value for every head (Vaswani et al. 2017, equation 1).

    Args:
        query: (B, H, S, D), of any strides; read in place where the last is 1.
        key, value: (B, H, T, D), likewise.
        causal: whether query i sees keys 0 to i only; then T = S.
        key_lengths: (B,) integers; keys from there on are padding. A query that sees no key has
            output and gradients 0.
        scale: a positive number; None is 1 / sqrt(D).
        backend: "auto", "triton", "sdpa" (torch's), "flash" (the flash-attn package) or
            "reference" (dense, twice differentiable).
        precision: "auto" follows autocast, "input" computes in the inputs' dtype.

    Returns:
        (B, H, S, D) in the dtype of the computation, heads and lines in memory as the query's.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together.
    """
    compute_dtype = checks.compute_dtype_of(query, precision)
    _check(query, key, value, compute_dtype)
    scale = _check_options(query, key, key_lengths, causal, scale)
    chosen = _choose(query, key, causal, compute_dtype, backend, key_lengths)
    # once, and outside of autocast, whose own casts would repeat in the backward
    with checks.without_autocast(query.device):
        q, k, v = (t.to(compute_dtype) for t in (query, key, value))
        if chosen == "reference":
            return plain.attention(q, k, v, key_lengths, causal, scale)
        if chosen == "sdpa":
            return plain.sdpa(q, k, v, key_lengths, causal, scale)
        if chosen == "flash":
            return _flash(q, k, v, causal, scale)
        checks.refuse_transforms(q, k, v)
        return _forward(q, k, v, key_lengths, causal, scale)[0]


def packed_attention(
    qkv: Tensor,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """`attention` of a packed projection, read in place; its gradient is one packed tensor.

    Args:
        qkv: (B, S, 3, H, D): query, key and value of every line and head.
        causal, key_lengths, scale, backend, precision: as `attention`.

    Returns:
        (B, S, H, D), contiguous with `triton`.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; give (batch, lines, 3, heads, width)")
    compute_dtype = checks.compute_dtype_of(qkv, precision)
    _check(*_unpacked(qkv), compute_dtype)
    q, k, _ = _unpacked(qkv)
    scale = _check_options(q, k, key_lengths, causal, scale)
    chosen = _choose(q, k, causal, compute_dtype, backend, key_lengths)
    with checks.without_autocast(qkv.device):
        qkv = qkv.to(compute_dtype)
        if chosen == "triton":
            checks.refuse_transforms(qkv)
            return _packed_forward(qkv, key_lengths, causal, scale)[0]
    options: dict[str, Any] = {"causal": causal, "key_lengths": key_lengths, "scale": scale}
    out = attention(*_unpacked(qkv), **options, backend=chosen, precision="input")
    return out.transpose(1, 2)


def _unpacked(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _choose(
    q: Tensor,
    k: Tensor,
    causal: bool,
    dtype: torch.dtype,
    backend: str,
    key_lengths: Tensor | None,
) -> str:
    shape = (int(q.shape[2]), int(k.shape[2]), int(q.shape[3]))
    chosen = _choice(*shape, causal, dtype, backend, q.device)
    if chosen == "triton":
        if shape[2] > WIDEST:
            raise ValueError(
                f"heads are {shape[2]} wide, backend 'triton' goes to {WIDEST}; use 'sdpa'"
            )
    if chosen == "flash" and key_lengths is not None:
        raise ValueError("backend 'flash' takes no key_lengths here; use 'triton' or 'sdpa'")
    return chosen


@torch.compiler.assume_constant_result
def _choice(
    length_q: int,
    length_k: int,
    width: int,
    causal: bool,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> str:
    chosen = backends.choose("attention", backend, device, dtype)
    asked = backend != "auto" or os.environ.get(backends.ENVIRONMENT_VARIABLE) == chosen
    if asked or device.type != "cuda":
        return chosen
    if backends.obstacle("attention", "triton", device, dtype):
        return chosen
    from fastclip.kernels.attention_plans import measured, shape_key
    from fastclip.kernels.launch import true_architecture

    faster = measured()["faster"].get(true_architecture(device), ())
    return "triton" if shape_key(length_q, length_k, width, dtype, causal) in faster else chosen


@torch.library.custom_op("fastclip::attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from fastclip.kernels.attention import forward

    q, k, v = _readable(q, k, v)
    out = _like(q)
    return out, forward(q, k, v, out, _as_int(lengths), scale, causal, _plan(q, k, causal))


@_forward.register_fake
def _(q, k, v, lengths, causal, scale):
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("fastclip::attention_backward", mutates_args=())
def _gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    upstream: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _like(q), _like(k), _like(v)
    _write_gradient(q, k, v, out, lse, upstream, dq, dk, dv, lengths, causal, scale)
    return dq, dk, dv


@_gradient.register_fake
def _(q, k, v, *rest):
    return _like(q), _like(k), _like(v)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, lengths, causal, scale = inputs
    ctx.save_for_backward(q, k, v, *output, lengths)
    ctx.set_materialize_grads(False)
    ctx.options = causal, scale


def _backward(ctx: Any, upstream: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 6
    q, k, v, out, lse, lengths = ctx.saved_tensors
    gradients = _gradient(q, k, v, out, lse, upstream, lengths, *ctx.options)
    wanted = (g if w else None for g, w in zip(gradients, ctx.needs_input_grad[:3], strict=True))
    return *wanted, None, None, None


_forward.register_autograd(_backward, setup_context=_context)
_gradient.register_autograd(checks.no_double_backward)


@torch.library.custom_op("fastclip::packed_attention", mutates_args=())
def _packed_forward(
    qkv: Tensor, lengths: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from fastclip.kernels.attention import forward

    q, k, v = _unpacked(_readable(qkv)[0])
    out = _like(q)
    lse = forward(q, k, v, out, _as_int(lengths), scale, causal, _plan(q, k, causal))
    return out.transpose(1, 2), lse


@_packed_forward.register_fake
def _(qkv, lengths, causal, scale):
    b, s, _, h, d = qkv.shape
    return qkv.new_empty((b, s, h, d)), qkv.new_empty((b, h, s), dtype=torch.float32)


@torch.library.custom_op("fastclip::packed_attention_backward", mutates_args=())
def _packed_gradient(
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    upstream: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    gradient = qkv.new_empty(qkv.shape)
    _write_gradient(
        *_unpacked(qkv),
        out.transpose(1, 2),
        lse,
        upstream.transpose(1, 2),
        *_unpacked(gradient),
        lengths,
        causal,
        scale,
    )
    return gradient


@_packed_gradient.register_fake
def _(qkv, *rest):
    return qkv.new_empty(qkv.shape)


def _packed_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, lengths, causal, scale = inputs
    ctx.save_for_backward(qkv, *output, lengths)
    ctx.set_materialize_grads(False)
    ctx.options = causal, scale


def _packed_backward(ctx: Any, upstream: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 4
    qkv, out, lse, lengths = ctx.saved_tensors
    return _packed_gradient(qkv, out, lse, upstream, lengths, *ctx.options), None, None, None


_packed_forward.register_autograd(_packed_backward, setup_context=_packed_context)
_packed_gradient.register_autograd(checks.no_double_backward)


def _write_gradient(
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
    causal: bool,
    scale: float,
) -> None:
    from fastclip.kernels.attention_gradient import gradient
    from fastclip.kernels.attention_plans import gradient_plan

    plan = gradient_plan(_key(q, k, causal), q.device)
    q, k, v, upstream = _readable(q, k, v, upstream)
    gradient(q, k, v, out, lse, upstream, dq, dk, dv, _as_int(lengths), scale, causal, plan)
    _count(q, k, 5 if plan.whole else 7)


def _plan(q: Tensor, k: Tensor, causal: bool) -> Any:
    from fastclip.kernels.attention_plans import forward_plan

    _count(q, k, 2)
    return forward_plan(_key(q, k, causal), q.device)


def _key(q: Tensor, k: Tensor, causal: bool) -> str:
    from fastclip.kernels.attention_plans import shape_key

    return shape_key(q.shape[2], k.shape[2], q.shape[3], q.dtype, causal)


def _count(q: Tensor, k: Tensor, products: int) -> None:
    b, h, s, d = q.shape
    for _ in range(products):
        count_product(b * h * s, d, k.shape[2])


def _readable(*tensors: Tensor) -> list[Tensor]:
    # a sum's upstream gradient is one number, expanded
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _like(t: Tensor) -> Tensor:
    # (B, H, S, D) with heads and lines in memory in the order of `t`
    b, h, s, d = t.shape
    if t.stride(1) < t.stride(2):
        return t.new_empty((b, s, h, d)).transpose(1, 2)
    return t.new_empty((b, h, s, d))


def _as_int(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int32)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    lines = (t.transpose(1, 2) for t in (q, k, v))
    return flash_attn_func(*lines, softmax_scale=scale, causal=causal).transpose(1, 2)


def _check(query: Tensor, key: Tensor, value: Tensor, compute_dtype: torch.dtype) -> None:
    for name, t in (("query", query), ("key", key), ("value", value)):
        if type(t).__name__ == "DTensor":
            raise ValueError(f"the {name} is a DTensor; pass its local part (.to_local())")
        if t.ndim != 4:
            raise ValueError(
                f"the {name} has shape {tuple(t.shape)}; give (batch, heads, lines, width)"
            )
        if not t.is_floating_point():
            raise ValueError(f"the {name} is {t.dtype}; give floating point")
        if 0 in t.shape:
            raise ValueError(f"the {name} has shape {tuple(t.shape)}; nothing may be empty")
        if t.device != query.device:
            raise ValueError(
                f"the {name} is on {t.device}, the query on {query.device}; move one of them"
            )
        cast = compute_dtype != query.dtype or checks.autocast_enabled(query.device)
        if t.dtype != query.dtype and (not cast or torch.float64 in (t.dtype, query.dtype)):
            raise ValueError(f"the {name} is {t.dtype}, the query {query.dtype}; cast one of them")
    if key.shape != value.shape:
        raise ValueError(
            f"the key has shape {tuple(key.shape)}, the value {tuple(value.shape)}; give one shape"
        )
    b, h, _, d = query.shape
    if key.shape[:2] != (b, h) or key.shape[3] != d:
        raise ValueError(
            f"the query has shape {tuple(query.shape)}, the key {tuple(key.shape)}; only the "
            "lines may differ in number"
        )


def _check_options(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, causal: bool, scale: float | None
) -> float:
    if causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries and {key.shape[2]} keys; causal attention needs as many"
        )
    if key_lengths is not None:
        checks.check_ids("key_lengths", key_lengths, query.shape[0], query.device)
    if scale is None:
        return query.shape[3] ** -0.5
    checks.check_positive("scale", scale)
    return float(scale)


def _flop(q_shape: Any, k_shape: Any, products: int) -> int:
    b, h, s, d = q_shape
    return products * 2 * b * h * s * k_shape[2] * d


@register_flop_formula(torch.ops.fastclip.attention)
def _forward_flop(q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    return _flop(q_shape, k_shape, 2)


@register_flop_formula(torch.ops.fastclip.attention_backward)
def _gradient_flop(q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    return _flop(q_shape, k_shape, 5)


def _packed_flop(qkv_shape: Any, products: int) -> int:
    b, s, _, h, d = qkv_shape
    return _flop((b, h, s, d), (b, h, s, d), products)


@register_flop_formula(torch.ops.fastclip.packed_attention)
def _packed_forward_flop(qkv_shape, *args, out_shape=None, **kwargs) -> int:
    return _packed_flop(qkv_shape, 2)


@register_flop_formula(torch.ops.fastclip.packed_attention_backward)
def _packed_gradient_flop(qkv_shape, *args, out_shape=None, **kwargs) -> int:
    return _packed_flop(qkv_shape, 5)
