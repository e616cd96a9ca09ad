"""What a resumed run takes over, what may differ, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastclip.cli import main
from fastclip.data.order import hash64
from fastclip.models import checkpoint
from fastclip.train import start
from fastclip.train.config import parse
from fastclip.train.distributed import World
from fastclip.train.loop import train


@pytest.fixture
def flags(train_flags: list[str]) -> list[str]:
    return [*train_flags, "--train-num-samples", "16", "--epochs", "1", "--name", "a"]


@pytest.mark.parametrize(
    "other", ["--no-lock-image", "--lock-text-unlocked-layers 0", "--lock-image-unlocked-groups 1"]
)
def test_other_trained_layers_are_refused(
    flags: list[str], other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = "--lock-image --lock-text --lock-text-unlocked-layers 1".split()
    assert main(["train", *flags, *lock]) == 0
    resume = ["train", *flags, *lock, "--epochs", "2", "--resume", "latest"]
    assert main([*resume, *other.split()]) == 1
    says = capsys.readouterr().err
    assert "the checkpoint's run trained other parameters ('" in says
    assert "give its --lock-image, --lock-text, --text-lm-unfrozen and" in says
    assert main(resume) == 0


def test_a_checkpoint_that_does_not_say_what_was_trained(flags: list[str]) -> None:
    """As those of before."""
    path = train(parse(flags)) / "checkpoints" / "epoch_1.pt"
    content = checkpoint.read(path)
    assert "visual.proj" in content.pop(checkpoint.TRAINED)
    checkpoint.write(path, content)
    train(parse([*flags, "--epochs", "2", "--resume", "latest"]))


@pytest.mark.parametrize("variant", ["v1", "v3"])
def test_another_temperature_is_refused(
    flags: list[str], variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags += ["--loss", "global", "--global-variant", variant, "--global-temperature", "0.05"]
    assert main(["train", *flags]) == 0
    resume = ["train", *flags, "--epochs", "2", "--resume", "latest"]
    assert main([*resume, "--global-temperature", "0.03"]) == 1
    says = capsys.readouterr().err
    assert "--global-temperature was 0.05 and is now 0.03, but the checkpoint has the" in says
    assert main(resume) == 0


def test_what_a_run_began_with_changes_nothing_later(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    begun = train(parse(flags))
    flags = [*flags, "--name", "b", "--objective", "classify", "--finetune"]
    assert main(["train", *flags, str(begun)]) == 0
    assert main(["train", *flags, "elsewhere", "--resume", "latest"]) == 0
    says = capsys.readouterr().err
    assert f"--finetune {begun} -> elsewhere; the training is as before" in says


def test_skipped_steps_are_counted_over_the_whole_run(
    flags: list[str], logged: Callable[[], str]
) -> None:
    path: Path = train(parse(flags)) / "checkpoints" / "epoch_1.pt"
    content = checkpoint.read(path)
    assert content["skipped"] == 0
    checkpoint.write(path, {**content, "skipped": 3})
    train(parse([*flags, "--epochs", "2", "--resume", "latest"]))
    assert "float16 overflowed in 3 steps; skipped" in logged()


def test_a_stream_that_was_not_saved_is_the_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's, in a checkpoint of CPUs: what is saved is restored over it."""
    called: list[tuple[str, object]] = []
    monkeypatch.setattr(start, "seed_rng", lambda seed: called.append(("seed", seed)))
    monkeypatch.setattr(start, "restore_rng", lambda state, _: called.append(("restore", state)))
    here = World(1, 2, torch.device("cuda", 1))
    start._start_streams(parse(["--seed", "5"]), here, {"rng": ["of rank 0", "of rank 1"]})
    assert called == [("seed", hash64(5, 1)), ("restore", "of rank 1")]
