"""Signs of trouble: hints, each noticed after a while and said once; what is not finite."""

import math

import pytest
import torch
from torch import nn

from fastclip.train.health import NOTHING, Hints, first_non_finite

GOOD = {"loss": 1.0, "logit_scale": 20.0, "data_wait": 0.1}


def said(values: dict[str, float], lines: int = 20, warmup: int = 0) -> list[str]:
    hints = Hints(chance=math.log(64), warmup=warmup)
    return [hint for step in range(1, lines + 1) for hint in hints.observe(step, values)]


def test_a_healthy_run_hears_nothing() -> None:
    assert said(GOOD) == []


def test_each_sign_once() -> None:
    cases = {
        "ln(batch) = 4.16": GOOD | {"loss": math.log(64) * 1.005},
        "cap of 100": GOOD | {"logit_scale": 100.0},
        "waiting for data": GOOD | {"data_wait": 0.7},
    }
    for text, values in cases.items():
        (hint,) = said(values)
        assert text in hint
        assert said(values, lines=4) == []


def test_not_before_the_warmup_is_over_and_not_for_a_moment() -> None:
    assert said(GOOD | {"loss": math.log(64)}, warmup=100) == []
    hints = Hints(chance=math.log(64), warmup=0)
    waits = [0.7, 0.7, 0.7, 0.7, 0.1] * 5
    assert not any(hints.observe(i, GOOD | {"data_wait": wait}) for i, wait in enumerate(waits))


def test_a_single_sample_has_nothing_to_be_distinguished_from() -> None:
    hints = Hints(chance=0.0, warmup=0)
    assert not any(hints.observe(i, GOOD | {"loss": 0.0}) for i in range(9))


def validated(*losses: float) -> list[str]:
    hints = Hints(chance=None, warmup=0)
    return [
        hint
        for epoch, loss in enumerate(losses, 1)
        for hint in hints.observe_validation(10 * epoch, {"val/loss": loss})
    ]


def test_a_validation_loss_that_rises_is_said_once() -> None:
    (hint,) = validated(3.0, 2.0, 2.5, 2.4, 2.6, 1.9, 2.5, 2.5)
    assert "rising since step 20: the model memorizes the training data" in hint


def test_a_validation_loss_may_vary() -> None:
    # once, hardly, or with a better one between
    assert validated(3.0, 2.0, 2.5) == []
    assert validated(2.0, 2.01, 2.01, 2.005) == []
    assert validated(2.0, 2.5, 1.9, 2.5) == []
    assert Hints(chance=None, warmup=0).observe_validation(1, {"zeroshot/a/acc1": 0.5}) == []


def blamed(*, where: str) -> str:
    """What is named first where the input, a weight or a module's output is not finite."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    given = {"images": torch.ones(2, 3), "labels": torch.ones(2, dtype=torch.int64)}
    if where == "input":
        given["images"][1, 2] = torch.nan
    if where in ("input", "parameter"):
        # the output, too, is not finite then
        nn.init.constant_(model[2].weight, torch.inf)
    if where == "output":
        model[1].register_forward_hook(lambda module, inputs, output: output / 0)
    if where == "gradient":
        model(given["images"]).sum().backward()
        model[0].bias.grad[1] = torch.inf
    return first_non_finite(model, given, lambda: model(given["images"]))


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("input", "input 'images'"),
        ("parameter", "parameter '2.weight'"),
        ("output", "output of '1'"),
        ("gradient", "gradient of '0.bias'"),
        ("nowhere", NOTHING),
    ],
)
def test_the_first_that_is_not_finite_is_named(where: str, name: str) -> None:
    assert blamed(where=where) == name
