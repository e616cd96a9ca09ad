"""The schedule and the optimizer's groups."""

import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastclip.train.optim import (
    LOGIT_SCALE_MAX,
    build_optimizer,
    clamp,
    configured,
    gradient_norm,
    learning_rate,
)
from fastclip.train.options import OptimOptions


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_norm_of_all_gradients(threads: int) -> None:
    """Of many tensors, an empty one, channels innermost, strides; the same bits by any threads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (1,), (0, 3), (17,), (300, 700), (1024,), (1025,)] + [(5, 3)] * 100
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    images = torch.randn(8, 3, 4, 4, generator=generator)
    gradients.append(images.to(memory_format=torch.channels_last))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [gradient_norm(gradients) for _ in range(3)]
        # not one after the other in memory
        beside = gradient_norm([*gradients, torch.ones(4, 4)[:, ::2]])
        wide = gradient_norm([torch.ones(2, dtype=torch.float64)])
    finally:
        torch.set_num_threads(before)
    wanted = math.sqrt(sum(g.double().pow(2).sum().item() for g in gradients))
    assert found[0].dtype == torch.float32 and found[0].ndim == 0
    assert found[0].item() == pytest.approx(wanted, rel=1e-6)
    assert found[0] == found[1] == found[2]
    # torch's own, summed in float32
    assert beside.item() == pytest.approx(math.sqrt(wanted**2 + 8), rel=1e-5)
    assert wide.dtype == torch.float64 and wide.item() == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38])
def test_a_norm_that_is_not_finite(value: float) -> None:
    gradients = [torch.ones(2000), torch.ones(3)]
    gradients[0][1999] = value
    assert not gradient_norm(gradients).isfinite()


def test_the_norm_of_nothing() -> None:
    assert gradient_norm([]) == 0


def test_schedule_by_hand() -> None:
    options = OptimOptions(lr=1.0, warmup=4)
    rates = [learning_rate(options, step, 12) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[8] == pytest.approx(0.5) and rates[12] == pytest.approx(0)
    assert rates[6] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    # past the end, where more steps were made than planned, it stays at its last value
    assert learning_rate(options, 20, 12) == pytest.approx(0)
    constant = OptimOptions(lr=1.0, warmup=4, lr_scheduler="const")
    assert learning_rate(constant, 11, 12) == 1.0


SCHEDULES = {
    "cosine": {"lr_scheduler": "cosine"},
    "const": {"lr_scheduler": "const"},
    "cooldown": {"lr_scheduler": "const-cooldown", "epochs_cooldown": 3},
    "cooldown power end": {
        "lr_scheduler": "const-cooldown",
        "epochs_cooldown": 7,
        "lr_cooldown_power": 2.5,
        "lr_cooldown_end": 1e-4,
    },
    "cooldown all": {"lr_scheduler": "const-cooldown", "epochs_cooldown": 10},
    "wsd": {"lr_scheduler": "wsd"},
    "wsd power end": {
        "lr_scheduler": "wsd",
        "epochs_cooldown": 4,
        "lr_cooldown_power": 1.5,
        "lr_cooldown_end": 3e-4,
    },
}


def definition(steps: int, warmup: int, options: OptimOptions) -> np.ndarray:
    """All rates of a run, by array, in float64."""
    step = np.arange(steps, dtype=np.float64)
    peak, end, kind = options.lr, options.lr_cooldown_end, options.lr_scheduler
    share = {"const-cooldown": (options.epochs_cooldown or 0) / options.epochs, "wsd": 0.2}
    if options.epochs_cooldown is not None:
        share["wsd"] = options.epochs_cooldown / options.epochs
    if kind == "cosine":
        rates = peak * np.cos(np.pi / 2 * (step - warmup) / (steps - warmup)) ** 2
    elif kind == "const":
        rates = np.full(steps, peak)
    else:
        down = share[kind] * steps
        x = np.clip(1 - (steps - step) / down, 0, 1)
        power = options.lr_cooldown_power or {"const-cooldown": 1, "wsd": 0.5}[kind]
        weight = (1 - x) ** power if kind == "const-cooldown" else 1 - x**power
        rates = weight * peak + (1 - weight) * end
    return np.where(step < warmup, peak * (step + 1) / warmup, rates)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(50, 5), (1000, 1), (200, 60)])
def test_schedules_are_their_definitions(name: str, steps: int, warmup: int) -> None:
    options = OptimOptions(lr=2e-3, epochs=10, warmup=warmup, **SCHEDULES[name])
    found = [learning_rate(options, step, steps) for step in range(steps)]
    np.testing.assert_allclose(found, definition(steps, warmup, options), rtol=1e-12, atol=1e-18)
    # past the end it stays where it is
    last = learning_rate(options, steps, steps)
    assert last == learning_rate(options, steps + 7, steps)
    if options.lr_scheduler != "const":
        assert last == pytest.approx(options.lr_cooldown_end, abs=1e-18)


@pytest.mark.parametrize("name", ["cosine", "const", "cooldown", "cooldown power end"])
def test_schedules_are_open_clips(name: str) -> None:
    from open_clip_train import scheduler as theirs

    options = OptimOptions(lr=2e-3, epochs=10, warmup=8, **SCHEDULES[name])
    holder = SimpleNamespace(param_groups=[{}])
    given = holder, options.lr, options.warmup, 100
    if options.lr_scheduler == "const-cooldown":
        power = options.lr_cooldown_power or 1.0
        cooldown = 10 * (options.epochs_cooldown or 0)
        rate = theirs.const_lr_cooldown(*given, cooldown, power, options.lr_cooldown_end)
    else:
        rate = {"cosine": theirs.cosine_lr, "const": theirs.const_lr}[name](*given)
    assert [learning_rate(options, step, 100) for step in range(100)] == pytest.approx(
        [rate(step) for step in range(100)], rel=1e-12
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs_cooldown": 2}, "--epochs-cooldown is for --lr-scheduler const-cooldown and wsd"),
        ({"lr_scheduler": "const", "lr_cooldown_power": 1}, "--lr-cooldown-power is for"),
        ({"lr_scheduler": "const-cooldown"}, "const-cooldown needs --epochs-cooldown N"),
        ({"lr_scheduler": "wsd", "epochs_cooldown": 33}, "give at most --epochs, which is 32"),
        ({"lr_scheduler": "wsd", "epochs_cooldown": 0}, "--epochs-cooldown is 0; give a positive"),
        ({"lr_scheduler": "wsd", "lr_cooldown_power": 0}, "--lr-cooldown-power is 0; give a pos"),
        ({"lr_scheduler": "wsd", "lr_cooldown_end": 1}, "give at most --lr, which is 0.0005"),
        ({"lr_scheduler": "wsd", "lr_cooldown_end": -1}, "--lr-cooldown-end is -1; give at least"),
    ],
)
def test_what_no_schedule_can_do(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        OptimOptions(**given)


def test_a_warmup_longer_than_the_run_is_cut() -> None:
    options = OptimOptions(lr=1.0, warmup=10_000)
    assert learning_rate(options, 10, 100) == 1.0
    assert learning_rate(options, 0, 3) == 1.0


def test_only_matrices_decay() -> None:
    model = Towers()
    decayed, plain = build_optimizer(model, OptimOptions(wd=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(model.linear.weight)]
    assert len(plain["params"]) == 4


@pytest.mark.parametrize("name", ["sgd", "lion", "lamb", "adamw"])
def test_optimizers_of_timm(name: str) -> None:
    model = Towers()
    options = OptimOptions(optimizer=f"timm/{name}", wd=0.3, momentum=0.7, beta2=0.95, lr=0.1)
    made = build_optimizer(model, options, {"logit_scale": 0.01})
    kind, *_ = (each for each in type(made).__mro__ if each.__name__.lower() == name)
    assert kind.__module__.startswith(("timm.optim", "torch.optim"))
    groups = made.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0, 0.0]
    assert groups[2]["lr"] == 0.01 and groups[2]["lr_factor"] == pytest.approx(0.1)
    assert groups[0].get("momentum", 0.7) == 0.7
    assert groups[0].get("betas", (0.9, 0.95)) == (0.9, 0.95)
    assert set(configured(groups[0])) <= {"lr", "betas", "eps", "weight_decay", "momentum", "fused"}
    before = model.linear.weight.clone()
    (model.linear(torch.ones(2, 3)).sum() * model.logit_scale).backward()
    made.step()
    assert not before.equal(model.linear.weight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "lion"}, "--optimizer lion is unknown; use one of adamw, apex-adamw"),
        ({"optimizer": "timm/loin"}, "timm has none of that name; near names: lion"),
        ({"optimizer": "timm/adahessian"}, "timm/adahessian needs second derivatives"),
        ({"momentum": 0.9}, "--momentum is for --optimizer timm/NAME, not adamw"),
        ({"optimizer": "timm/sgd", "momentum": 1.0}, "--momentum is 1.0; give one in [0, 1)"),
    ],
)
def test_optimizers_that_there_are_not(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_optimizer(Towers(), OptimOptions(**given))


def test_the_scale_is_clamped() -> None:
    model = Towers()
    for start, end in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        with torch.no_grad():
            model.logit_scale.fill_(start)
        clamp(model, {"logit_scale": (0.0, LOGIT_SCALE_MAX)})
        assert model.logit_scale.item() == pytest.approx(end)
