"""All losses behind one face, and the error rule: what the tests of the engine iterate over."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import functional
from tests.ops import oracles


@dataclass
class Case:
    """Inputs of one loss: float64 leaves (features first, then scalars), and what is not a leaf."""

    leaves: list[Tensor]
    features: int
    static: dict[str, Any] = field(default_factory=dict)
    is_temperature: bool = False

    def cast(self, dtype: torch.dtype) -> "Case":
        """Features rounded to `dtype`; scalars in it or, for 16 bits, in float32."""
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [
            leaf.to(dtype if index < self.features else wide)
            for index, leaf in enumerate(self.leaves)
        ]
        return replace(self, leaves=leaves, static=self._with_bank(dtype))

    def largest_logit(self) -> float:
        """A bound of |S|: the scale, or the inverse of a temperature."""
        value = self.leaves[self.features].double().abs().max().item()
        return 1 / value if self.is_temperature else value

    def double(self) -> "Case":
        """The same values in float64."""
        leaves = [leaf.double() for leaf in self.leaves]
        return replace(self, leaves=leaves, static=self._with_bank(torch.float64))

    def _with_bank(self, dtype: torch.dtype) -> dict[str, Any]:
        bank = self.static.get("bank")
        return self.static if bank is None else {**self.static, "bank": bank.to(dtype)}


@dataclass(frozen=True)
class Loss:
    """How to make inputs, run the package's loss, and say what it should be."""

    make: Callable[..., Case]
    run: Callable[..., Tensor]
    oracle: Callable[..., Tensor]

    def scalar_terms(self, case: Case, index: int) -> float:
        """Sum of |terms| of a scalar's gradient: cosines are at most 1, and a row's probabilities
        sum to at most 2, positives included; sigmoids reach 1 each, and |ds/dt| is 1 / t^2."""
        if self.oracle is oracles.siglip:
            return float(len(case.leaves[0]))
        if case.is_temperature:
            return 2 * case.largest_logit() ** 2
        return 2.0


def unit(rows: int, width: int, seed: int) -> Tensor:
    """Random unit vectors in float64."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=-1)


def views(count: int, rows: int, width: int, seed: int, correlation: float) -> list[Tensor]:
    """Blocks whose rows have about the given cosine with the first block's."""
    first = unit(rows, width, seed)
    away = (1 - correlation**2) ** 0.5
    others = [
        F.normalize(correlation * first + away * unit(rows, width, seed + i), dim=-1)
        for i in range(1, count)
    ]
    return [first, *others]


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _pairs(
    static: Callable[[int, int, int], dict] = lambda n, m, width: {}, bias: bool = False
) -> Callable:
    def make(n: int, width: int, scale: float, correlation: float, seed: int, extra: int = 0):
        x, y = views(2, n, width, seed, correlation)
        if extra and not bias:
            y = torch.cat([y, unit(extra, width, seed + 50)])
        scalars = [_scalar(scale), *([_scalar(-0.7 * scale)] if bias else [])]
        return Case([x, y, *scalars], 2, static(n, len(y), width))

    return make


def _blocks(domains: list[int]) -> Callable:
    def make(n: int, width: int, scale: float, correlation: float, seed: int, extra: int = 0):
        # n is the number of rows of all blocks
        count = len(domains)
        rows = max(n // count, 1)
        generator = torch.Generator().manual_seed(seed)
        spread = torch.rand(2, 2, 2, dtype=torch.float64, generator=generator)
        tables = [scale * (0.75 + 0.25 * spread[0]), 0.1 * scale * (spread[1] - 0.5)]
        static = {"domains": domains, "pair_weight": torch.tensor([[0.5, 1.5], [0.0, 1.0]])}
        return Case([*views(count, rows, width, seed, correlation), *tables], count, static)

    return make


def _two_views(n: int, width: int, scale: float, correlation: float, seed: int, extra: int = 0):
    return Case(
        [*views(2, max(n // 2, 1), width, seed, correlation), _scalar(1 / scale)], 2, {}, True
    )


def _labeled(n: int, width: int, scale: float, correlation: float, seed: int, extra: int = 0):
    labels = torch.randint(-3, max(n // 3, 1), (n,), generator=torch.Generator().manual_seed(seed))
    centers = unit(n // 3 + 4, width, seed)[labels + 3]
    away = (1 - correlation**2) ** 0.5
    z = F.normalize(correlation**0.5 * centers + away * unit(n, width, seed + 1), dim=-1)
    return Case([z, _scalar(1 / scale)], 1, {"labels": labels}, True)


def _indexed(n: int, m: int, width: int) -> dict:
    generator = torch.Generator().manual_seed(n)
    return {"positive_index": torch.randint(0, m, (n,), generator=generator)}


def _grouped(n: int, m: int, width: int) -> dict:
    generator = torch.Generator().manual_seed(n)
    group = torch.randint(0, n, (m,), generator=generator)
    return {"row_group": group[:n].to(torch.int32), "column_group": group.to(torch.int32)}


def _banked(n: int, m: int, width: int) -> dict:
    return {"bank": unit(n + 3, width, 77), "in_batch": False}


def _run(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(leaves: list[Tensor], static: dict, **options: Any) -> Tensor:
        return function(*leaves, **static, **options)

    return run


def _run_blocks(leaves: list[Tensor], static: dict, **options: Any) -> Tensor:
    *blocks, scale, offset = leaves
    static = dict(static)
    domains = static.pop("domains")
    return functional.mp_nce_loss(blocks, domains, scale, offset, **static, **options)


def _run_labeled(leaves: list[Tensor], static: dict, **options: Any) -> Tensor:
    z, temperature = leaves
    return functional.sup_con_loss(z, static["labels"], temperature, **options)


LOSSES: dict[str, Loss] = {
    "clip": Loss(_pairs(), _run(functional.clip_loss), oracles.clip),
    "clip_smoothed": Loss(
        _pairs(lambda n, m, width: {"label_smoothing": 0.1}),
        _run(functional.clip_loss),
        oracles.clip,
    ),
    "clip_smoothed_grouped": Loss(
        _pairs(lambda n, m, width: {"label_smoothing": 0.1, **_grouped(n, m, width)}),
        _run(functional.clip_loss),
        oracles.clip,
    ),
    "clip_grouped": Loss(_pairs(_grouped), _run(functional.clip_loss), oracles.clip),
    "siglip": Loss(_pairs(bias=True), _run(functional.siglip_loss), oracles.siglip),
    "info_nce": Loss(_pairs(), _run(functional.info_nce_loss), oracles.info_nce),
    "info_nce_index": Loss(_pairs(_indexed), _run(functional.info_nce_loss), oracles.info_nce),
    "info_nce_bank": Loss(_pairs(_banked), _run(functional.info_nce_loss), oracles.info_nce),
    "nt_xent": Loss(_two_views, _run(functional.nt_xent_loss), oracles.nt_xent),
    "mp_nce": Loss(_blocks([0, 0, 1]), _run_blocks, oracles.mp_nce),
    "sup_con": Loss(_labeled, _run_labeled, oracles.sup_con),
}


def ours(
    name: str, case: Case, *, autocast: bool = False, per_anchor: bool = False, **options: Any
) -> list[Tensor]:
    """Mean loss and all gradients of the package; `per_anchor` takes the mean of single losses."""
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if per_anchor:
            losses = LOSSES[name].run(leaves, case.static, reduction="none", **options)
            loss = losses.sum() / divisor(name, case)
        else:
            loss = LOSSES[name].run(leaves, case.static, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def theirs(name: str, case: Case, *, autocast: bool = False) -> list[Tensor]:
    """Mean loss and all gradients of the definition, in the case's own dtype."""
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        per_anchor = LOSSES[name].oracle(*leaves, static=case.static)
        loss = per_anchor.sum() / divisor(name, case)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def divisor(name: str, case: Case) -> int:
    """What the mean divides by."""
    if name == "sup_con":
        labels = case.static["labels"]
        has_positive = ((labels[:, None] == labels).sum(1) > 1).sum()
        return max(int(has_positive), 1)
    rows = len(case.leaves[0])
    return rows * case.features if name in ("nt_xent", "mp_nce") else rows


def check_error_rule(
    name: str,
    got: list[Tensor],
    eager: list[Tensor],
    truth: list[Tensor],
    case: Case,
    eps: float,
    context: object,
) -> None:
    """Error at most twice that of eager code in the same precision, plus eight roundings.

    The second part is in units of the precision in which the operands are held: without it an
    exact zero of the other side, or a lucky cancellation in its sums, would fail right code. The
    size of a scalar is the sum of its terms' sizes: log-sum-exps and logits for the loss, products
    of probabilities and cosines for the gradients. A logit S is held in float32 at best, and
    exp(S) has that error times S: eager code has it too, but not always of the same size.
    """
    units = 8 * eps + 2 * case.largest_logit() * torch.finfo(torch.float32).eps
    for index, (mine, other, want) in enumerate(zip(got, eager, truth, strict=True)):
        size = want.abs().max().item()
        if index == 0:
            size = max(size, 2 * case.largest_logit())
        elif index <= case.features and (name == "sup_con" or "smoothed" in name):
            # differences of means, which may cancel to nothing
            size = max(size, case.largest_logit() / divisor(name, case))
        elif index > case.features:
            size = max(size, LOSSES[name].scalar_terms(case, index - 1))
        error = (mine.double() - want).abs().max()
        # where eager code overflows, the roundings alone
        eager_error = (other.double() - want).abs().max().nan_to_num(0.0, posinf=0.0)
        bound = 2 * eager_error + units * size
        assert error <= bound, (
            f"{name} {context}: output {index} is off by {error:.2e} > {bound:.2e}"
        )


def check_lines_far_apart(name: str, backend: str) -> None:
    """Features of many lengths: the lines' log-sum-exps span more than one anchor can serve."""
    inputs = LOSSES[name].make(150, 8, 40.0, 0.3, seed=4)
    for leaf in inputs.leaves[: inputs.features]:
        leaf.mul_(torch.linspace(0.01, 3.0, len(leaf), dtype=torch.float64)[:, None])
    inputs = inputs.cast(torch.float32)
    # the rule's bounds are for unit features: cosines are up to 9 here
    want, eager = theirs(name, inputs.double()), theirs(name, inputs)
    for got, other, truth in zip(ours(name, inputs, backend=backend), eager, want, strict=True):
        bound = 2 * (other.double() - truth).abs().max() + 1e-4 * truth.abs().max()
        assert (got.double() - truth).abs().max() <= bound


def check_nan_shows(name: str, case: Case, **options: Any) -> None:
    """One NaN among the features is in the loss and in their gradient."""
    case.leaves[0][2, 1] = torch.nan
    got = ours(name, case, **options)
    assert torch.isnan(got[0])
    assert torch.isnan(got[1]).any()


def check_ties_and_zero_rows(name: str, make: Callable[[], Case], backend: str) -> None:
    """Rows that are all the same, and rows of zeros, against the definition in float64."""
    for spoil in ("ties", "zeros"):
        case = make()
        for leaf in case.leaves[: case.features]:
            leaf[:] = leaf[0].clone() if spoil == "ties" else 0.0
        got, truth = ours(name, case, backend=backend), theirs(name, case.double())
        for mine, want in zip(got, truth, strict=True):
            size = case.largest_logit() ** 2 if case.is_temperature else 1.0
            torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-5 * size)


def check_same_bits(name: str, case: Case, repeats: int, **options: Any) -> None:
    """Loss and gradients are the same each time."""
    first = ours(name, case, **options)
    for _ in range(repeats):
        again = ours(name, case, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def pairwise(factors: dict[str, list], seed: int) -> Iterator[dict[str, Any]]:
    """Few combinations in which every two values of different factors meet at least once."""
    rng = random.Random(seed)
    names = list(factors)
    missing = {
        ((a, u), (b, v))
        for a, b in combinations(names, 2)
        for u, v in product(factors[a], factors[b])
    }
    while missing:
        best: dict[str, Any] = {}
        covered: set = set()
        for _ in range(30):
            forced = dict(rng.choice(sorted(missing, key=repr)))
            row = {name: forced.get(name, rng.choice(factors[name])) for name in names}
            met = {((a, row[a]), (b, row[b])) for a, b in combinations(names, 2)} & missing
            if len(met) > len(covered):
                best, covered = row, met
        missing -= covered
        yield best


def check_kept_graph(name: str, case: Case) -> None:
    """A graph gives the same gradients again; only the last backward overwrites S."""
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    loss = LOSSES[name].run(leaves, case.static) * -3.0
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    with_graph = torch.autograd.grad(loss, leaves, create_graph=True)
    last = torch.autograd.grad(loss, leaves)
    for one, two, three in zip(first, with_graph, last, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        with_graph[0].sum().backward()


def check_each_input_alone(name: str, reduction: str) -> int:
    """Whatever else is frozen, and whatever the upstream gradients; the number of inputs."""
    case = LOSSES[name].make(9, 5, 6.0, 0.3, seed=1, extra=2)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    oracle = LOSSES[name].oracle(*leaves, static=case.static)
    wanted = theirs(name, case)[1:]
    if reduction == "sum":
        wanted = list(torch.autograd.grad(oracle.sum(), leaves, retain_graph=True))
    weights = torch.arange(1.0, 1.0 + len(oracle))
    if reduction == "none":
        wanted = list(torch.autograd.grad((oracle * weights).sum(), leaves))
    case = case.cast(torch.float32)
    for index, want in enumerate(wanted):
        alone = [leaf.clone() for leaf in case.leaves]
        alone[index].requires_grad_()
        loss = LOSSES[name].run(alone, case.static, reduction=reduction)
        loss = (loss * weights).sum() if reduction == "none" else loss
        (got,) = torch.autograd.grad(loss, alone[index])
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    return len(wanted)


def check_metrics(name: str) -> None:
    """They are those of the operators in `torch`."""
    case = LOSSES[name].make(90, 4, 3.0, 0.9, seed=1).cast(torch.float32)
    found: list[dict[str, Tensor]] = [{}, {}]
    LOSSES[name].run(case.leaves, case.static, metrics=found[0])
    LOSSES[name].run(case.leaves, case.static, metrics=found[1], backend="torch")
    assert found[0].keys() == found[1].keys() and found[0]
    for key, value in found[0].items():
        assert 0 < value < 1
        torch.testing.assert_close(value, found[1][key])
