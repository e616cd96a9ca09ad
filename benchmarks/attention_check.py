"""Attention against float64 by the error rule, in many cases; and bitwise reproducibility.

On a CPU, under TRITON_INTERPRET=1, it takes small shapes.
"""

import itertools
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclip.bench.attention_parts import in_parallel, inputs_of, say, write_findings
from fastclip.ops.attention import attention, packed_attention

LENGTHS = (1, 5, 16, 49, 50, 64, 77, 196, 197, 256, 257, 576, 577)


@dataclass(frozen=True)
class Case:
    """One case of the check."""

    length: int
    heads: int
    width: int
    dtype: str
    causal: bool
    padded: bool
    packed: bool


def cases(device: str, count: int, seed: int) -> list[Case]:
    """A random subset of the grid, small on a CPU."""
    rng = random.Random(seed)
    small = device == "cpu"
    grid = itertools.product(
        [n for n in LENGTHS if not small or n <= 77],
        (1, 3) if small else (1, 3, 12),
        (32, 64, 80, 128),
        ("bfloat16", "float16", "float32"),
        (False, True),
        (False, True),
        (False, True),
    )
    every = [Case(*values) for values in grid]
    return rng.sample(every, min(count, len(every)))


def drawn_cases(device: str, seconds: float, seed: int) -> list[Case]:
    """As many cases as should fit the time."""
    return cases(device, 6 if device == "cpu" else max(int(seconds / 2), 12), seed)


def check(device: str, seconds: float, output: Path | None, seed: int = 0) -> bool:
    """The operator against float64 by the error rule until the time is up; and its bits."""
    stop = time.monotonic() + seconds
    drawn = drawn_cases(device, seconds, seed)
    if device == "cuda":
        jobs = [(run_case, (case, device, 2)) for case in (*_repeated(device), *drawn)]
        in_parallel(jobs, stop - seconds / 3)
    worst, failed, done = 0.0, [], 0
    for case in drawn:
        if time.monotonic() > stop:
            break
        try:
            share = _share_of_bound(case, device)
        except Exception as error:
            share = float("inf")
            say("FAILED", case, f"{type(error).__name__}: {str(error)[:200]}")
        done += 1
        worst = max(worst, share)
        if not share <= 1:
            failed.append(asdict(case))
            say(f"WRONG {share:.2f} of the bound", case)
    repeats = _same_bits(device)
    say(f"check: {done} cases, worst error {worst:.2f} of its bound, {len(failed)} wrong;",
        f"bitwise reproducible: {repeats}")  # fmt: skip
    write_findings(output, "attention-check.json", device, cases=done, worst=worst, failed=failed,
           same_bits=repeats)  # fmt: skip
    return repeats and not failed


def run_case(case: Case, device: str, batch: int) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of ours, and what they are made of."""
    dtype = getattr(torch, case.dtype)
    qkv = inputs_of(batch, case.length, case.heads, case.width, dtype, device, case.length)
    lengths = None
    if case.padded:
        # one has no key at all
        lengths = torch.arange(batch, device=device) * case.length // max(batch - 1, 1)
    upstream = torch.randn(
        (batch, case.length, case.heads, case.width),
        generator=torch.Generator(device).manual_seed(1), device=device,
    ).to(dtype)  # fmt: skip
    options: dict[str, Any] = {"causal": case.causal, "key_lengths": lengths}
    leaf = qkv.clone().requires_grad_()
    if case.packed:
        out = packed_attention(leaf, **options, backend="triton")
    else:
        parts = leaf.permute(2, 0, 3, 1, 4).unbind(0)
        out = attention(*parts, **options, backend="triton").transpose(1, 2)
    (gradient,) = torch.autograd.grad(out, leaf, upstream)
    return [out.detach(), gradient], [qkv, upstream, *([] if lengths is None else [lengths])]


def _share_of_bound(case: Case, device: str) -> float:
    got, (qkv, upstream, *lengths) = run_case(case, device, 3)
    options: dict[str, Any] = {
        "causal": case.causal,
        "key_lengths": lengths[0] if lengths else None,
    }

    def run(qkv: Tensor, backend: str) -> list[Tensor]:
        leaf = qkv.clone().requires_grad_()
        out = packed_attention(leaf, **options, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaf, upstream.to(leaf.dtype))]

    truth, torchs = run(qkv.double(), "reference"), run(qkv, "sdpa")
    eps = torch.finfo(qkv.dtype).eps
    shares = []
    for mine, theirs, want in zip(got, torchs, truth, strict=True):
        bound = 2 * (theirs.double() - want).abs().max() + 8 * eps * want.abs().max()
        shares.append(((mine.double() - want).abs().max() / bound.clamp(min=1e-30)).item())
    # a NaN is over every bound
    return max(share if share == share else float("inf") for share in shares)


def _repeated(device: str) -> list[Case]:
    lengths = (21,) if device == "cpu" else (50, 197, 257, 577)
    return [Case(n, 2, 64, "bfloat16", False, True, True) for n in lengths]


def _same_bits(device: str) -> bool:
    for case in _repeated(device):
        first, _ = run_case(case, device, 2)
        for _ in range(2 if device == "cpu" else 20):
            again, _ = run_case(case, device, 2)
            if not all(map(torch.equal, first, again)):
                return False
    return True
