"""The training data as the configuration names it: views, captions, labels, the loader."""

from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from fastclip.data.augment import Augmentation
from fastclip.data.captions import CaptionSampling
from fastclip.data.labels import LabelSource
from fastclip.data.loader import TrainingLoader
from fastclip.data.order import Order
from fastclip.data.shards import ShardSource
from fastclip.data.sources import open_source, shard_weights
from fastclip.data.text_augment import TextAugmentation
from fastclip.data.training_samples import TrainingSamples
from fastclip.messages import note
from fastclip.models.clip import Model
from fastclip.models.options import SystemOptions
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World
from fastclip.train.options import TrainingDataOptions


def build_loader(
    config: TrainConfig, model: Model, classes: list[str], world: World
) -> TrainingLoader:
    """The training data as the configuration names it, in the model's image size.

    Raises:
        ValueError, FileNotFoundError: the data cannot be read, or fill no batch.
    """
    data, system, size = config.data, config.model, _image_size(model)
    language_free = system.views[1] == 0
    labels = None
    if classes:
        case = system.label_case_sensitive
        labels = LabelSource(classes, system.label_source, case_sensitive=case)
    needed = "cls" if labels and system.label_source == "cls" else "txt"
    source = open_source(
        data.train_data,
        data,
        split="train",
        count=data.train_num_samples,
        required=() if system.objective == "simclr" else (needed,),
        negatives=system.hard_negatives > 0,
        features=config.loss.distill_shards,
        by_row=config.loss.distill_embeddings is not None,
    )
    if isinstance(source, ShardSource):
        source.window = data.shuffle_window
    weights = shard_weights(source, data.train_data_upsampling_factors)
    order = Order(source.counts, config.optim.seed, data.shuffle_window, weights)
    if world.is_first and (data.train_num_samples or 0) > len(order):
        note(
            f"--train-num-samples is {data.train_num_samples} and the data have "
            f"{len(order)} samples: an epoch is these"
        )
    dali = choose_backend(data.data_backend, world.device) == "dali"
    samples = TrainingSamples(
        source,
        order,
        _views(data, system, size),
        None if language_free else model.tokenizer,
        None if language_free else _captions(data, system),
        labels=labels,
        pixels=not dali,
        group_by=None if config.loss.group_duplicates is None else config.loss.group_by,
        one_text=config.loss.distill_stored,
        features=config.loss.distill_shards,
    )
    shared: dict[str, Any] = {
        "batch_size": config.optim.batch_size,
        "micro_batches": config.optim.accum_freq,
        "epoch_samples": data.train_num_samples,
        "workers": data.loader_processes,
        "rank": world.rank,
        "world_size": world.size,
    }
    if dali:
        # imported where it is wanted: not everyone has it
        from fastclip.data.dali import DaliLoader

        return DaliLoader(samples, device=world.device, **shared)
    return TrainingLoader(samples, pin_memory=world.device.type == "cuda", **shared)


def require_same_data(loader: TrainingLoader, world: World) -> None:
    """Refuse ranks that see other data: each would count on another order of them.

    Samples would come twice or not at all, and where one rank makes more steps than another, it
    would wait for it without end.

    Raises:
        ValueError: two ranks differ; on all ranks.
    """
    samples, steps = len(loader.samples.order), loader.steps_per_epoch
    first, *others = world.gather((loader.identity["counts"], samples, steps))
    for rank, other in enumerate(others, 1):
        if other != first:
            raise ValueError(
                f"--train-data has {first[1]:,} samples in {first[2]:,} steps an epoch on rank 0, "
                f"and {other[1]:,} in {other[2]:,} steps on rank {rank}; give all ranks the same "
                "files, with the same sizes.json: a copy may be cut, see fastclip check-data"
            )


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


def _views(data: TrainingDataOptions, system: SystemOptions, size: int) -> tuple[Augmentation, ...]:
    """What the views of an image are: the one of --augment, then the strong ones."""
    presets = {"crop": Augmentation, "weak": Augmentation.weak, "strong": Augmentation.strong}
    first = presets[data.augment or ("weak" if system.strong else "crop")](size)
    flip = first.flip if data.aug_flip is None else data.aug_flip
    first = replace(first, scale=data.aug_scale or first.scale, flip=flip)
    strong = Augmentation.strong(size)
    strong = replace(strong, scale=data.strong_scale or strong.scale)
    if data.aug_blur is not None:
        # the weak views have none to change
        first = replace(first, blur=data.aug_blur) if first.blur else first
        strong = replace(strong, blur=data.aug_blur)
    weak = system.views[0] - system.strong
    return (first,) * weak + (strong,) * system.strong


def _captions(data: TrainingDataOptions, system: SystemOptions) -> CaptionSampling:
    made = {
        "none": TextAugmentation,
        "weak": TextAugmentation.weak,
        "strong": TextAugmentation.strong,
    }
    strong = made[data.strong_text_augment or "strong"]()
    views = (made[data.text_augment](), *(strong,) * (system.views[1] - 1))
    return CaptionSampling(
        weights=tuple(data.caption_weights.items()),
        sentences=data.sentence_sampling,
        views=tuple(
            replace(
                view,
                stop_words=data.stop_word_rate if view.stop_words else 0.0,
                clean=data.clean_captions,
            )
            for view in views
        ),
        redraw=data.caption_views == "multi",
        negatives=system.hard_negatives,
    )


def _image_size(model: Model) -> int:
    size = model.preprocess_config["size"]
    height, width = size if isinstance(size, tuple | list) else (size, size)
    if height != width:
        raise ValueError(f"the model takes images of {height} x {width}; only squares are read")
    return int(height)
