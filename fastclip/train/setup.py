"""What happens before the first step: names, data, resuming, the run's description."""

import json
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.data.augment import Augmentation
from fastclip.data.loader import TrainingLoader, TrainingSamples
from fastclip.data.order import Order
from fastclip.data.sources import open_source
from fastclip.models import checkpoint
from fastclip.models.clip import CONFIG_FILE, Model, describe
from fastclip.ops.backend import explain
from fastclip.train import state
from fastclip.train.config import TrainConfig, from_dict, to_yaml

SCENES_EPOCH = 20_000

# What a resumed run must share with its beginning to continue exactly.
DEFINES_THE_RUN = (
    *("train_data", "dataset_type", "train_num_samples", "shuffle_window", "batch_size", "seed"),
    *("aug_scale", "aug_flip", "model", "precision", "label_smoothing", "epochs", "warmup"),
    *("lr", "lr_scheduler", "beta1", "beta2", "eps", "wd", "grad_clip_norm"),
)


def named(config: TrainConfig) -> TrainConfig:
    """The configuration with a name: the given one, or one made of the time and the model."""
    if config.name is not None:
        return config
    if config.resume == "latest":
        raise ValueError("--resume latest needs --name, the run to go on with")
    model = Path(config.model).stem
    return replace(config, name=f"{datetime.now():%Y_%m_%d-%H_%M_%S}-{model}-b{config.batch_size}")


def build_loader(config: TrainConfig, model: Model, device: torch.device) -> TrainingLoader:
    """The training data as the configuration names it, in the model's image size.

    Raises:
        ValueError, FileNotFoundError: the data cannot be read, or fill no batch.
    """
    size = _image_size(model)
    count = config.train_num_samples or SCENES_EPOCH
    source = open_source(config.train_data, config.dataset_type, split="train", count=count)
    order = Order(source.counts, config.seed, config.shuffle_window)
    augmentation = Augmentation(size, scale=config.aug_scale, flip=config.aug_flip)
    return TrainingLoader(
        TrainingSamples(source, order, augmentation, model.tokenizer),
        config.batch_size,
        epoch_samples=config.train_num_samples,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )


def _image_size(model: Model) -> int:
    size = model.preprocess_config["size"]
    height, width = size if isinstance(size, tuple | list) else (size, size)
    if height != width:
        raise ValueError(f"the model takes images of {height} x {width}; only squares are read")
    return int(height)


def read_resumed(config: TrainConfig, run: Path) -> dict[str, Any] | None:
    """The checkpoint that `--resume` names; None for a new run.

    What differs from the run's beginning is noted on standard error.

    Raises:
        FileExistsError: a new run's folder is there already.
        FileNotFoundError, ValueError: there is no checkpoint, or it cannot be gone on from.
    """
    if config.resume is None:
        if run.exists():
            raise FileExistsError(
                f"{run} exists; choose another --name, or go on with it: --resume latest"
            )
        return None
    path = state.find_resume(config.resume, run / "checkpoints")
    resumed = checkpoint.read(path)
    if "data" not in resumed:
        raise ValueError(f"{path} holds weights but no training state; it cannot be resumed")
    for key in DEFINES_THE_RUN:
        before, value = getattr(from_dict(resumed["config"]), key), getattr(config, key)
        if before != value:
            flag = "--" + key.replace("_", "-")
            print(
                f"note: {flag} was {before} and is now {value}; "
                "the run goes on, but not as it would have",
                file=sys.stderr,
            )
    if resumed["config"]["batch_size"] != config.batch_size and resumed["data"]["position"]:
        raise ValueError(
            f"{path} stands inside an epoch of batches of {resumed['config']['batch_size']}; "
            f"--batch-size {config.batch_size} can only follow a whole epoch"
        )
    print(f"resuming {path} at step {resumed['step']}", file=sys.stderr)
    return resumed


def load_weights(model: nn.Module, state_dict: dict[str, Tensor], name: str) -> None:
    """Load a state dictionary; ValueError where it is not of this model."""
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint is not of model {name}: {error}") from error


def write_description(run: Path, config: TrainConfig, model: Model) -> None:
    """Write the model's description and the resolved configuration into the run's folder."""
    description = json.dumps(describe(config.model, model), indent=2)
    checkpoint.write_text(run / CONFIG_FILE, description + "\n")
    checkpoint.write_text(run / "config.yaml", to_yaml(config))


def announce(
    config: TrainConfig, device: torch.device, model: nn.Module, loader: TrainingLoader, step: int
) -> None:
    """Print the resolved configuration and what it amounts to, on standard error."""
    dtype = torch.bfloat16 if config.precision == "amp_bf16" else torch.float32
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        to_yaml(config).rstrip(),
        f"model: {parameters / 1e6:.1f} M parameters on {device}",
        f"batches: {config.batch_size} samples, {loader.steps_per_epoch} steps an epoch, "
        f"{config.epochs * loader.steps_per_epoch} in all, {step} done",
        *(
            f"loss: {name}: {status} ({what})"
            for name, status, what in explain("similarity", device, dtype)
        ),
    ]
    print("\n".join(lines), file=sys.stderr)
