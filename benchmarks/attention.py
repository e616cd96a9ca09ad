"""Attention at the lengths of image and text towers beside its baselines."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastclip.bench.attention_parts import HEADS, SDPA, SHAPES, WIDTH, inputs_of, split
from fastclip.bench.runner import (
    Row,
    Settings,
    interleave,
    peak_since,
    quantile,
    relative,
    reset_peak,
)
from fastclip.ops.attention import attention, packed_attention

QUANTILES = (0.2, 0.5, 0.8)


@dataclass
class AttentionRow(Row):
    """A baseline at one length: `n` tokens, heads `width` wide."""

    causal: bool = False
    forward_p20: float | None = None
    forward_p80: float | None = None


def baselines(
    settings: Settings,
    add: Callable[[list["AttentionRow"]], None],
    tokens: int,
    shapes: Sequence[tuple[int, bool]] = SHAPES,
    flex: bool = True,
    heads: int = HEADS,
    width: int = WIDTH,
) -> list[AttentionRow]:
    """Every implementation forward, and forward and backward, in interleaved rounds.

    `add` receives the rows of each length.
    """
    rows: list[AttentionRow] = []
    for length, causal in shapes:
        batch = max(tokens // length, 1)
        qkv = inputs_of(batch, length, heads, width, settings.dtype, settings.device)
        found = _measure(qkv, causal, settings, flex)
        rows += found
        add(found)
        del qkv
    return rows


def _measure(qkv: Tensor, causal: bool, settings: Settings, flex: bool) -> list[AttentionRow]:
    length, width = qkv.shape[1], qkv.shape[4]
    packed = qkv.requires_grad_()
    parts = [t.detach().requires_grad_() for t in split(qkv.detach())]
    upstream = torch.randn_like(parts[0])
    some = [t.detach()[:2].double().requires_grad_() for t in parts]
    exact = attention(*some, causal=causal, backend="reference")
    (truth,) = torch.autograd.grad(exact, some[0], upstream[:2].double())
    rows, runs = [], {}
    for name, function in _ways(causal, flex, settings.device).items():
        row = AttentionRow("attention", name, length, width, causal=causal)
        rows.append(row)
        of_packed = name.endswith("packed")
        leaves = [packed] if of_packed else parts
        # a packed result has its tokens before its heads
        given = upstream.transpose(1, 2).contiguous() if of_packed else upstream

        def run(backward: bool, function=function, leaves=leaves, given=given) -> Any:
            with torch.set_grad_enabled(backward):
                out = function(*leaves)
            return torch.autograd.grad(out, leaves, given) if backward else None

        try:
            first = run(True)[0]
            dq = first[:, :, 0].transpose(1, 2) if of_packed else first
            row.error = relative(dq[:2], truth)
            del first, dq
            before = reset_peak(settings.device)
            second = run(True)
            row.peak_bytes = peak_since(settings.device, before)
            row.repeatable = all(map(torch.equal, second, run(True)))
            runs[name] = run
        except Exception as problem:
            row.status = f"failed: {type(problem).__name__}: {str(problem).splitlines()[0][:80]}"
    forward = {name: lambda run=run: run(False) for name, run in runs.items()}
    both = {name: lambda run=run: run(True) for name, run in runs.items()}
    times, lost = interleave(forward, settings.rounds, settings)
    for row in rows:
        if row.baseline in times:
            row.forward_p20, row.forward, row.forward_p80 = (
                quantile(times[row.baseline], q) for q in QUANTILES
            )
    times, more = interleave(both, settings.rounds, settings)
    for row in rows:
        row.status = {**lost, **more}.get(row.baseline, row.status)
        if row.baseline in times:
            row.p20, row.p50, row.p80 = (quantile(times[row.baseline], q) for q in QUANTILES)
    ours = rows[0].p50
    for row in rows:
        if row.p50 and ours:
            row.ratio = row.p50 / ours
    return rows


def _ways(causal: bool, flex: bool, device: str) -> dict[str, Callable[..., Tensor]]:
    # by name; those that end in "packed" take (B, S, 3, H, D) and return (B, S, H, D)
    ours = "triton" if device == "cuda" else "auto"
    implementations: dict[str, Callable[..., Tensor]] = {
        "fastclip": lambda q, k, v: attention(q, k, v, causal=causal, backend=ours),
        "fastclip packed": lambda qkv: packed_attention(qkv, causal=causal, backend=ours),
    }

    def of_sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal)

        return run

    for name, backend in SDPA.items():
        implementations[name] = of_sdpa(backend)
    for name in ("sdpa flash", "sdpa cudnn"):
        implementations[f"{name} packed"] = lambda qkv, run=implementations[name]: run(
            *qkv.permute(2, 0, 3, 1, 4).unbind(0)
        ).transpose(1, 2)
    if flex and device == "cuda":
        implementations["flex compiled"] = _flex(causal)
    with contextlib.suppress(ImportError):
        from flash_attn import flash_attn_func, flash_attn_qkvpacked_func

        implementations["flash-attn"] = lambda q, k, v: flash_attn_func(
            *(t.transpose(1, 2) for t in (q, k, v)), causal=causal
        ).transpose(1, 2)
        implementations["flash-attn packed"] = lambda qkv: flash_attn_qkvpacked_func(
            qkv, causal=causal
        )
    return implementations


def _flex(causal: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None
        if causal:
            mask = masks.setdefault(
                q.shape[2],
                create_block_mask(
                    lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], q.device.type
                ),
            )
        return compiled(q, k, v, block_mask=mask)

    masks: dict[int, Any] = {}
    return run
