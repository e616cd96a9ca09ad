"""Resuming a run: which checkpoint, and what differs from when it was saved."""

from pathlib import Path
from typing import Any

from fastclip.data.loader import TrainingLoader
from fastclip.flags import defining, flag_name, flatten, inherited
from fastclip.messages import note
from fastclip.models import checkpoint
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World
from fastclip.train.inherited import LATEST, is_run


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
    wanted = config.checkpoint.resume
    if wanted is None:
        if existing:
            raise FileExistsError(
                f"{run} exists; choose another --name, or resume it: --resume latest"
            )
        return None, None
    _require_same(config, world)
    if wanted == LATEST and not existing:
        # said once the run has described itself: a name may be mistyped
        return None, None
    latest = _latest(folder, world) if existing else None
    if wanted == LATEST:
        path = latest
    elif is_run(Path(wanted)):
        # under a name of its own
        folder = Path(wanted) / "checkpoints"
        path = _latest(folder, world)
    else:
        path = checkpoint.best_named(Path(wanted))
    if path is None:
        raise FileNotFoundError(f"--resume {wanted}: {folder} holds no whole checkpoint")
    resumed = _read(path, latest, config)
    if latest is not None and checkpoint.step_of(latest) > resumed["step"]:
        raise ValueError(
            f"{run} has continued to {latest.name}; to branch off from step {resumed['step']} "
            "choose another --name"
        )
    earlier = TrainConfig.from_dict(resumed["config"], "the checkpoint's configuration")
    if earlier.optim.optimizer != config.optim.optimizer:
        raise ValueError(
            f"--optimizer was {earlier.optim.optimizer} and is now {config.optim.optimizer}, which "
            "has another state; keep it, or begin a new run with the checkpoint's weights: "
            f"--pretrained {path}"
        )
    before, now = earlier.loss.global_temperature, config.loss.global_temperature
    if before != now:
        raise ValueError(
            f"--global-temperature was {before} and is now {now}, but the checkpoint has the "
            "temperature; keep it, or begin a new run with the checkpoint's weights: "
            f"--pretrained {path}"
        )
    _note_changes(earlier, config, world)
    _check_position(path, resumed, config, world)
    _note_step(earlier.optim.step_samples(len(resumed["rng"])), config, world)
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


def _require_same(config: TrainConfig, world: World) -> None:
    """Refuse ranks that differ: each has read the run's settings, and one may have missed them.

    Raises:
        ValueError: two ranks differ; on all ranks.
    """
    own = flatten(config)
    # which of its GPUs a rank takes is its own affair
    names = [name for name in defining(TrainConfig) if name != "device"]
    first, *others = world.gather({name: str(own[name]) for name in names})
    for rank, other in enumerate(others, 1):
        for name in names:
            if other[name] != first[name]:
                raise ValueError(
                    f"{flag_name(name)} is {first[name]} on rank 0 and {other[name]} on rank "
                    f"{rank}; start all with the same flags, and with a --logs that all of them see"
                )


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


def _note_changes(checkpoints: TrainConfig, config: TrainConfig, world: World) -> None:
    """Note which flags have other values than in the checkpoint, those that define a run apart.

    Raises:
        ValueError: the data are the default ones, and those of the checkpoint were not.
    """
    earlier, now = flatten(checkpoints), flatten(config)
    data = earlier["train_data"]
    if data != now["train_data"] == flatten(TrainConfig())["train_data"]:
        raise ValueError(
            f"the run's --train-data was {data} and is now {now['train_data']}, the default; give "
            "the run's, or begin with the checkpoint's weights on other data: --pretrained"
        )
    changed = [name for name in inherited(TrainConfig) if earlier[name] != now[name]]
    essential = [name for name in changed if name in defining(TrainConfig)]
    further = [name for name in changed if name not in essential]
    for names, what in (
        (essential, "; the resumed run differs from the original"),
        (further, "; the training is as before"),
    ):
        if names:
            changes = (f"{flag_name(n)} {_typed(earlier[n])} -> {_typed(now[n])}" for n in names)
            _note(world, ", ".join(changes) + what)


def _note_step(before: int, config: TrainConfig, world: World) -> None:
    """Note it where a step has other samples, as of fewer processes with the same flags."""
    now = config.optim.step_samples(world.size)
    if before != now:
        _note(
            world,
            f"a step has {now} samples, in the original run {before}, with the same learning rate; "
            f"to keep {before}, change --batch-size or --accum-freq",
        )


def _typed(value: Any) -> str:
    """A value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


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
