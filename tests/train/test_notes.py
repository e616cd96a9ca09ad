"""Notes of a run: what differs where it is resumed, and what its end has to say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.models import checkpoint
from fastclip.train import start
from fastclip.train.config import parse
from fastclip.train.loop import train
from tests.conftest import jpeg

Logged = Callable[[], str]


@pytest.fixture
def flags(train_flags: list[str]) -> list[str]:
    return [*train_flags, "--train-num-samples", "16", "--epochs", "1", "--name", "a"]


def test_other_sample_counts_are_noted(
    flags: list[str], make_shard: Callable[..., Path], logged: Logged
) -> None:
    note = "note: the data's sample counts have changed; other samples follow than would have"
    data = ["--train-data", str(make_shard(samples=16))]
    train(parse([*flags, *data]))
    resume = [*flags, *data, "--resume", "latest", "--epochs"]
    train(parse([*resume, "2"]))
    assert note not in logged()
    make_shard(samples=17)
    train(parse([*resume, "3"]))
    assert note in logged()


def test_another_number_of_processes_is_noted(flags: list[str], logged: Logged) -> None:
    note = "processes before, 1 now: the same samples follow, but dropout draws other numbers"
    run = train(parse([*flags, "--save-all"]))
    path = run / "checkpoints" / "epoch_1.pt"
    content = checkpoint.read(path)
    resume = [*flags, "--save-all", "--resume", "latest", "--epochs", "2"]
    train(parse(resume))
    assert note not in logged()
    # as two would have saved it
    checkpoint.write(path, {**content, "rng": content["rng"] * 2})
    for later in path.parent.glob("epoch_2*"):
        later.unlink()
    train(parse(resume))
    assert f"note: 2 {note} and BatchNorm sees other parts of the batch" in logged()


def test_steps_that_overflowed_are_counted_at_the_end(
    flags: list[str], logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = start.build_engine
    engines: list[Any] = []

    def spoiled(*arguments: Any) -> Any:
        """As though the first step overflowed, whatever others do."""
        engine = build(*arguments)
        engines.append(engine)
        calls: list[int] = []

        def hook(gradient: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return gradient * (torch.inf if len(calls) == 1 else 1)

        engine.model.text_projection.register_hook(hook)
        return engine

    train(parse([*flags, "--precision", "fp32"]))
    assert "float16 overflowed" not in logged()
    monkeypatch.setattr(start, "build_engine", spoiled)
    train(parse([*flags, "--precision", "amp", "--name", "b"]))
    counted = "1 step" if engines[0].skipped == 1 else f"{engines[0].skipped} steps"
    assert engines[0].skipped >= 1
    assert f"float16 overflowed in {counted}; skipped\n" in logged()


def test_duplicates_are_counted_at_the_end(
    flags: list[str], make_shard: Callable[..., Path], logged: Logged
) -> None:
    """Of eight samples three have one caption, and two another."""
    members = []
    for number, text in enumerate("aaabbcde"):
        members += [(f"{number}.jpg", jpeg((30 * number, 0, 0))), (f"{number}.txt", text.encode())]
    data = ["--train-data", str(make_shard(members=members)), "--epochs", "2"]
    grouped = [*flags, *data, "--group-duplicates", "excluded"]
    train(parse([*grouped, "--train-num-samples", "8"]))
    # three pairs and one, in each of two steps
    assert "note: 8 pairs were duplicates\n" in logged()
    train(parse([*flags, *data, "--train-num-samples", "8", "--name", "b"]))
    assert "were duplicates" not in logged()
