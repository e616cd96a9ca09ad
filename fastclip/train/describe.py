"""What a run says of itself at its start: in its directory, and in its messages."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fastclip.atomic import write_folder, write_text
from fastclip.data.loader import TrainingLoader
from fastclip.device import AUTOCAST_DTYPES
from fastclip.messages import logger
from fastclip.models.build import describe
from fastclip.models.clip import CONFIG_FILE, Model
from fastclip.ops.backend import explain
from fastclip.train.config import TrainConfig, to_yaml
from fastclip.train.distributed import World


def write_description(
    run: Path, config: TrainConfig, model: Model, classes: Sequence[str] = ()
) -> None:
    """Write the model's description and the resolved configuration into the run directory."""
    description = json.dumps(describe(config.model.model, model, config.model, classes), indent=2)
    write_text(run / CONFIG_FILE, description + "\n")
    write_text(run / "config.yaml", to_yaml(config))
    # a tokenizer from elsewhere must be at hand when the run is loaded
    if save := getattr(model.tokenizer, "save_pretrained", None):
        write_folder(run, lambda made: save(str(made)))


def announce(
    config: TrainConfig, world: World, model: nn.Module, loader: TrainingLoader, step: int
) -> None:
    """Log the resolved configuration and what it amounts to."""
    dtype = AUTOCAST_DTYPES[config.model.precision] or torch.float32
    # sharded parameters are empty here, and know how large they are
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    processes = f" x {world.size} processes" if world.size > 1 else ""
    optim = config.optim
    micro = f" in {optim.accum_freq} micro-batches" if optim.accum_freq > 1 else ""
    lines = [
        to_yaml(config).rstrip(),
        f"model: {parameters / 1e6:.1f} M parameters on {world.device}{processes}",
        f"batches: {optim.step_samples(world.size)} samples{micro}, {loader.steps_per_epoch} steps "
        f"an epoch, {optim.epochs * loader.steps_per_epoch} in all, {step} done",
    ]
    for name, status, description in explain(
        "sigmoid" if config.loss.siglip else "similarity", world.device, dtype
    ):
        lines.append(f"loss: {name}: {status} ({description})")
    logger.info("\n".join(lines))
