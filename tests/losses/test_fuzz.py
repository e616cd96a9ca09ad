"""Random calls of every loss against the definitions in float64: no gross error.

60 among the other tests, 5,000 with -m fuzz; FASTCLIP_FUZZ_FIRST begins at another. A case is its
number: `check(number)` repeats one.
"""

import os
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip import functional, native
from fastclip.kernels.launch import INTERPRETED
from tests.ops import oracles

FIRST = int(os.environ.get("FASTCLIP_FUZZ_FIRST", "0"))
LOW = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = {
    "torch": [torch.float64, *LOW],
    "reference": [torch.float64, *LOW],
    **({} if native.unavailable_reason() else {"cpp": LOW}),
    **({"triton": LOW} if INTERPRETED else {}),
}


@dataclass
class Draw:
    """One call: blocks of features and scalars are differentiated, `static` is not."""

    loss: str
    blocks: list[Tensor]
    scalars: list[Tensor]
    static: dict[str, Any]
    options: dict[str, Any]
    autocast: bool = False
    anchors: int = 0
    weights: Tensor | None = None
    about: dict[str, Any] = field(default_factory=dict)


class _Source:
    """Random numbers of one case."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def power(self, low: float, high: float) -> float:
        return 10 ** self.random.uniform(low, high)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        dtype = self.pick(torch.int32, torch.int64)
        return torch.randint(0, max(high, 1), shape, generator=self.generator).to(dtype) - 2

    def blocks(self, rows: list[int], width: int) -> list[Tensor]:
        """Blocks that look alike to some degree, their rows of one length or of many."""
        common, alike = self.normal(max(rows), width), self.pick(0.0, 0.4, 0.95, 1.0)
        kind = self.pick("unit", "unit", "unit", "short", "long", "mixed", "zeros")
        found = []
        for count in rows:
            z = alike * common[:count] + (1 - alike**2) ** 0.5 * self.normal(count, width)
            z = torch.nn.functional.normalize(z, dim=1)
            if kind in ("short", "long"):
                z = z * (self.power(-4, -1) if kind == "short" else self.power(0, 1))
            elif kind == "mixed":
                z = z * 10 ** (self.normal(count, 1) / 2).clamp(-2, 1)
            elif kind == "zeros":
                z[self.random.randrange(count)] = 0
            found.append(z)
        return found


def draw(number: int) -> Draw:
    """The case of this number."""
    source = _Source(number)
    loss = source.pick("clip", "siglip", "info_nce", "mp_nce", "nt_xent", "sup_con")
    backend = source.pick(*[b for b in DTYPES if b != "triton"], *DTYPES)
    dtype = source.pick(*DTYPES[backend])
    n = source.pick(1, 2, 3, source.random.randint(4, 24), source.random.randint(4, 70))
    width = source.pick(1, 3, 8, source.random.randint(1, 40))
    if backend == "triton":
        n, width = min(n, 40), min(width, 24)
    scale_dtype = source.pick(torch.float32, dtype, torch.bfloat16, torch.float16, torch.float64)
    scale = source.pick(source.power(-3, 2.5), 14.3, 100.0)
    static: dict[str, Any] = {}
    rows, scalars = _arguments(source, loss, n, scale, static)
    blocks = [b.to(dtype) for b in source.blocks(rows, width)]
    if "bank" in static:
        (static["bank"],) = source.blocks([static["bank"]], width)
        static["bank"] = static["bank"].to(dtype)
    if len(scalars) == 1 and source.chance(0.3):
        scalars = [s.reshape(1) for s in scalars]
    reduction = source.pick("mean", "mean", "sum", "none")
    anchors = n * len(blocks) if loss in ("mp_nce", "nt_xent") else n
    chunk = source.pick(None, None, source.random.randint(1, 4 * n * max(rows)))
    keep = source.pick(None, 0)
    return Draw(
        loss,
        blocks,
        [s.to(scale_dtype) for s in scalars],
        static,
        {"reduction": reduction, "backend": backend, "chunk_bytes": chunk, "keep_bytes": keep},
        dtype != torch.float64 and source.chance(0.15),
        anchors,
        source.normal(anchors) if reduction == "none" else None,
    )


def _arguments(
    source: _Source, loss: str, n: int, scale: float, static: dict[str, Any]
) -> tuple[list[int], list[Tensor]]:
    """Rows of the blocks, and the scalars; fills `static`."""

    def scalar(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64)

    more = n + source.pick(0, 0, 1, source.random.randint(0, 40))
    signed = scalar(scale * source.pick(1, 1, 1, 1, -1, 0))
    if loss == "clip":
        static["label_smoothing"] = source.pick(0.0, 0.0, 0.1, source.random.random())
        if source.chance(0.5):
            ids = source.integers(source.pick(1, n // 2, 2 * n), more)
            static["column_group"] = ids
            alike = source.chance(0.7)
            static["row_group"] = ids[:n].clone() if alike else source.integers(n, n)
        return [n, more], [signed]
    if loss == "siglip":
        return [n, n], [signed, scalar(source.pick(-10.0, 3 * source.random.random(), -scale))]
    if loss == "info_nce":
        if source.chance(0.4):
            more = source.random.randint(1, n + 9)
            static["positive_index"] = source.integers(more, n).add(2)
        if source.chance(0.3):
            static["bank"] = source.random.randint(1, 30)
            static["in_batch"] = source.chance(0.5)
        return [n, more], [signed]
    if loss == "mp_nce":
        domains = source.pick([0, 0], [0, 1], [0, 0, 1], [1, 0, 1, 2])
        static["domains"] = domains
        spread = source.normal(2, 3, 3)
        if source.chance(0.5):
            static["pair_weight"] = spread[0].abs()
        offset = source.pick(0.0, scale / 4) * spread[1]
        return [n] * len(domains), [scale * (1 + spread[0] / 8), offset]
    if loss == "sup_con":
        static["labels"] = source.integers(source.pick(1, 2, n // 2, 3 * n), n)
        return [n], [scalar(1 / scale)]
    return [n, n], [scalar(1 / scale)]


def _definition(case: Draw, blocks: list[Tensor], scalars: list[Tensor]) -> Tensor:
    static = {
        key: value.to(blocks[0].dtype) if key in ("bank", "pair_weight") else value
        for key, value in case.static.items()
    }
    scalars = [s if s.ndim == 2 else s.reshape(()) for s in scalars]
    return getattr(oracles, case.loss)(*blocks, *scalars, static=static)


def _run(case: Draw, blocks: list[Tensor], scalars: list[Tensor]) -> Tensor:
    function, static = getattr(functional, f"{case.loss}_loss"), dict(case.static)
    options = case.options
    if case.loss == "mp_nce":
        return function(blocks, static.pop("domains"), *scalars, **static, **options)
    if case.loss == "sup_con":
        return function(*blocks, static["labels"], *scalars, **options)
    return function(*blocks, *scalars, **static, **options)


def _divisor(case: Draw) -> int:
    if case.loss == "sup_con":
        labels = case.static["labels"]
        return max(int(((labels[:, None] == labels).sum(1) > 1).sum()), 1)
    return case.anchors


def _reduced(case: Draw, per_anchor: Tensor) -> Tensor:
    reduction = case.options["reduction"]
    if reduction == "none":
        assert case.weights is not None
        return (per_anchor * case.weights.to(per_anchor.dtype)).sum()
    return per_anchor.sum() / (_divisor(case) if reduction == "mean" else 1)


def _with_gradients(loss: Any, blocks: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (*blocks, *scalars)]
    value = loss(leaves[: len(blocks)], leaves[len(blocks) :])
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _sizes(case: Draw, blocks: list[Tensor], scalars: list[Tensor]) -> tuple[float, list[float]]:
    """The largest |S|, and the sizes of the terms that each output adds up, from their bounds."""
    longest = max(b.norm(dim=1).max().item() for b in blocks)
    if "bank" in case.static:
        longest = max(longest, case.static["bank"].double().norm(dim=1).max().item())
    scale = scalars[0].abs().max().item()
    scale = 1 / scale if case.loss in ("nt_xent", "sup_con") else scale
    cosine = longest**2
    logit = scale * cosine + (scalars[1].abs().max().item() if len(scalars) > 1 else 0.0)
    # an anchor's probabilities add up to one a side; sigmoids reach one each
    each = len(blocks[0]) if case.loss == "siglip" else 1.0
    if "pair_weight" in case.static:
        each *= max(case.static["pair_weight"].max().item(), 1.0)
    mass = 1.0 if case.options["reduction"] == "mean" else float(_divisor(case))
    if case.weights is not None:
        mass *= case.weights.abs().max().item()
    of_scale = cosine * (scale**2 if case.loss in ("nt_xent", "sup_con") else 1.0)
    # a key's gradient is of all its queries
    of_row = scale * longest * each * (mass if case.loss != "siglip" else 1.0)
    sizes = [mass * each * (2 * logit + 8), *[2 * of_row] * len(blocks)]
    return logit, [*sizes, *[2 * mass * each * s for s in (of_scale, 1.0)][: len(scalars)]]


def _least_scale(dtype: torch.dtype) -> float:
    """A scale of 0 is computed as one this small, so that its own gradient can be found."""
    return torch.finfo(dtype).tiny ** 0.25


def check(number: int) -> str | None:
    """What is wrong with a case, or None."""
    case = draw(number)
    dtype = case.blocks[0].dtype
    low = torch.bfloat16 if case.autocast else dtype
    double = [b.to(low).double() for b in case.blocks]
    scalars = [s.double() for s in case.scalars]
    truth = _with_gradients(lambda *a: _reduced(case, _definition(case, *a)), double, scalars)

    def ours(blocks: list[Tensor], scalars: list[Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            loss = _run(case, blocks, scalars)
        if case.weights is not None:
            loss = (loss * case.weights.to(loss.dtype)).sum()
        return loss

    got = _with_gradients(ours, case.blocks, case.scalars)
    logit, sizes = _sizes(case, double, scalars)
    wide = torch.promote_types(low, torch.float32)
    eps, exponent = torch.finfo(low).eps, torch.finfo(wide).eps
    # exp(S) has the error of S times S; a sum of products that of its length
    units = 8 * eps + (4 * logit + 64) * exponent
    for index, (mine, want, size) in enumerate(zip(got, truth, sizes, strict=True)):
        kind = torch.finfo(mine.dtype)
        # beyond what the output's dtype holds there is nothing to compare
        held = want.abs() < kind.max / 4
        error = torch.where(held, (mine.double() - want).abs(), 0.0)
        # below, its last digit: float16's smallest number is 6e-8
        bound = units * size + 2 * kind.eps * want.abs() + kind.smallest_normal * kind.eps
        if index > 0:
            bound = bound + _least_scale(wide) * sizes[0] * max(b.abs().max() for b in double)
        # 16-bit operands and their gradients' flush to zero
        bound = bound + (2 * torch.finfo(low).smallest_normal * size if low != wide else 0.0)
        if not (error <= bound).all():
            worst = (error - bound).nan_to_num(torch.inf).argmax()
            return (
                f"{number}: output {index} is {mine.flatten()[worst]:.6g}, wanted "
                f"{want.flatten()[worst]:.6g} within {bound.flatten()[worst]:.2g}; {case.loss} "
                f"{[tuple(b.shape) for b in case.blocks]} {low} {[s.dtype for s in case.scalars]} "
                f"logit {logit:.3g} {case.options} {sorted(case.static)}"
            )
    return None


@pytest.mark.parametrize("cases", [60, pytest.param(5000, marks=pytest.mark.fuzz)])
def test_random_cases(cases: int) -> None:
    wrong = [found for number in range(FIRST, FIRST + cases) if (found := check(number))]
    assert not wrong, f"{len(wrong)} of {cases}:\n" + "\n".join(wrong[:40])
