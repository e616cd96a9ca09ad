"""Attention's kernels under Triton's interpreter, in every way of walking a sequence."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip.kernels import attention as forward_module
from fastclip.kernels import attention_gradient as gradient_module
from fastclip.kernels.attention_plans import (
    GradientPlan,
    Plan,
    family,
    forward_rule,
    gradient_rule,
    measured,
    tiles,
)
from fastclip.kernels.launch import INTERPRETED, count_launches
from fastclip.ops.attention import attention, packed_attention
from tests.ops.test_attention import oracle, tensors

pytestmark = pytest.mark.skipif(
    not INTERPRETED,
    reason="a GPU is there: fastclip.bench.attention_lab --check runs the kernels on it",
)

LENGTHS = (1, 5, 16, 17, 33, 49, 50, 64, 77, 112, 196, 197, 240, 256, 257, 576, 577)
# held, a whole head a program; what the interpreter runs does not depend on warps
FORWARD = {
    "held": Plan(64, 64, True, True, 4, 1),
    "held wide": Plan(128, 256, True, True, 8, 1),
    "streamed": Plan(64, 64, False, False, 4, 2),
    "held tiles": Plan(128, 64, True, False, 8, 1),
    "narrow": Plan(16, 32, False, True, 4, 1),
}
GRADIENT = {
    "whole": GradientPlan(64, 64, True, False, 8, 1),
    "whole wide": GradientPlan(64, 128, True, False, 8, 1),
    "two passes held": GradientPlan(128, 64, False, True, 4, 1),
    "two passes streamed": GradientPlan(64, 64, False, False, 4, 2),
    "narrow": GradientPlan(16, 32, False, False, 8, 1),
}
# batch, heads, lines, keys, width, causal, lengths, dtype
CASES = {
    "ViT-B/32": (1, 2, 50, 50, 64, False, None, torch.bfloat16),
    "text": (1, 2, 77, 77, 64, True, None, torch.bfloat16),
    "padded text": (2, 1, 77, 77, 32, True, [0, 70], torch.float32),
    "ViT-B/16": (1, 1, 197, 197, 64, False, None, torch.float16),
    "ViT-L/14": (1, 1, 257, 257, 64, False, None, torch.bfloat16),
    "ViT-H/14": (1, 1, 129, 129, 80, False, None, torch.bfloat16),
    "pooling": (1, 2, 1, 257, 64, False, None, torch.float32),
    "padded": (3, 1, 21, 133, 32, False, [0, 70, 133], torch.bfloat16),
    "many queries": (1, 1, 133, 5, 16, False, None, torch.float32),
    "one line short": (1, 2, 31, 31, 16, False, None, torch.float32),
}


def run(
    inputs: list[Tensor], causal: bool, lengths: Tensor | None, plan: Plan, back: GradientPlan
) -> list[Tensor]:
    """The output and the gradients, in memory that was NaN."""
    q, k, v, upstream = inputs
    scale = q.shape[3] ** -0.5
    out, *gradients = (torch.full_like(t, torch.nan) for t in (q, q, k, v))
    lse = forward_module.forward(q, k, v, out, lengths, scale, causal, plan)
    gradient_module.gradient(
        q, k, v, out, lse, upstream, *gradients, lengths, scale, causal, back
    )  # fmt: skip
    return [out, *gradients]


def truth(inputs: list[Tensor], causal: bool, lengths: Tensor | None) -> list[Tensor]:
    """The same in torch, in the inputs' dtype."""
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    out = oracle(*leaves, causal, lengths, leaves[0].shape[3] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def check(inputs: list[Tensor], causal: bool, lengths: Tensor | None) -> None:
    """The error rule: twice torch's own error in the same dtype and 8 eps of the largest entry."""
    want = truth([t.double() for t in inputs], causal, lengths)
    torchs = truth(inputs, causal, lengths)
    eps = torch.finfo(inputs[0].dtype).eps
    for (kind, plan), (back_kind, back) in zip(FORWARD.items(), GRADIENT.items(), strict=True):
        got = run(inputs, causal, lengths, plan, back)
        for what, mine, theirs, exact in zip("o q k v".split(), got, torchs, want, strict=True):
            bound = 2 * (theirs.double() - exact).abs().max() + 8 * eps * exact.abs().max()
            error = (mine.double() - exact).abs().max()
            assert error <= bound, (kind, back_kind, what, error, bound)


@pytest.mark.parametrize("name", CASES)
def test_every_plan(name: str) -> None:
    batch, heads, lines, keys, width, causal, padding, dtype = CASES[name]
    inputs = tensors(batch, heads, lines, width, dtype, keys)
    lengths = None if padding is None else torch.tensor(padding, dtype=torch.int32)
    check(inputs, causal, lengths)


def test_large_scores_do_not_overflow() -> None:
    """Scores of some hundreds: exp of them would not fit, and padding must not bring it back."""
    inputs = tensors(1, 1, 21, 16, torch.float32)
    inputs[0] *= 5
    inputs[1] = -inputs[0].clone() * 3
    want = truth([t.double() for t in inputs], False, None)
    for plan, back in zip(FORWARD.values(), GRADIENT.values(), strict=True):
        for mine, exact in zip(run(inputs, False, None, plan, back), want, strict=True):
            # one key has nearly all weight: dQ cancels to little, from terms of some hundreds
            torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-3)


def test_nan_in_nan_out() -> None:
    inputs = tensors(1, 2, 21, 16, torch.float32)
    inputs[0][0, 1, 3, 2] = torch.nan
    for plan, back in zip(FORWARD.values(), GRADIENT.values(), strict=True):
        out, dq, dk, _ = run(inputs, False, None, plan, back)
        q, k, v, _ = inputs
        lse = forward_module.forward(q, k, v, torch.empty_like(q), None, 1.0, False, plan)
        assert lse.isnan().nonzero().tolist() == [[0, 1, 3]]
        assert out[0, 1, 3].isnan().all() and dq[0, 1, 3].isnan().all()
        assert dk[0, 1].isnan().all() and out[0, 0].isfinite().all() and dk[0, 0].isfinite().all()


@pytest.mark.parametrize("lengths", [None, [3, 21]])
def test_same_bits_every_time(lengths: list[int] | None) -> None:
    inputs = tensors(2, 1, 21, 16, torch.bfloat16)
    some = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    first = run(inputs, False, some, FORWARD["held"], GRADIENT["whole"])
    for _ in range(49):
        again = run(inputs, False, some, FORWARD["held"], GRADIENT["whole"])
        assert all(map(torch.equal, first, again))


def test_one_kernel_each_way() -> None:
    *parts, _ = tensors(2, 1, 50, 64, torch.float32)
    qkv = torch.stack(parts).permute(1, 3, 0, 2, 4)
    for call, inputs in ((attention, parts), (packed_attention, [qkv])):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with count_launches() as count:
            call(*leaves, backend="triton").sum().backward()
        assert count == {"forward_kernel": 1, "two_pass_kernel": 1}


@pytest.mark.parametrize("largest", [16, 32, 64, 128, 256])
def test_tiles_cover_a_sequence(largest: int) -> None:
    for length in LENGTHS:
        groups = tiles(length, largest)
        covered = [first + n * size for first, size, count in groups for n in range(count)]
        sizes = [size for _, size, count in groups for _ in range(count)]
        ends = [first + size for first, size in zip(covered, sizes, strict=True)]
        assert covered == [0, *ends[:-1]]
        assert length <= ends[-1] < length + max(16, sizes[-1] // 2)
        assert all(size & (size - 1) == 0 and 16 <= size <= largest for size in sizes)
        # only the last tile has padding
        assert all(end <= length for end in ends[:-1])
        flat = tuple(zip(covered, sizes, [1] * len(sizes), strict=True))
        assert tiles(length, largest, unrolled=True) == flat
    assert tiles(257, 64) == ((0, 64, 4), (256, 16, 1))
    assert tiles(197, 128) == ((0, 128, 1), (128, 64, 1), (192, 16, 1))


def test_rules_and_the_table_hold_plans() -> None:
    for lines in LENGTHS:
        for width in (32, 64, 72, 80, 128):
            for precision in ("16bit", "tf32", "ieee"):
                key = f"{lines}x{lines}x{width} {precision}"
                for capability in (8, 9, 10, 12):
                    name = family(capability)
                    for plan in (forward_rule(key, name), gradient_rule(key, name)):
                        assert plan.warps in (4, 8) and plan.queries >= 16 and plan.keys >= 16
    kinds: dict[str, Any] = {"forward": Plan, "gradient": GradientPlan}
    for directions in measured()["plans"].values():
        for direction, plans in directions.items():
            for key, fields in plans.items():
                assert len(key.split(" ")[0].split("x")) == 3
                kinds[direction](*fields)
    assert all(isinstance(shapes, list) for shapes in measured()["faster"].values())


@pytest.mark.slow
def test_resources() -> None:
    """No spills, shared memory within bounds, the right matrix instruction: no GPU needed."""
    code = (
        "import json; from dataclasses import asdict\n"
        "from fastclip.bench.compile_cases import attention_cases\n"
        "from fastclip.bench.compile_report import compiled\n"
        "found = [compiled(case) for n in (80, 90, 100) for case in attention_cases(n)]\n"
        "print(json.dumps([asdict(report) for report in found]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for report in reports:
        assert report["spills"] == 0, report
        assert report["shared"] <= report["shared_limit"], report
        assert report["tensor_core"] == instruction[report["architecture"]], report
    assert len(reports) == 3 * 5 * 2
    # two programs share a multiprocessor's 227 KiB
    held = [r for r in reports if r["architecture"] == 90 and r["kernel"] == "forward_kernel"]
    assert all(2 * (r["shared"] + 1024) <= 228 << 10 for r in held)
