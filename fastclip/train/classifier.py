"""What --objective classify begins with: its class names, and zero-shot weights."""

from pathlib import Path

import torch

from fastclip.data.templates import DEFAULT_TEMPLATES, read_lines
from fastclip.evaluate.zeroshot import class_embeddings, classes_of
from fastclip.models.build import load
from fastclip.models.classifier import Classifier
from fastclip.models.clip import Model
from fastclip.models.system import System
from fastclip.train.config import TrainConfig


def class_names(config: TrainConfig) -> list[str]:
    """A classifier's classes: --classes, or what the data bring; else none.

    Raises:
        ValueError: a classifier is wanted, and there are no class names.
    """
    if config.model.objective != "classify":
        return []
    if config.model.classes is not None:
        return read_lines(Path(config.model.classes))
    found = classes_of(config.data.train_data, config.data.dataset_type)
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
    if config.model.classifier != "zeroshot":
        return
    assert config.model.finetune is not None and isinstance(model.model, Classifier)
    criterion = model.model.criterion
    # many prompts, for which a GPU is meant
    device, trust = criterion.weight.device, config.checkpoint.trust_checkpoint
    source = load(config.model.finetune, device, trust_checkpoint=trust)
    if isinstance(source.model, System):
        raise ValueError(
            f"--classifier zeroshot: {config.model.finetune} is a {type(source.model).__name__}, "
            "which compares text with what its heads make of image features; give a run of "
            "--objective clip"
        )
    beside = classes_of(config.data.train_data, config.data.dataset_type)
    templates = beside[1] if beside else list(DEFAULT_TEMPLATES)
    if config.data.templates is not None:
        templates = read_lines(Path(config.data.templates))
    criterion.weight.copy_(class_embeddings(source, classes, templates))
    assert criterion.logit_scale is not None
    criterion.logit_scale.copy_(source.model.get_parameter("logit_scale"))
