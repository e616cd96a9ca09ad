"""Resuming a run: which checkpoint, and what differs from when it was saved."""

from pathlib import Path
from typing import Any

from fastclip.data.loader import TrainingLoader
from fastclip.flags import defining, flag_name, flatten
from fastclip.messages import note
from fastclip.models import checkpoint
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World


def read_resumed(
    config: TrainConfig, run: Path, world: World
) -> tuple[Path, dict[str, Any]] | tuple[None, None]:
    """The checkpoint that `--resume` names, and its content; None and None for a new run.

    A run without a checkpoint starts from the beginning. What differs from the checkpoint's
    configuration, data and number of processes is logged.

    Raises:
        FileExistsError: --resume is not given and the run has checkpoints already.
        FileNotFoundError, ValueError: the checkpoint is not there, or cannot be resumed.
    """
    folder = run / "checkpoints"
    # one rank looks, and all do as it says: others may see a shared folder late
    existing = world.gather(bool(checkpoint.named(folder, "")))[0]
    if config.checkpoint.resume is None:
        if existing:
            raise FileExistsError(
                f"{run} exists; choose another --name, or resume it: --resume latest"
            )
        return None, None
    if config.checkpoint.resume == "latest" and not existing:
        # said once the run has described itself: a name may be mistyped
        return None, None
    latest = _latest(folder, world) if existing else None
    named = checkpoint.best_named(Path(config.checkpoint.resume))
    path = latest if config.checkpoint.resume == "latest" else named
    if path is None:
        raise FileNotFoundError(f"--resume latest: {folder} holds no whole checkpoint")
    resumed = _read(path, latest, config)
    if latest is not None and checkpoint.step_of(latest) > resumed["step"]:
        raise ValueError(
            f"{run} has continued to {latest.name}; to branch off from step {resumed['step']} "
            "choose another --name"
        )
    _note_changes(resumed, config, world)
    _check_position(path, resumed, config, world)
    if world.size != len(resumed["rng"]):
        _note(
            world,
            f"{len(resumed['rng'])} processes before, {world.size} now: the same samples follow, "
            "but dropout draws other numbers and BatchNorm sees other parts of the batch",
        )
    _note(world, f"resuming {path} at step {resumed['step']}")
    return path, resumed


def check_same_data(
    resumed: dict[str, Any], loader: TrainingLoader, world: World, *, remembering: bool = False
) -> None:
    """Note it where the shards no longer hold as many samples as when the run began.

    Args:
        resumed: the checkpoint's content.
        loader: of the run.
        world: this process among the others.
        remembering: whether the loss remembers each sample of the data.

    Raises:
        ValueError: what it remembers is of other samples.
    """
    if resumed["data"]["counts"] != loader.identity["counts"]:
        if remembering and checkpoint.MEMORY in resumed:
            raise ValueError(
                "--loss global remembers each sample, and the data's sample counts have changed "
                f"since the checkpoint ({sum(loader.samples.order.counts)} samples now); give the "
                "data of before, or begin with the checkpoint's weights: --pretrained"
            )
        _note(world, "the data's sample counts have changed; other samples follow than would have")


def _latest(folder: Path, world: World) -> Path | None:
    """The latest whole checkpoint, found once: it reads every byte of one."""
    found = checkpoint.find_latest(folder) if world.is_first else None
    name = world.gather(found.name if found else "")[0]
    return folder / name if name else None


def _read(path: Path, latest: Path | None, config: TrainConfig) -> dict[str, Any]:
    """A checkpoint's content, if it is trusted, whole, and has a training state."""
    checkpoint.require_trust(path, config.checkpoint.trust_checkpoint)
    # the latest was found to be whole
    if path != latest and checkpoint.sharded.is_sharded(path):
        checkpoint.sharded.require_whole(path)
    resumed = checkpoint.read(path)
    if "data" not in resumed:
        raise ValueError(
            f"{path} holds weights but no training state; begin with them: --pretrained {path}"
        )
    return resumed


def _note_changes(resumed: dict[str, Any], config: TrainConfig, world: World) -> None:
    """Note every flag that defines a run and has another value than in the checkpoint.

    Raises:
        ValueError: the data are the default ones, and those of the checkpoint were not.
    """
    earlier = flatten(TrainConfig.from_dict(resumed["config"], "the checkpoint's configuration"))
    now = flatten(config)
    data = earlier["train_data"]
    if data != now["train_data"] == flatten(TrainConfig())["train_data"]:
        raise ValueError(
            f"the run's --train-data was {data} and is not given now; repeat the whole command "
            "with --resume, or begin with the checkpoint's weights on other data: --pretrained"
        )
    for name in defining(TrainConfig):
        if earlier[name] != now[name]:
            changed = f"{flag_name(name)} was {earlier[name]} and is now {now[name]}"
            _note(world, f"{changed}; the resumed run differs from the original")


def _check_position(path: Path, resumed: dict[str, Any], config: TrainConfig, world: World) -> None:
    position, batch = resumed["data"]["position"], config.optim.step_samples(world.size)
    if position % batch:
        raise ValueError(
            f"{path} was saved at sample {position} of an epoch, which is not a "
            f"multiple of {batch}, the samples of a step; keep --batch-size times --accum-freq "
            "times the number of processes, or resume from an epoch's end"
        )


def _note(world: World, text: str) -> None:
    if world.is_first:
        note(text)
