"""The schedule and the optimizer's groups."""

import math

import pytest
import torch
from torch import nn

from fastclip.train.optim import (
    LOGIT_SCALE_MAX,
    build_optimizer,
    clamp,
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


def test_the_scale_is_clamped() -> None:
    model = Towers()
    for start, end in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        with torch.no_grad():
            model.logit_scale.fill_(start)
        clamp(model, {"logit_scale": (0.0, LOGIT_SCALE_MAX)})
        assert model.logit_scale.item() == pytest.approx(end)
