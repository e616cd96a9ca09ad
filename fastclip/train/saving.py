"""Checkpoints of a run: written, and deleted when newer ones are there."""

from collections.abc import Callable, Iterable
from pathlib import Path

from fastclip.messages import logger
from fastclip.models import checkpoint
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


def prune_epoch_checkpoints(folder: Path, keep: int) -> None:
    """Delete all epoch checkpoints but that of epoch `keep`."""
    _delete(p for p in checkpoint.named(folder, "epoch_") if p.stem != f"epoch_{keep}")


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            checkpoint.remove(path)
        except OSError as error:
            logger.warning(f"warning: {path} could not be deleted: {error}")
