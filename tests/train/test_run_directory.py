"""A run directory belongs to one process that trains."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

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
