"""A run directory belongs to one process that trains."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastclip
from fastclip.cli import main
from fastclip.train.config import parse
from fastclip.train.loop import train
from fastclip.train.run_directory import LOCK, claim
from tests.processes import Forked


def hold_run(run: Path) -> None:
    """As a training does."""
    with claim(run):
        print("held", flush=True)
        time.sleep(600)


def hold(run: Path) -> Forked:
    """A process that trains in a run directory, so to speak."""
    holder = Forked(hold_run, run)
    while holder.output() != "held\n":
        assert holder.poll() is None, holder.communicate()[1]
        time.sleep(0.01)
    return holder


def test_a_second_one_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = hold(run)
    try:
        with pytest.raises(FileExistsError, match="another process trains in it"), claim(run):
            pass
        assert (run / LOCK).exists()
    finally:
        holder.kill()
        holder.wait()
    with claim(run):
        assert run.is_dir()
    # nothing was written
    assert not run.exists()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"), claim(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("resume", [[], ["--resume", "latest"]])
def test_training_in_a_directory_in_use_ends_at_once(
    resume: list[str],
    train_flags: list[str],
    start_training: Callable[..., Forked],
    tmp_path: Path,
) -> None:
    run = tmp_path / "logs" / "same"
    holder = hold(run)
    try:
        second = start_training(*train_flags, "--name", "same", *resume)
        _, errors = second.communicate(timeout=120)
    finally:
        holder.kill()
        holder.wait()
    assert second.returncode == 1
    assert re.search(r"same exists and another process trains in it", errors)
    assert sorted(path.name for path in run.iterdir()) == [LOCK]


def test_another_folder_beside_a_run_to_resume_is_refused(
    train_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(parse([*train_flags, "--name", "a", "--epochs", "1"]))
    resume = ["--resume", str(run), "--epochs", "2"]
    assert main(["train", *resume, "--logs", str(tmp_path / "elsewhere")]) == 1
    assert "continues in that directory; leave out --logs" in capsys.readouterr().err
    assert main(["train", *resume, "--logs", str(run.parent)]) == 0


def test_a_run_resumes_without_the_weights_that_it_began_with(
    train_flags: list[str], tmp_path: Path
) -> None:
    first = train(parse([*train_flags, "--name", "first", "--epochs", "1"]))
    weights = tmp_path / "weights.pt"
    assert main(["convert", "to-open-clip", str(first), str(weights)]) == 0
    train_flags = [*train_flags, "--lr-scheduler", "const", "--warmup", "0"]
    begun = [*train_flags, "--pretrained", str(weights)]
    whole = train(parse([*begun, "--name", "whole", "--epochs", "2"]))
    train(parse([*begun, "--name", "parted", "--epochs", "1"]))
    weights.unlink()
    parted = train(parse([*train_flags, "--name", "parted", "--epochs", "2", "--resume", "latest"]))
    ours, theirs = (fastclip.load(run).model.state_dict() for run in (parted, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_optimizer_has_another_state(
    train_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*train_flags, "--name", "a"]
    train(parse([*flags, "--epochs", "1"]))
    onward = [*flags, "--epochs", "2", "--resume", "latest", "--optimizer", "timm/lion"]
    assert main(["train", *onward]) == 1
    assert "--optimizer was adamw and is now timm/lion" in capsys.readouterr().err
