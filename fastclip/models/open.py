"""Opening any model to use it: fastclip's runs, open_clip's models, and models of the hub."""

from pathlib import Path
from typing import NoReturn

import torch

from fastclip.bounded import read_object
from fastclip.models import checkpoint, description
from fastclip.models.build import load
from fastclip.models.clip import CONFIG_FILE, Model, build_checked, create, read_description

# open_clip's prefixes of what brings its own weights: a repository of the hub, a folder like one
_HUB, _LOCAL = "hf-hub:", "local-dir:"
_WITH_WEIGHTS = (_HUB, _LOCAL)


def is_run(name: str, pretrained: str | None = None) -> bool:
    """Whether `open_model` takes the name for a run of fastclip's, or for a checkpoint of one."""
    if pretrained is not None or name.startswith(_WITH_WEIGHTS) or name.endswith(".json"):
        return False
    return "/" in name or Path(name).exists() or checkpoint.is_best(name)


def open_model(
    name: str,
    device: str | torch.device = "cpu",
    pretrained: str | None = None,
    average: bool = False,
    trust_checkpoint: bool = False,
) -> Model:
    """A trained model, its evaluation transform and its tokenizer, in evaluation mode.

    Args:
        name: a run directory of `fastclip train` (its latest checkpoint; with "@best" behind it its
            best) or one of its checkpoints; with `pretrained` an
            open_clip model (`open_clip.list_models()`), one of fastclip's own configs or the
            path of a config file in open_clip's JSON format; or "hf-hub:ORG/NAME" or
            "local-dir:FOLDER", which hold open_clip_config.json and weights.
        device: where the parameters are put.
        pretrained: the name of open_clip weights for the model, or a checkpoint's file.
        average: take the averaged weights of a run with --ema.
        trust_checkpoint: whether DeepSpeed's files may be read, which can run any code.

    Returns:
        (model, preprocess, tokenizer), the model in evaluation mode.

    Raises:
        ValueError: a name is unknown, in which case near ones are suggested; the weights would be
            random, or of two origins; they do not fit, cannot be loaded, or have no average.
        FileNotFoundError: there is no such run, checkpoint or folder.

    Examples:
        >>> import tempfile, torch
        >>> from fastclip.models.clip import create
        >>> from fastclip.models.open import open_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     weights = f"{folder}/weights.pt"
        ...     torch.save(create("ViT-mini-16px").model.state_dict(), weights)
        ...     model, preprocess, tokenizer = open_model("ViT-mini-16px", pretrained=weights)
        >>> model.encode_text(tokenizer(["a red circle"])).shape
        torch.Size([1, 64])
    """
    if is_run(name, pretrained):
        return load(name, device, average=average, trust_checkpoint=trust_checkpoint)
    if average:
        raise ValueError(f"--average: {name} is not a run directory with averages; leave it out")
    if name.startswith(_WITH_WEIGHTS) and pretrained is not None:
        raise ValueError(f"{name} brings its own weights; leave --pretrained {pretrained} out")
    try:
        if name.startswith(_WITH_WEIGHTS):
            opened = _open_with_weights(name, device)
        elif pretrained is not None:
            opened = create(name, device, pretrained=pretrained)
        else:
            _refuse_random(name)
    # what open_clip makes of files that are missing or do not fit, and of an absent network
    except RuntimeError as error:
        raise ValueError(f"{name} cannot be opened: {error}") from error
    opened.model.eval()
    return opened


def _refuse_random(name: str) -> NoReturn:
    """Refuse a name without weights, known or not, and say what there is instead."""
    try:
        # no weights have this name, so that nothing is built
        create(name, pretrained="")
    except ValueError as error:
        raise ValueError(
            f"--model {name} is not a run directory, and without --pretrained TAG or FILE the "
            f"weights would be random: {error}"
        ) from error
    raise AssertionError("weights without a name")


def _open_with_weights(name: str, device: str | torch.device) -> Model:
    from open_clip import factory
    from open_clip.pretrained import download_pretrained_from_hf

    if name.startswith(_LOCAL):
        folder = Path(name.removeprefix(_LOCAL))
        described, found = read_description(folder), factory._find_checkpoint_in_dir(folder)
        if found is None:
            raise ValueError(
                f"{name} cannot be opened: it holds no weights (.safetensors, .bin or .pth)"
            )
        return build_checked(described, name, device, folder=folder, weights=Path(found))
    repository = name.removeprefix(_HUB)
    try:
        described = read_object(Path(download_pretrained_from_hf(repository, CONFIG_FILE)))
        # before the weights, which are large
        description.check(described.get("model_cfg"), name)
        weights = Path(download_pretrained_from_hf(repository))
    except FileNotFoundError as error:
        raise ValueError(f"{name} cannot be opened: {error}") from error
    return build_checked(described, name, device, weights=weights)
