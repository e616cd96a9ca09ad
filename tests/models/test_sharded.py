"""Folders of DeepSpeed's: which is chosen, and that nothing in them runs unasked."""

from pathlib import Path

import pytest
import torch

import fastclip
from fastclip.atomic import describe
from fastclip.models import checkpoint, sharded


class Malicious:
    """A pickle of this touches a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def make(folder: Path, step: int, shard: object = 1) -> Path:
    """A whole checkpoint folder with one file beside the plain state."""
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    torch.save({"step": step}, path / sharded.TRAINING)
    torch.save(shard, path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    files = {name: describe(path / name) for name in sharded.files_of(path)}
    path.with_suffix(".json").write_text(sharded.manifest_text(step, files))
    return path


def test_the_newest_whole_checkpoint_is_chosen(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "epoch_1.pt", {"step": 5, "state_dict": {}})
    first, second, third = (make(tmp_path, step) for step in (10, 20, 30))
    assert checkpoint.find_latest(tmp_path) == third
    shard = next(third.glob("zero*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="does not match its manifest"):
        assert checkpoint.find_latest(tmp_path) == second
    (second / "one_more").touch()
    first.with_suffix(".json").unlink()
    with pytest.warns(UserWarning, match="its writing was cut short|does not match"):
        assert checkpoint.find_latest(tmp_path) == tmp_path / "epoch_1.pt"
    # one that is being written has another name
    third.rename(third.with_name(third.name + ".partial"))
    # and so has a copy for another number of processes
    (tmp_path / f"step_00000040{sharded.TEMPORARY_SUFFIX}").mkdir()
    assert len(checkpoint.named(tmp_path, "step_")) == 2


def test_removing_takes_the_manifest_along(tmp_path: Path) -> None:
    path = make(tmp_path, 10)
    checkpoint.remove(path)
    assert not list(tmp_path.iterdir())


def test_nothing_runs_unasked(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    run = tmp_path / "run"
    path = make(run / "checkpoints", 10, Malicious(ran))
    (run / "open_clip_config.json").write_text("{}")
    assert checkpoint.run_of(path) == run and checkpoint.resolve(run) == path
    assert checkpoint.read(path)["step"] == 10
    for action in (
        lambda: checkpoint.read_weights(path),
        lambda: fastclip.load(run),
        lambda: fastclip.load(path),
    ):
        with pytest.raises(ValueError, match="--trust-checkpoint"):
            action()
    # the plain state is read without trust, so it must not run anything either
    torch.save({"step": 10, "more": Malicious(ran)}, path / sharded.TRAINING)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        checkpoint.read(path)
    assert not ran.exists()
    # the trap works
    torch.load(next(path.glob("zero*")), weights_only=False)
    assert ran.exists()
