"""Weights & Biases: which of its runs is continued. A stand-in: the package wants an account."""

import shutil
import sys
import types
from typing import Any

import pytest

from fastclip.train.config import parse
from fastclip.train.loop import train


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was asked of it, a run each."""
    found: list[dict[str, Any]] = []
    run = types.SimpleNamespace(log=lambda values, step: None, finish=lambda: None)
    standin = types.SimpleNamespace(init=lambda **options: found.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", standin)
    return found


def test_a_resumed_run_continues_its_own(
    train_flags: list[str], asked: list[dict[str, Any]]
) -> None:
    flags = [*train_flags, "--train-num-samples", "16", "--report-to", "wandb", "--epochs"]
    # which wandb takes for no id
    name = ["--name", "a#b"]
    run = train(parse([*flags, "1", *name]))
    train(parse([*flags, "2", *name, "--resume", "latest"]))
    branch = ["--name", "c", "--resume", str(run / "checkpoints" / "epoch_2.pt")]
    train(parse([*flags, "3", *branch]))
    shutil.rmtree(run)
    train(parse([*flags, "1", *name]))
    first, resumed, branched, again = (one["id"] for one in asked)
    assert first == resumed and len({first, branched, again}) == 3
    assert first.isalnum() and {one["resume"] for one in asked} == {"allow"}
    assert [one["name"] for one in asked] == ["a#b", "a#b", "c", "a#b"]
