"""SwALIP's prototypes in the first steps of a run: not updated, on any engine, resumed or not."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip.models import checkpoint
from fastclip.train.config import TrainConfig, parse
from fastclip.train.distributed import World
from fastclip.train.loop import train
from tests.train.conftest import TINY_MODEL
from tests.train.test_fsdp import batches, make, run
from tests.train.test_loop import identical

FROZEN, STEPS, RATE = 3, 6, 1e-3
NAME = "criterion.prototypes.weight"
SWALIP = {"objective": "swalip", "prototypes": 6, "projector_hidden": 12, "projector_width": 8}
FLAGS = "--objective swalip --prototypes 6 --projector-hidden 12 --projector-width 8".split()
ALONE = World(0, 1, torch.device("cpu"))


def engine_of(folder: Path, here: World, fsdp: bool, frozen: int = FROZEN) -> Any:
    return make(folder, here, fsdp, prototypes_frozen_steps=frozen, **SWALIP)


def steps(engine: Any, here: World, first: int = 0, last: int = STEPS) -> dict[str, Any]:
    """Losses, and before and after each step the weights."""
    losses, weights = [], [weights_of(engine)]
    for step in range(first, last):
        frozen = engine.objective.frozen(step)
        losses.append(engine.backward(batches(step, here), frozen).item())
        engine.update(RATE)
        weights.append(weights_of(engine))
    return {"losses": losses, "weights": weights}


def weights_of(engine: Any) -> dict[str, Tensor]:
    whole = engine.weights()
    weights = engine.model.state_dict() if whole is None else whole
    return {name: value.clone() for name, value in weights.items()}


def part(folder: Path, here: World) -> dict[str, Any]:
    return {
        name: steps(engine_of(folder, here, fsdp), here)
        for name, fsdp in (("ddp", False), ("fsdp", True))
    }


def changed(weights: list[dict[str, Tensor]], name: str) -> list[bool]:
    return [not torch.equal(before[name], after[name]) for before, after in pairwise(weights)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    return tmp_path


def test_prototypes_wait_and_begin_as_an_optimizer_does(folder: Path) -> None:
    engine = engine_of(folder, ALONE, fsdp=False)
    weights = steps(engine, ALONE)["weights"]
    assert changed(weights, NAME) == [False] * FROZEN + [True] * (STEPS - FROZEN)
    head = "criterion.projectors.image.0.weight"
    assert all(changed(weights, head))
    # no decay either, and the moments are of the later steps alone
    state = engine.optimizer.state
    assert state[engine.model.get_parameter(NAME)]["step"] == STEPS - FROZEN
    assert state[engine.model.get_parameter(head)]["step"] == STEPS
    moved = engine_of(folder, ALONE, fsdp=False, frozen=0)
    assert all(changed(steps(moved, ALONE)["weights"], NAME))


def test_their_gradient_is_no_part_of_the_norm(folder: Path) -> None:
    norms = []
    for frozen in (0, 1):
        engine = engine_of(folder, ALONE, fsdp=False, frozen=frozen)
        engine.backward(batches(0, ALONE), engine.objective.frozen(0))
        norms.append(engine.norm.item() ** 2)
        if not frozen:
            left_out = engine.model.get_parameter(NAME).grad.norm().item() ** 2
    assert left_out > 1e-6
    assert norms[0] - norms[1] == pytest.approx(left_out, rel=1e-4)


@pytest.mark.dist
def test_several_processes_wait_alike(folder: Path) -> None:
    found = run(folder, 2, part)
    alone = make(folder, ALONE, False, prototypes_frozen_steps=FROZEN, **SWALIP, batch_size=16)
    losses = steps(alone, ALONE)["losses"]
    for name, one in found.items():
        assert changed(one["weights"], NAME) == [False] * FROZEN + [True] * (STEPS - FROZEN), name
        assert one["losses"] == pytest.approx(losses, rel=1e-4), name


def test_a_resumed_run_keeps_count(train_flags: list[str]) -> None:
    """Frozen for 10 of 16 steps, resumed after 6."""
    flags = [*train_flags, *FLAGS, "--prototypes-frozen-steps", "10", "--save-every-steps", "6"]
    whole = train(parse([*flags, "--name", "whole"]))
    source = whole / "checkpoints" / "step_00000006.pt"
    resumed = train(parse([*flags, "--name", "resumed", "--resume", str(source)]))
    ends = [checkpoint.read(run / "checkpoints" / "epoch_2.pt") for run in (whole, resumed)]
    for key in ("state_dict", "optimizer"):
        assert identical(ends[0][key], ends[1][key]), key
    shorter = train(parse([*flags, "--name", "shorter", "--prototypes-frozen-steps", "16"]))
    end = checkpoint.read(shorter / "checkpoints" / "epoch_2.pt")["state_dict"][NAME]
    begun = checkpoint.read(source)["state_dict"][NAME]
    assert torch.equal(end, begun) and not torch.equal(ends[0]["state_dict"][NAME], begun)


def test_deepspeed_is_refused() -> None:
    with pytest.raises(ValueError, match="--prototypes-frozen-steps is 3, but DeepSpeed updates"):
        TrainConfig.from_flat(prototypes_frozen_steps=3, deepspeed=True, **SWALIP)
