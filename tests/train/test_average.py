"""The average of the weights: by hand, in an engine, and in a run."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastclip.models import checkpoint
from fastclip.train.average import WeightAverage
from fastclip.train.config import parse
from fastclip.train.distributed import World
from fastclip.train.loop import train
from tests.train.conftest import TINY_MODEL
from tests.train.test_fsdp import equal, make, steps

HERE = World(0, 1, torch.device("cpu"))


def followed(average: dict[str, Tensor], weights: dict[str, Tensor], decay: float) -> None:
    """The definition, in place."""
    for name, own in average.items():
        own.mul_(decay).add_((1 - decay) * weights[name])


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def near(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_three_updates_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average, expected = WeightAverage(model, 0.75), copied(model)
    for _ in range(3):
        with torch.no_grad():
            # moves the running statistics
            model(torch.randn(8, 3))
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        before = copied(model)
        average.update(model)
        assert equal(copied(model), before)
        followed(expected, before, 0.75)
    found = average.state_dict()
    near(found, expected)
    assert found.keys() == model.state_dict().keys()
    # buffers are no average
    assert found["1.num_batches_tracked"] == 3
    assert all(torch.equal(found[name], buffer) for name, buffer in model.named_buffers())
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"decay is {decay}; give one in \[0, 1\)"):
        WeightAverage(nn.Linear(2, 2), decay)


@pytest.mark.parametrize("decay", ["1", "1.5"])
def test_a_flag_out_of_range(decay: str) -> None:
    with pytest.raises(ValueError, match=rf"--ema is {float(decay)}; give one in \[0, 1\), e\.g\."):
        parse(["--ema", decay])


def test_an_engines_average_has_the_decay_asked_for(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    engine = make(tmp_path, HERE, fsdp=False, ema=0.5)
    expected = copied(engine.model)
    for step in range(3):
        steps(engine, HERE, step, step + 1)
        followed(expected, copied(engine.model), 0.5)
    near(engine.average.state_dict(), expected)
    assert make(tmp_path, HERE, fsdp=False).average is None


def test_a_step_that_overflows_leaves_the_average(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    engine = make(tmp_path, HERE, fsdp=False, ema=0.5, precision="amp")
    # some may overflow until the loss scale fits
    steps(engine, HERE, 0, 5)
    skipped = engine.skipped
    before = {name: value.clone() for name, value in engine.average.state_dict().items()}
    # or following once more would change nothing
    assert not equal(before, dict(engine.model.state_dict()))
    engine.model.text_projection.register_hook(lambda gradient: gradient * torch.inf)
    steps(engine, HERE, 5, 6)
    assert engine.skipped == skipped + 1
    assert equal(dict(engine.average.state_dict()), before)


def test_a_runs_average_has_the_decay_asked_for(train_flags: list[str]) -> None:
    """Of the checkpoints of three steps one after the other."""
    flags = "--train-num-samples 24 --epochs 1 --save-every-steps 1 --ema 0.5 --name a".split()
    run = train(parse([*train_flags, *flags]))
    names = ("step_00000001.pt", "step_00000002.pt", "epoch_1.pt")
    first, *later = [checkpoint.read(run / "checkpoints" / name) for name in names]
    expected = {name: value.clone() for name, value in first[checkpoint.AVERAGE].items()}
    for content in later:
        followed(expected, content["state_dict"], 0.5)
        near(content[checkpoint.AVERAGE], expected)
    assert not equal(dict(later[-1]["state_dict"]), expected)
