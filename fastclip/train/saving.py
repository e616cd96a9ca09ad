"""Checkpoints of a run: written, and deleted when newer ones are there."""

from collections.abc import Callable, Iterable
from pathlib import Path

from fastclip.messages import logger
from fastclip.models import checkpoint
from fastclip.train.best import best_metric, best_step, scores_of
from fastclip.train.log import read_metrics
from fastclip.train.state import TrainState

KEPT_STEP_CHECKPOINTS = 2


def save(state: TrainState, name: str, *, needed: bool, warn: Callable[[str], None]) -> bool:
    """Write a checkpoint of this moment; called on all ranks.

    Args:
        state: of the run.
        name: of the checkpoint, without suffix.
        needed: whether the run must not continue without it.
        warn: receives the message of a failure that the run survives.

    Returns:
        Whether it was written.

    Raises:
        OSError: a checkpoint that is needed could not be written; earlier ones are whole.
    """
    content = state.content()
    try:
        state.engine.save(state.checkpoints / name, content)
    except OSError as error:
        kept = f"checkpoint {name} could not be written: {error}; earlier ones are kept"
        if needed:
            raise OSError(f"{kept} in {state.checkpoints}") from error
        warn(f"{kept}, the run continues")
        return False
    return True


def prune_step_checkpoints(folder: Path) -> None:
    """Delete all step checkpoints but the newest two whole ones, oldest first."""
    written = [p for p in checkpoint.named(folder, "step_") if p.with_suffix(".json").is_file()]
    _delete(path for path in written[:-KEPT_STEP_CHECKPOINTS])


def keep_newest_and_best(state: TrainState, warn: Callable[[str], None]) -> None:
    """Note which epoch is the best, and delete what the newest replaces; after it was saved.

    What was neither the newest nor the best before it stays: a run that kept all epochs, and is
    resumed without `--save-all`, loses none of them but the one that is replaced.

    Args:
        state: of the run, on the first rank.
        warn: receives the message of a failure that the run survives.
    """
    options, name = state.config.checkpoint, best_metric(state.config)
    alone = options.delete_previous_checkpoint
    found = checkpoint.steps_of(state.checkpoints, "epoch_")
    paths = sorted(found, key=found.__getitem__)
    # by the file, not by this process: a resumed run knows what was evaluated before
    scores = {} if alone else scores_of(read_metrics(state.folder), name)
    best = _best(paths, found, scores, name)
    try:
        value = None if best is None else scores[found[best]]
        checkpoint.write_best(state.folder, best, metric=name, value=value)
    except OSError as error:
        warn(f"{checkpoint.BEST_FILE} could not be written: {error}; no checkpoint is deleted")
        return
    if not options.save_all:
        before = {*paths[-2:-1], _best(paths[:-1], found, scores, name)}
        _delete(path for path in before - {*paths[-1:], best} if path is not None)


def _best(
    paths: list[Path], steps: dict[Path, int], scores: dict[int, float], name: str
) -> Path | None:
    """The checkpoint with the best score, None where none has one."""
    scored = {steps[path]: path for path in paths if steps[path] in scores}
    step = best_step({step: scores[step] for step in scored}, name)
    return None if step is None else scored[step]


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            checkpoint.remove(path)
        except OSError as error:
            logger.warning(f"warning: {path} could not be deleted: {error}")
