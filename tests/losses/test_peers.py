"""Values that other libraries' tests ask of the losses that fastclip replaces, asked of both.

Each case: the library in float64 is the definition; ours in float32 keeps the error rule, beside
the library in float32. Features of all lengths, as the libraries take them.
"""

import importlib
import math
from collections.abc import Callable
from types import ModuleType

import lightly.loss as lightly
import pytest
import pytorch_metric_learning.losses as pml
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip
from fastclip.functional import clip_loss, info_nce_loss, mp_nce_loss
from tests.ops import oracles
from tests.ops.cases import Case, check_error_rule, views

TEMPERATURES = [0.05, 0.1, 1.0, 10.0]
EPS = torch.finfo(torch.float32).eps


def _raw(count: int, rows: int, width: int, seed: int) -> list[Tensor]:
    """Blocks of rows of many lengths, representable in float32."""
    generator = torch.Generator().manual_seed(seed)
    blocks = views(count, rows, width, seed, 0.4)
    lengths = [10 ** (2 * torch.rand(rows, 1, generator=generator) - 1) for _ in blocks]
    return [(b * r).float().double() for b, r in zip(blocks, lengths, strict=True)]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _unit(*blocks: Tensor) -> list[Tensor]:
    return [F.normalize(block, dim=-1) for block in blocks]


def _with_gradients(loss: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _check(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    inputs: list[Tensor],
    scale: float,
) -> None:
    """All three take the inputs' blocks and return a 0-d loss."""
    truth = _with_gradients(definition, inputs)
    for got, want in zip(_with_gradients(theirs, inputs), truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    narrow = [t.float() for t in inputs]
    case = Case([*narrow, torch.tensor(scale)], len(narrow))
    eager = _with_gradients(theirs, narrow)
    check_error_rule(
        "peers", _with_gradients(ours, narrow), eager, truth, case, EPS, (len(inputs[0]), scale)
    )


# lightly


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("rows, width", [(1, 4), (2, 2), (3, 3), (7, 10), (20, 17)])
def test_nt_xent_is_lightlys(rows: int, width: int, temperature: float) -> None:
    def definition(x: Tensor, y: Tensor) -> Tensor:
        return oracles.nt_xent(*_unit(x, y), scalar(temperature), {}).mean()

    inputs = _raw(2, rows, width, seed=rows)
    ours, theirs = fastclip.NTXentLoss(temperature), lightly.NTXentLoss(temperature)
    _check(ours, theirs, definition, inputs, 1 / temperature)
    torch.testing.assert_close(ours(*inputs), ours(*inputs[::-1]))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_nt_xent_of_views_that_agree(temperature: float) -> None:
    """Rows at right angles, each view its twin: log(1 + (2N - 2) e^(-1/T))."""
    rows = torch.eye(9, 12).double()
    want = math.log1p(16 * math.exp(-1 / temperature))
    for loss in (fastclip.NTXentLoss(temperature), lightly.NTXentLoss(temperature)):
        assert loss(rows, 5 * rows).item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_nt_xent_with_a_bank_is_lightlys(temperature: float) -> None:
    """Three steps, whose queries meet the bank of the step before; then a call without gradient."""
    bank = F.normalize(torch.randn(24, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    pair = [
        module.NTXentLoss(temperature, memory_bank_size=(24, 6)) for module in (fastclip, lightly)
    ]
    for loss in pair:
        loss.memory_bank.bank.copy_(bank)
    for step in range(3):
        inputs = _raw(2, 7, 6, seed=step)
        static = {"bank": bank.double(), "in_batch": False}

        def definition(x: Tensor, y: Tensor, static: dict = static) -> Tensor:
            scale = scalar(1 / temperature)
            return oracles.info_nce(*_unit(x, y), scale, static).mean()

        narrow = [t.float() for t in inputs]
        got, eager = (_with_gradients(loss, narrow) for loss in pair)
        case = Case([*narrow, torch.tensor(1 / temperature)], 2)
        truth = _with_gradients(definition, inputs)
        check_error_rule("peers", got, eager, truth, case, EPS, (step, temperature))
        bank[7 * step : 7 * step + 7] = F.normalize(narrow[1], dim=1)
        for loss in pair:
            torch.testing.assert_close(loss.memory_bank.bank, bank)
    for loss in pair:
        loss(*narrow)
        torch.testing.assert_close(loss.memory_bank.bank, bank)


# pytorch-metric-learning


def _angles() -> Tensor:
    """Five embeddings in the plane, 20 degrees apart, of labels 0, 0, 1, 1 and 2."""
    turn = torch.deg2rad(torch.arange(0, 100, 20).double())
    return torch.stack((turn.cos(), turn.sin()), dim=1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sup_con_of_five_angles_by_hand(temperature: float) -> None:
    """An anchor without a positive does not count."""
    z, labels = _angles(), torch.tensor([0, 0, 1, 1, 2])

    def definition(z: Tensor) -> Tensor:
        terms = []
        for i, j in ((0, 1), (1, 0), (2, 3), (3, 2)):
            s = [torch.dot(F.normalize(z[i], dim=0), F.normalize(z[k], dim=0)) for k in range(5)]
            others = torch.stack([s[k] for k in range(5) if k != i]) / temperature
            terms.append(torch.logsumexp(others, 0) - s[j] / temperature)
        return torch.stack(terms).mean()

    ours = fastclip.SupConLoss(temperature)
    theirs = pml.SupConLoss(temperature)
    _check(
        lambda z: ours(F.normalize(z, dim=1), labels),
        lambda z: theirs(z, labels),
        definition,
        [3 * z],
        1 / temperature,
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("classes", [2, 5, 13])
def test_sup_con_of_many_labels(classes: int, temperature: float) -> None:
    (z,) = _raw(1, 41, 9, seed=classes)
    labels = (torch.arange(41) * 7) % classes
    static = {"labels": labels}

    def definition(z: Tensor) -> Tensor:
        T = scalar(temperature)
        return oracles.sup_con(F.normalize(z, dim=1), T, static).mean()

    ours, theirs = fastclip.SupConLoss(temperature), pml.SupConLoss(temperature)
    _check(
        lambda z: ours(F.normalize(z, dim=1), labels),
        lambda z: theirs(z, labels),
        definition,
        [z],
        1 / temperature,
    )


@pytest.mark.parametrize("module", [fastclip, pml])
def test_labels_without_a_pair_have_no_loss(module: ModuleType) -> None:
    z = _angles().requires_grad_()
    loss = module.SupConLoss(0.1)(z, torch.arange(5))
    loss.backward()
    assert loss.item() == 0 and torch.count_nonzero(z.grad) == 0


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_metric_learnings_nt_xent_of_views_is_mp_nce(count: int, temperature: float) -> None:
    """A mean over pairs, in which an anchor's other positives stay out of the denominator."""
    inputs = _raw(count, 6, 5, seed=count)
    labels = torch.arange(6).repeat(count)
    static = {"domains": [0] * count}
    table = scalar(1 / temperature).reshape(1, 1)
    theirs = pml.NTXentLoss(temperature)

    def definition(*blocks: Tensor) -> Tensor:
        nothing = torch.zeros_like(table)
        return oracles.mp_nce(*_unit(*blocks), table, nothing, static=static).mean()

    _check(
        lambda *blocks: mp_nce_loss(_unit(*blocks), [0] * count, 1 / temperature),
        lambda *blocks: theirs(torch.cat(blocks), labels),
        definition,
        inputs,
        1 / temperature,
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_metric_learnings_self_supervised_losses(temperature: float) -> None:
    """Two views: symmetric it is NT-Xent, else each query among the other view's rows."""
    inputs = _raw(2, 11, 6, seed=3)
    scale = scalar(1 / temperature)
    for symmetric in (True, False):
        theirs = pml.SelfSupervisedLoss(pml.NTXentLoss(temperature), symmetric=symmetric)

        def definition(x: Tensor, y: Tensor, symmetric: bool = symmetric) -> Tensor:
            x, y = _unit(x, y)
            if symmetric:
                return oracles.nt_xent(x, y, 1 / scale, {}).mean()
            return oracles.info_nce(x, y, scale, {}).mean()

        def ours(x: Tensor, y: Tensor, symmetric: bool = symmetric) -> Tensor:
            if symmetric:
                return fastclip.NTXentLoss(temperature)(x, y)
            return fastclip.InfoNCELoss(temperature)(*_unit(x, y))

        _check(ours, theirs, definition, inputs, 1 / temperature)


# sentence-transformers


@pytest.fixture(scope="module")
def ranking() -> ModuleType:
    reason = "sentence-transformers is not installed: its ranking losses are not compared"
    pytest.importorskip("sentence_transformers", minversion="6.2", reason=reason)
    return importlib.import_module("sentence_transformers.losses")


def _of_embeddings(loss: torch.nn.Module) -> Callable[..., Tensor]:
    """The loss of embeddings, one block a column: what its forward does behind the model."""

    def run(*blocks: Tensor) -> Tensor:
        if hasattr(loss, "calculate_loss"):
            return loss.calculate_loss([list(block.split(3)) for block in blocks])
        return loss.compute_loss_from_embeddings(list(blocks), torch.zeros(0))

    return run


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("negatives", [0, 1, 2])
@pytest.mark.parametrize("cached", ["", "Cached"])
def test_multiple_negatives_ranking(
    ranking: ModuleType, cached: str, negatives: int, scale: float
) -> None:
    """Anchors among all positives and negatives; symmetric: positives among the anchors, too."""
    inputs = _raw(2 + negatives, 8, 6, seed=negatives)
    model = torch.nn.Sequential(torch.nn.Identity())

    def documents(blocks: tuple[Tensor, ...]) -> list[Tensor]:
        anchors, *columns = _unit(*blocks)
        return [anchors, torch.cat(columns)]

    for kind, oracle, ours in (
        ("Ranking", oracles.info_nce, info_nce_loss),
        ("SymmetricRanking", oracles.clip, clip_loss),
    ):
        theirs = getattr(ranking, f"{cached}MultipleNegatives{kind}Loss")(model, scale=scale)
        number = scalar(scale)
        _check(
            lambda *blocks, ours=ours: ours(*documents(blocks), scale),
            _of_embeddings(theirs),
            lambda *blocks, oracle=oracle, number=number: oracle(
                *documents(blocks), number, {}
            ).mean(),
            inputs,
            scale,
        )
