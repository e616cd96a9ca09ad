"""FSDP2: resuming with other flags than before, and ranks of which one alone sees a fault."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.models import sharded
from fastclip.train.distributed import World
from fastclip.train.health import NonFiniteError, first_non_finite
from tests.train.conftest import TINY_MODEL
from tests.train.test_fsdp import batches, equal, make, run, steps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    return tmp_path


@pytest.mark.dist
def test_resuming_with_other_flags(folder: Path) -> None:
    run(folder, 1, other_flags)


def other_flags(folder: Path, here: World) -> dict[str, Any]:
    engine = make(folder, here)
    steps(engine, here, 0, 2)
    for precision in ("amp", "fp32"):
        engine.save(folder / "saved", {"step": 2})
        content, before = sharded.read_training(folder / "saved"), engine.weights()
        # to a loss scale, and from one
        engine = make(folder, here, precision=precision)
        engine.load(folder / "saved", content)
        assert equal(engine.weights(), before)
        assert math.isfinite(*steps(engine, here, 2, 3))
    locked = make(folder, here, lock_image=True)
    with pytest.raises(ValueError, match=r"trained other parameters \('visual\..*--lock-image"):
        locked.load(folder / "saved", content)
    return {}


@pytest.mark.dist
def test_a_fault_that_one_rank_alone_sees(folder: Path) -> None:
    run(folder, 2, one_sided)


def one_sided(folder: Path, here: World) -> dict[str, Any]:
    engine = make(folder, here)
    steps(engine, here, 0, 1)
    inputs = engine._inputs

    def spoiled(batch: dict[str, Any]) -> dict[str, Any]:
        made = inputs(batch)
        made["images"] = [image * (math.nan if here.rank else 1) for image in made["images"]]
        return made

    engine._inputs = spoiled
    with pytest.raises(NonFiniteError, match="on rank 1: input 'image 0'"):
        engine.backward(batches(1, here))
    engine._inputs = inputs
    engine.backward(batches(1, here))
    name = next(name for name in engine._rows if name.endswith("mlp.c_fc.weight"))
    if here.rank == 1:
        with torch.no_grad():
            engine._rows[name].fill_(math.nan)
    with pytest.raises(NonFiniteError, match=f"on rank 1: parameter '{name}'"):
        engine.backward(batches(2, here))
    return {}


def test_the_forward_runs_whatever_is_found_before() -> None:
    """Other ranks may find nothing, and wait in theirs."""
    model, ran = torch.nn.Linear(2, 1), []
    bad = {"image 0": torch.tensor([1.0, math.nan])}
    assert first_non_finite(model, bad, lambda: ran.append(1)) == "input 'image 0'"
    torch.nn.init.constant_(model.weight, math.inf)
    assert first_non_finite(model, {}, lambda: ran.append(1)) == "parameter 'weight'"
    assert len(ran) == 2
