"""The state of a run as plain values, saved and restored exactly."""

import random
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastclip.models import checkpoint
from fastclip.train.config import TrainConfig

KEPT_STEP_CHECKPOINTS = 2


def training_state(
    config: TrainConfig, streams: list[dict[str, Any]], data: dict[str, int], step: int
) -> dict[str, Any]:
    """Everything the next step depends on but what the engine holds.

    The first entries have open_clip's names; `epoch` counts finished epochs. `data` is the whole
    state of the data: where in which epoch of which order the next sample lies.

    Args:
        streams: the random streams of every rank, see `rng_state`.
        data: identity of the data, epoch, and position of the next sample over all ranks.
        step: updates made.
    """
    return {
        "epoch": data["epoch"],
        "name": config.name,
        "step": step,
        "data": data,
        "rng": streams,
        "config": asdict(config),
    }


def seed_rng(seed: int) -> None:
    """Start every global random stream from one seed."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every global random stream that a model on `device` may draw from."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, torch.from_numpy(np.asarray(keys)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Undo everything drawn since `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy(), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


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
            print(f"warning: {path} could not be deleted: {error}", file=sys.stderr)
