"""The training data as the configuration names it: views, captions, labels, the loader."""

import sys
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from fastclip.data.augment import Augmentation
from fastclip.data.captions import CaptionSampling
from fastclip.data.labels import LabelSource
from fastclip.data.loader import TrainingLoader
from fastclip.data.options import DataOptions
from fastclip.data.order import Order
from fastclip.data.sources import open_source, shard_weights
from fastclip.data.text_augment import TextAugmentation
from fastclip.data.training_samples import TrainingSamples
from fastclip.models.clip import Model
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World


def build_loader(
    config: TrainConfig, model: Model, classes: list[str], world: World
) -> TrainingLoader:
    """The training data as the configuration names it, in the model's image size.

    Raises:
        ValueError, FileNotFoundError: the data cannot be read, or fill no batch.
    """
    size = _image_size(model)
    options = DataOptions.of(config)
    language_free = config.views[1] == 0
    labels = None
    if classes:
        case = config.label_case_sensitive
        labels = LabelSource(classes, config.label_source, case_sensitive=case)
    needed = "cls" if labels and config.label_source == "cls" else "txt"
    source = open_source(
        config.train_data,
        options,
        split="train",
        count=config.train_num_samples,
        required=() if config.objective == "simclr" else (needed,),
    )
    weights = shard_weights(source, config.train_data_upsampling_factors)
    order = Order(source.counts, config.seed, config.shuffle_window, weights)
    if world.is_first and (config.train_num_samples or 0) > len(order):
        print(
            f"note: --train-num-samples is {config.train_num_samples} and the data have "
            f"{len(order)} samples: an epoch is these",
            file=sys.stderr,
        )
    dali = choose_backend(config.data_backend, world.device) == "dali"
    samples = TrainingSamples(
        source,
        order,
        _views(config, size),
        None if language_free else model.tokenizer,
        None if language_free else _captions(config),
        labels=labels,
        pixels=not dali,
    )
    shared: dict[str, Any] = {
        "batch_size": config.batch_size,
        "micro_batches": config.accum_freq,
        "epoch_samples": config.train_num_samples,
        "workers": config.workers,
        "rank": world.rank,
        "world_size": world.size,
    }
    if dali:
        # imported where it is wanted: not everyone has it
        from fastclip.data.dali import DaliLoader

        return DaliLoader(samples, device=world.device, **shared)
    return TrainingLoader(samples, pin_memory=world.device.type == "cuda", **shared)


def choose_backend(wanted: str, device: torch.device) -> str:
    """ "dali" or "cpu": what is asked for, or else DALI where there is a GPU for it.

    Raises:
        ModuleNotFoundError: DALI is asked for and not installed.
    """
    if wanted == "dali":
        import_module("nvidia.dali")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        # one for another CUDA than is here does not load
        with suppress(ImportError):
            import_module("nvidia.dali")
            return "dali"
    return "cpu"


def _views(config: TrainConfig, size: int) -> tuple[Augmentation, ...]:
    """What the views of an image are: the one of --augment, then the strong ones."""
    presets = {"crop": Augmentation, "weak": Augmentation.weak, "strong": Augmentation.strong}
    first = presets[config.augment or ("weak" if config.strong else "crop")](size)
    flip = first.flip if config.aug_flip is None else config.aug_flip
    first = replace(first, scale=config.aug_scale or first.scale, flip=flip)
    strong = Augmentation.strong(size)
    strong = replace(strong, scale=config.strong_scale or strong.scale)
    weak = config.views[0] - config.strong
    return (first,) * weak + (strong,) * config.strong


def _captions(config: TrainConfig) -> CaptionSampling:
    made = {
        "none": TextAugmentation,
        "weak": TextAugmentation.weak,
        "strong": TextAugmentation.strong,
    }
    further = config.views[1] - 1
    return CaptionSampling(
        weights=tuple(DataOptions.of(config).caption_weights.items()),
        sentences=config.sentence_sampling,
        views=(made[config.text_augment](), *(TextAugmentation.strong(),) * further),
        negatives=config.hard_negatives,
    )


def _image_size(model: Model) -> int:
    size = model.preprocess_config["size"]
    height, width = size if isinstance(size, tuple | list) else (size, size)
    if height != width:
        raise ValueError(f"the model takes images of {height} x {width}; only squares are read")
    return int(height)
