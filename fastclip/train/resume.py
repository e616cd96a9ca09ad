"""Resuming a run: which checkpoint, and what differs from the run's beginning."""

from pathlib import Path
from typing import Any

from fastclip.data.loader import TrainingLoader
from fastclip.flags import defining
from fastclip.models import checkpoint
from fastclip.printable import note
from fastclip.train.config import TrainConfig, from_dict
from fastclip.train.distributed import World


def read_resumed(
    config: TrainConfig, run: Path, world: World
) -> tuple[Path, dict[str, Any]] | tuple[None, None]:
    """The checkpoint that `--resume` names, and its content; None and None for a new run.

    A run that has not come to its first checkpoint begins anew. What differs from the run's
    beginning is noted on standard error.

    Raises:
        FileExistsError: --resume is not given and the run has checkpoints already.
        FileNotFoundError, ValueError: the checkpoint is not there, or cannot be resumed from.
    """
    folder = run / "checkpoints"
    # one rank looks, and all do as it says: others may see a shared folder late
    existing = world.gather(bool(checkpoint.named(folder, "")))[0]
    if config.resume is None:
        if existing:
            raise FileExistsError(
                f"{run} exists; choose another --name, or resume it: --resume latest"
            )
        return None, None
    if config.resume == "latest" and not existing:
        _note(world, f"{folder} holds no checkpoint yet; the run begins")
        return None, None
    # found once: it reads every byte of a checkpoint
    found = checkpoint.find_latest(folder) if existing and world.is_first else None
    found_name = world.gather(found.name if found else "")[0]
    latest = folder / found_name if found_name else None
    path = latest if config.resume == "latest" else Path(config.resume)
    if path is None:
        raise FileNotFoundError(f"--resume latest: {folder} holds no whole checkpoint")
    checkpoint.require_trust(path, config.trust_checkpoint)
    if path != latest and checkpoint.sharded.is_sharded(path):
        checkpoint.sharded.require_whole(path)
    resumed = checkpoint.read(path)
    if "data" not in resumed:
        raise ValueError(
            f"{path} holds weights but no training state; begin with them: --pretrained {path}"
        )
    if latest is not None and checkpoint.step_of(latest) > resumed["step"]:
        raise ValueError(
            f"{run} has continued to {latest.name}; to branch off from step {resumed['step']} "
            "choose another --name"
        )
    earlier = from_dict(resumed["config"])
    for key in defining(TrainConfig):
        before, value = getattr(earlier, key), getattr(config, key)
        if before != value:
            flag = "--" + key.replace("_", "-")
            changed = f"{flag} was {before} and is now {value}"
            _note(world, f"{changed}; the resumed run differs from the original")
    batch = config.step_samples(world.size)
    if resumed["data"]["position"] % batch:
        raise ValueError(
            f"{path} stands at sample {resumed['data']['position']} of an epoch, which is no "
            f"multiple of {batch}, the samples of a step; keep --batch-size times --accum-freq "
            "times the number of processes, or resume from an epoch's end"
        )
    if world.size != len(resumed["rng"]):
        _note(
            world,
            f"{len(resumed['rng'])} processes before, {world.size} now: the same samples follow, "
            "but dropout draws other numbers and BatchNorm sees other parts of the batch",
        )
    _note(world, f"resuming {path} at step {resumed['step']}")
    return path, resumed


def check_same_data(resumed: dict[str, Any], loader: TrainingLoader, world: World) -> None:
    """Note it where the shards no longer hold as many samples as when the run began."""
    if resumed["data"]["counts"] != loader.identity["counts"]:
        _note(world, "the data's sample counts have changed; other samples follow than would have")


def _note(world: World, text: str) -> None:
    if world.is_first:
        note(text)
