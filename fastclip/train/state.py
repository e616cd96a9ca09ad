"""The state of a run as plain values, saved and restored exactly."""

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastclip.models import checkpoint
from fastclip.train.config import TrainConfig

KEPT_STEP_CHECKPOINTS = 2


def capture(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    *,
    epoch: int,
    step_in_epoch: int,
    step: int,
) -> dict[str, Any]:
    """Everything the next step depends on.

    The first entries are open_clip's names; `epoch` counts finished epochs. `data` is the whole
    state of the data: where in which epoch of which order the next sample lies.
    """
    return {
        "epoch": epoch,
        "name": config.name,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "samples_seen": step * config.batch_size,
        "data": {
            "seed": config.seed,
            "epoch": epoch,
            "position": step_in_epoch * config.batch_size,
        },
        "rng": rng_state(),
        "config": asdict(config),
    }


def seed_rng(seed: int) -> None:
    """Start every global random stream from one seed."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every global random stream a model may draw from."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Undo everything drawn since `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy(), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def prune_step_checkpoints(folder: Path) -> None:
    """Delete all step checkpoints but the newest two, oldest first."""
    for path in sorted(folder.glob("step_*.pt"))[:-KEPT_STEP_CHECKPOINTS]:
        path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)


def prune_epoch_checkpoints(folder: Path, keep: int) -> None:
    """Delete all epoch checkpoints but that of epoch `keep`."""
    for path in folder.glob("epoch_*.pt"):
        if path.name != f"epoch_{keep}.pt":
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)


def find_resume(resume: str, folder: Path) -> Path:
    """The checkpoint that `--resume` names.

    Raises:
        FileNotFoundError: there is none.
    """
    if resume != "latest":
        return Path(resume)
    found = checkpoint.find_latest(folder)
    if found is None:
        raise FileNotFoundError(f"--resume latest: {folder} holds no whole checkpoint")
    return found
