"""What happens before the first step: names, data, resuming, the run's description."""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastclip.atomic import write_folder, write_text
from fastclip.data.augment import Augmentation
from fastclip.data.captions import CaptionSampling
from fastclip.data.labels import LabelSource
from fastclip.data.loader import TrainingLoader
from fastclip.data.options import DataOptions
from fastclip.data.order import Order
from fastclip.data.sources import open_source, shard_weights
from fastclip.data.templates import DEFAULT_TEMPLATES, read_lines
from fastclip.data.text_augment import TextAugmentation
from fastclip.data.training_samples import TrainingSamples
from fastclip.device import AUTOCAST_DTYPES
from fastclip.evaluate.zeroshot import class_embeddings, classes_of
from fastclip.models import checkpoint
from fastclip.models.build import describe, load
from fastclip.models.clip import CONFIG_FILE, Model
from fastclip.models.controls import Classifier
from fastclip.models.options import SystemOptions
from fastclip.models.system import System
from fastclip.ops.backend import explain
from fastclip.printable import note, printable
from fastclip.train.config import TrainConfig, from_dict, to_yaml
from fastclip.train.distributed import World

# What a resumed run must share with its beginning to continue exactly.
DEFINES_THE_RUN = (
    *("train_data", "train_data_upsampling_factors", "dataset_type", "csv_img_key"),
    *("csv_caption_key", "csv_separator", "image_root", "templates"),
    *("train_num_samples", "shuffle_window", "batch_size", "accum_freq", "seed"),
    *(
        "data_backend",
        "augment",
        "aug_scale",
        "strong_scale",
        "ema",
        "aug_flip",
        "captions",
        "sentence_sampling",
        "text_augment",
        "model",
        "precision",
        "siglip",
        "epochs",
        "warmup",
    ),
    *(
        "torchcompile",
        "loss_backend",
        "loss_dist_impl",
        "device",
        "deterministic",
        "deepspeed",
        "deepspeed_config",
    ),
    *("lr", "lr_scheduler", "beta1", "beta2", "eps", "wd", "grad_clip_norm"),
    *(field.name for field in fields(SystemOptions)),
)


def named(config: TrainConfig, world: World) -> TrainConfig:
    """The configuration with a name: the given one, or one made of the time and the model."""
    if config.name is not None:
        return config
    if config.resume == "latest":
        raise ValueError("--resume latest needs --name, the run to go on with")
    model = Path(config.model).stem
    name = f"{datetime.now():%Y_%m_%d-%H_%M_%S}-{model}-b{config.batch_size}"
    # the ranks' clocks may differ: all take the first one's
    return replace(config, name=world.gather(name)[0])


def class_names(config: TrainConfig) -> list[str]:
    """What a classifier is to tell apart: --classes, or what the data bring; else none.

    Raises:
        ValueError: a classifier is wanted, and there are no class names.
    """
    if config.objective != "classify":
        return []
    if config.classes is not None:
        return read_lines(Path(config.classes))
    found = classes_of(config.train_data, config.dataset_type)
    if found is None:
        raise ValueError(
            "--objective classify has no class names: give --classes FILE, or put classes.txt "
            "beside the data"
        )
    return found[0]


@torch.no_grad()
def begin_classifier(config: TrainConfig, model: Model, classes: list[str]) -> None:
    """Let a classifier begin as zero-shot classification by --finetune's model, if asked to.

    Raises:
        ValueError: that model's image features are not compared with text as they are.
    """
    if config.classifier != "zeroshot":
        return
    assert config.finetune is not None and isinstance(model.model, Classifier)
    source = load(config.finetune, trust_checkpoint=config.trust_checkpoint)
    if isinstance(source.model, System):
        raise ValueError(
            f"--classifier zeroshot: {config.finetune} is a {type(source.model).__name__}, which "
            "compares text with what its heads make of image features; give a run of --objective "
            "clip"
        )
    beside = classes_of(config.train_data, config.dataset_type)
    templates = beside[1] if beside else list(DEFAULT_TEMPLATES)
    if config.templates is not None:
        templates = read_lines(Path(config.templates))
    criterion = model.model.criterion
    criterion.weight.copy_(class_embeddings(source, classes, templates))
    assert criterion.logit_scale is not None
    criterion.logit_scale.copy_(source.model.get_parameter("logit_scale"))


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
    """ "dali" or "torchvision": what is asked for, or else DALI where there is a GPU for it.

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
    return "torchvision"


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


def read_resumed(
    config: TrainConfig, run: Path, world: World
) -> tuple[Path, dict[str, Any]] | tuple[None, None]:
    """The checkpoint that `--resume` names, and its content; None and None for a new run.

    A run that has not come to its first checkpoint begins anew. What differs from the run's
    beginning is noted on standard error.

    Raises:
        FileExistsError: --resume is not given and the run has checkpoints already.
        FileNotFoundError, ValueError: the checkpoint is not there, or cannot be gone on from.
    """
    folder = run / "checkpoints"
    # one rank looks, and all do as it says: others may see a shared folder late
    existing = world.gather(bool(checkpoint.named(folder, "")))[0]
    if config.resume is None:
        if existing:
            raise FileExistsError(
                f"{run} exists; choose another --name, or go on with it: --resume latest"
            )
        return None, None
    if config.resume == "latest" and not existing:
        _note(world, f"{folder} holds no checkpoint yet; the run begins")
        return None, None
    # found once: it reads every byte of a checkpoint
    found = checkpoint.find_latest(folder) if existing and world.is_first else None
    found_name = world.gather(found.name if found else "")[0]
    latest = folder / found_name if found_name else None
    path = latest if config.resume == "latest" else Path(config.resume)
    if path is None:
        raise FileNotFoundError(f"--resume latest: {folder} holds no whole checkpoint")
    checkpoint.require_trust(path, config.trust_checkpoint)
    if path != latest and checkpoint.sharded.is_sharded(path):
        checkpoint.sharded.require_whole(path)
    resumed = checkpoint.read(path)
    if "data" not in resumed:
        raise ValueError(
            f"{path} holds weights but no training state; begin with them: --pretrained {path}"
        )
    if latest is not None and checkpoint.step_of(latest) > resumed["step"]:
        raise ValueError(
            f"{run} has gone on to {latest.name}; to branch off from step {resumed['step']} "
            "choose another --name"
        )
    earlier = from_dict(resumed["config"])
    for key in DEFINES_THE_RUN:
        before, value = getattr(earlier, key), getattr(config, key)
        if before != value:
            flag = "--" + key.replace("_", "-")
            changed = f"{flag} was {before} and is now {value}"
            _note(world, f"{changed}; the run goes on, but not as it would have")
    batch = config.step_samples(world.size)
    if resumed["data"]["position"] % batch:
        raise ValueError(
            f"{path} stands at sample {resumed['data']['position']} of an epoch, which is no "
            f"multiple of {batch}, the samples of a step; keep --batch-size times --accum-freq "
            "times the number of processes, or resume from an epoch's end"
        )
    if world.size != len(resumed["rng"]):
        _note(
            world,
            f"{len(resumed['rng'])} processes before, {world.size} now: the same samples follow, "
            "but dropout draws other numbers and BatchNorm sees other parts of the batch",
        )
    _note(world, f"resuming {path} at step {resumed['step']}")
    return path, resumed


def check_same_data(resumed: dict[str, Any], loader: TrainingLoader, world: World) -> None:
    """Note it where the shards no longer hold as many samples as when the run began."""
    if resumed["data"]["counts"] != loader.identity["counts"]:
        _note(world, "the data's sample counts have changed; other samples follow than would have")


def _note(world: World, text: str) -> None:
    if world.is_first:
        note(text)


def write_description(
    run: Path, config: TrainConfig, model: Model, classes: Sequence[str] = ()
) -> None:
    """Write the model's description and the resolved configuration into the run's folder."""
    description = json.dumps(describe(config.model, model, config, classes), indent=2)
    write_text(run / CONFIG_FILE, description + "\n")
    write_text(run / "config.yaml", to_yaml(config))
    # a tokenizer from elsewhere must be at hand when the run is loaded
    if save := getattr(model.tokenizer, "save_pretrained", None):
        write_folder(run, lambda made: save(str(made)))


def announce(
    config: TrainConfig, world: World, model: nn.Module, loader: TrainingLoader, step: int
) -> None:
    """Print the resolved configuration and what it amounts to, on standard error."""
    dtype = AUTOCAST_DTYPES[config.precision] or torch.float32
    # sharded parameters are empty here, and know how large they are
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    processes = f" x {world.size} processes" if world.size > 1 else ""
    micro = f" in {config.accum_freq} micro-batches" if config.accum_freq > 1 else ""
    lines = [
        to_yaml(config).rstrip(),
        f"model: {parameters / 1e6:.1f} M parameters on {world.device}{processes}",
        f"batches: {config.step_samples(world.size)} samples{micro}, {loader.steps_per_epoch} "
        f"steps an epoch, {config.epochs * loader.steps_per_epoch} in all, {step} done",
    ]
    for name, status, description in explain(
        "sigmoid" if config.siglip else "similarity", world.device, dtype
    ):
        lines.append(f"loss: {name}: {status} ({description})")
    print(printable("\n".join(lines)), file=sys.stderr)
