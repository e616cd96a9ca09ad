"""Hints: each sign is noticed after a while, and said once."""

import math

from fastclip.train.health import Hints

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
