"""Attention over short sequences: softmax(scale Q K^T) V for image and text towers.

Towers see 50 to 577 tokens with heads 64 wide; there attention costs what its memory traffic costs.
`triton` reads Q, K and V in place in any layout, a packed projection included, and writes the
gradients where the layout wants them (kernels/attention.py). `auto` is torch's operator but for
the shapes at which ours was measured to be faster (kernels/attention_plans.json).

Shape suffixes: B batch, H heads, S sequence length, D head width.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.ops import attention_reference as plain
from fastclip.ops import backend as backends
from fastclip.ops import checks
from fastclip.ops.compiling import constant_in_graphs
from fastclip.ops.gemm import count_product
from fastclip.ops.registration import Backward, Tensors, register

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
        (B, H, S, D) in the dtype of the computation, heads and tokens in memory as the query's.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together.

    Examples:
        >>> import torch
        >>> from fastclip.functional import attention
        >>> query, key, value = torch.zeros(3, 2, 4, 50, 64)  # 2 images, 4 heads, 50 tokens
        >>> attention(query, key, value).shape
        torch.Size([2, 4, 50, 64])
    """
    compute_dtype = checks.compute_dtype_of(query, precision)
    _check(query, key, value, precision)
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
        out: Tensor = _attention(q, k, v, key_lengths, causal=causal, scale=scale, needs=())[0]
        return out


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
        qkv: (B, S, 3, H, D): query, key and value of every token and head.
        causal: whether a token sees only itself and those before it.
        key_lengths: (B,) integers; tokens from there on are padding.
        scale: a positive number; None is 1 / sqrt(D).
        backend: "auto", "triton", "sdpa" (torch's), "flash" (the flash-attn package) or
            "reference" (dense, twice differentiable).
        precision: "auto" follows autocast, "input" computes in the input's dtype.

    Returns:
        (B, S, H, D) in the dtype of the computation, contiguous with `triton`.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together.

    Examples:
        >>> import torch
        >>> from fastclip.functional import packed_attention
        >>> qkv = torch.nn.Linear(256, 3 * 256)(torch.zeros(2, 50, 256)).unflatten(-1, (3, 4, 64))
        >>> packed_attention(qkv).flatten(2).shape  # heads side by side again
        torch.Size([2, 50, 256])
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; give (batch, tokens, 3, heads, width)")
    compute_dtype = checks.compute_dtype_of(qkv, precision)
    _check(*_unpacked(qkv), precision)
    q, k, _ = _unpacked(qkv)
    scale = _check_options(q, k, key_lengths, causal, scale)
    chosen = _choose(q, k, causal, compute_dtype, backend, key_lengths)
    with checks.without_autocast(qkv.device):
        qkv = qkv.to(compute_dtype)
        if chosen == "triton":
            checks.refuse_transforms(qkv)
            out: Tensor = _packed(qkv, key_lengths, causal=causal, scale=scale, needs=())[0]
            return out
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
    chosen: str = _choice(*shape, causal, dtype, backend, q.device)
    if chosen == "triton":
        if shape[2] > WIDEST:
            raise ValueError(
                f"heads are {shape[2]} wide, backend 'triton' goes to {WIDEST}; use 'sdpa'"
            )
    if chosen == "flash" and key_lengths is not None:
        raise ValueError("backend 'flash' takes no key_lengths here; use 'triton' or 'sdpa'")
    return chosen


@constant_in_graphs
def _choice(
    length_q: int,
    length_k: int,
    width: int,
    causal: bool,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> str:
    chosen: str = backends.choose("attention", backend, device, dtype)
    asked = backend != "auto" or os.environ.get(backends.ENVIRONMENT_VARIABLE) == chosen
    if asked or device.type != "cuda":
        return chosen
    if backends.unavailable_reason("attention", "triton", device, dtype):
        return chosen
    from fastclip.kernels.attention_plans import measured, shape_key
    from fastclip.kernels.launch import true_architecture

    faster = measured()["faster"].get(true_architecture(device), ())
    return "triton" if shape_key(length_q, length_k, width, dtype, causal) in faster else chosen


class _Options(NamedTuple):
    causal: bool
    scale: float
    needs: tuple[bool, ...]


def _forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, **options: Any) -> Any:
    out = _like(q)
    q, k, v = _readable(q, k, v)
    return out, _write_output(q, k, v, out, lengths, _Options(**options))


def _fake(inputs: Tensors, options: _Options) -> list[Tensor]:
    q = inputs[0]
    return [_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)]


def _gradient(
    inputs: Tensors, saved: Tensors, upstream: Tensors, options: _Options
) -> Sequence[Tensor]:
    q, k, v, lengths = inputs
    gradients = [_like(one) for one in (q, k, v)]
    _write_gradient((q, k, v), (*saved, upstream[0]), gradients, lengths, options)
    return gradients


def _packed_forward(qkv: Tensor, lengths: Tensor | None, **options: Any) -> Any:
    q, k, v = _unpacked(_readable(qkv)[0])
    b, h, s, d = q.shape
    # contiguous, however heads and tokens lie in `qkv`
    out = qkv.new_empty((b, s, h, d))
    lse = _write_output(q, k, v, out.transpose(1, 2), lengths, _Options(**options))
    return out, lse


def _packed_fake(inputs: Tensors, options: _Options) -> list[Tensor]:
    b, s, _, h, d = inputs[0].shape
    return [
        inputs[0].new_empty((b, s, h, d)),
        inputs[0].new_empty((b, h, s), dtype=torch.float32),
    ]


def _packed_gradient(
    inputs: Tensors, saved: Tensors, upstream: Tensors, options: _Options
) -> Sequence[Tensor]:
    qkv, lengths = inputs
    out, lse = saved
    gradient = qkv.new_empty(qkv.shape)
    results = out.transpose(1, 2), lse, upstream[0].transpose(1, 2)
    _write_gradient(_unpacked(qkv), results, _unpacked(gradient), lengths, options)
    return (gradient,)


def _write_output(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lengths: Tensor | None, options: _Options
) -> Tensor:
    """The attention into `out`, and the log-sum-exps of the scores."""
    from fastclip.kernels.attention import forward
    from fastclip.kernels.attention_plans import forward_plan

    _count(q, k, 2)
    plan = forward_plan(_key(q, k, options.causal), q.device)
    return forward(q, k, v, out, _as_int(lengths), options.scale, options.causal, plan)


def _write_gradient(
    inputs: Tensors,
    results: Tensors,
    gradients: Tensors,
    lengths: Tensor | None,
    options: _Options,
) -> None:
    """Into dq, dk and dv, from q, k and v, and the output, its log-sum-exps and its gradient."""
    from fastclip.kernels.attention_gradient import gradient
    from fastclip.kernels.attention_plans import gradient_plan

    (q, k, _), (out, lse, upstream) = inputs, results
    plan = gradient_plan(_key(q, k, options.causal), q.device)
    q, k, v, upstream = _readable(*inputs, upstream)
    dq, dk, dv = gradients
    where = _as_int(lengths), options.scale, options.causal, plan
    gradient(q, k, v, out, lse, upstream, dq, dk, dv, *where)
    _count(q, k, 5 if plan.whole else 7)


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
    # (B, H, S, D) with heads and tokens in memory in the order of `t`
    b, h, s, d = t.shape
    if t.stride(1) < t.stride(2):
        return t.new_empty((b, s, h, d)).transpose(1, 2)
    return t.new_empty((b, h, s, d))


def _as_int(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int32).contiguous()


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    tokens = (t.transpose(1, 2) for t in (q, k, v))
    out: Tensor = flash_attn_func(*tokens, softmax_scale=scale, causal=causal)
    return out.transpose(1, 2)


def _check(query: Tensor, key: Tensor, value: Tensor, precision: str) -> None:
    for name, t in (("query", query), ("key", key), ("value", value)):
        if type(t).__name__ == "DTensor":
            raise ValueError(f"the {name} is a DTensor; pass its local part (.to_local())")
        if t.ndim != 4:
            raise ValueError(
                f"the {name} has shape {tuple(t.shape)}; give (batch, heads, tokens, width)"
            )
        if not t.is_floating_point():
            raise ValueError(f"the {name} is {t.dtype}; give floating point")
        if 0 in t.shape:
            raise ValueError(f"the {name} has shape {tuple(t.shape)}; nothing may be empty")
        if t.device != query.device:
            raise ValueError(
                f"the {name} is on {t.device}, the query on {query.device}; move one of them"
            )
        cast = precision == "auto" and checks.autocast_enabled(query.device)
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
            "numbers of tokens may differ"
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
        default: float = query.shape[3] ** -0.5
        return default
    checks.check_positive("scale", scale)
    return float(scale)


def _flop(shapes: Sequence[Sequence[int]], products: int) -> int:
    b, h, s, d = shapes[0]
    return products * 2 * b * h * s * shapes[1][2] * d


def _packed_flop(shapes: Sequence[Sequence[int]], products: int) -> int:
    b, s, _, h, d = shapes[0]
    return products * 2 * b * h * s * s * d


_attention = register(
    "attention",
    _forward,
    inputs="q k v lengths?",
    outputs=2,
    record=_Options,
    fake=_fake,
    flop=lambda shapes, options: _flop(shapes, 2),
    backward=Backward(
        _gradient,
        inputs=3,
        saved=(0, 1),
        constant=(1,),
        flop=lambda shapes, options: _flop(shapes, 5),
        fake=lambda inputs, options: [_like(one) for one in inputs[:3]],
    ),
)
_packed = register(
    "packed_attention",
    _packed_forward,
    inputs="qkv lengths?",
    outputs=2,
    record=_Options,
    fake=_packed_fake,
    flop=lambda shapes, options: _packed_flop(shapes, 2),
    backward=Backward(
        _packed_gradient,
        inputs=1,
        saved=(0, 1),
        constant=(1,),
        flop=lambda shapes, options: _packed_flop(shapes, 5),
        fake=lambda inputs, options: [inputs[0].new_empty(inputs[0].shape)],
    ),
)
