"""Two-tower models by name, from the open_clip registry and the configs shipped here."""

import copy
import difflib
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastclip.bounded import read_object
from fastclip.models import description
from fastclip.models.checkpoint import read_weights, require_whole

CONFIG_FILE = "open_clip_config.json"
# of a language model of Hugging Face's, its architecture
LM_CONFIG_FILE = "config.json"
# in there, beside what open_clip reads: what makes a system of the towers
SYSTEM = "fastclip_cfg"

# Zhai et al. 2023, section 3.2: so that the many negatives do not drown the start.
SIGLIP = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}

_CONFIGS = Path(__file__).with_name("configs")
# open_clip has two tokenizers by parts of names, of which this has none
_NAME = "fastclip-description"
_COUNT = ".num_batches_tracked"
# open_clip's registry and the level of logging are the process's, not a thread's
_BUILDING = threading.RLock()
# names in a message
_SHOWN = 3


class Model(NamedTuple):
    """What a trained or new model is used with, in open_clip's order."""

    model: nn.Module
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]

    @property
    def preprocess_config(self) -> dict[str, Any]:
        """Size, mean, std, interpolation and resize mode of the images the model was made for."""
        import open_clip

        return open_clip.get_model_preprocess_cfg(self.model)


def create(
    name: str,
    device: str | torch.device = "cpu",
    *,
    pretrained: str | None = None,
    siglip: bool = False,
) -> Model:
    """A new model with random or pretrained weights.

    Args:
        name: an open_clip model (`open_clip.list_models()`), one of fastclip's own configs,
            or the path of a config file in open_clip's JSON format.
        device: where the parameters live.
        pretrained: the name of open_clip weights for this model, or the path of a checkpoint of
            open_clip or fastclip; None for random weights.
        siglip: whether the model has a logit bias, and begins with SigLIP's scale and bias.

    Returns:
        The model (called with images and texts it gives a dictionary of normalized
        image_features and text_features and the exponentiated logit_scale), its evaluation
        transform and its tokenizer.

    Raises:
        ValueError: a name is unknown, in which case near ones are suggested, or the weights do
            not fit the model, or cannot be downloaded.
    """
    import open_clip

    with _BUILDING:
        # each time it is added, open_clip reads all of its configurations again
        if _CONFIGS not in open_clip.factory._MODEL_CONFIG_PATHS:
            open_clip.add_model_config(_CONFIGS)
    if name.endswith(".json"):
        # not by path, which open_clip would read anew
        with _registered(_config_of(name), Path(name).stem) as registered:
            return _create(registered, device, pretrained, siglip)
    return _create(name, device, pretrained, siglip)


def _config_of(file: str) -> dict[str, Any]:
    if not Path(file).is_file():
        raise FileNotFoundError(f"model config {file} does not exist")
    return description.check(read_object(Path(file)), file)


def _create(name: str, device: str | torch.device, pretrained: str | None, siglip: bool) -> Model:
    import open_clip

    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise ValueError(f"model {name!r} is unknown{hint}")
    options = SIGLIP if siglip else None
    if pretrained is None:
        return _build(name, device, options=options)
    if Path(pretrained).is_file():
        built = _build(name, device, options=options)
        load_weights(built.model, read_weights(Path(pretrained)), pretrained)
        return built
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        known = ", ".join(tags) or "none"
        raise ValueError(
            f"pretrained {pretrained!r} is neither a file nor weights of {name} (known: {known})"
        )
    try:
        return _build(name, device, pretrained, options)
    # what open_clip raises where a download fails
    except RuntimeError as error:
        raise ValueError(
            f"{name} with the weights {pretrained} cannot be loaded: {error}"
        ) from error


def describe(name: str, model: Model) -> dict[str, Any]:
    """The model's full description as open_clip's `open_clip_config.json` holds it."""
    import open_clip

    if name.endswith(".json"):
        model_config = _config_of(name)
    else:
        model_config = open_clip.get_model_config(name)
    if getattr(model.model, "logit_bias", None) is not None:
        # without it the model would be built without a bias
        model_config = {**SIGLIP, **(model_config or {})}
    return {
        "model_cfg": model_config,
        "preprocess_cfg": model.preprocess_config,
    }


def system_of(run: Path) -> dict[str, Any]:
    """What a run's description says beside open_clip's keys; nothing for an open_clip model."""
    return read_description(run).get(SYSTEM, {})


def read_description(folder: Path) -> dict[str, Any]:
    """The checked content of a folder's `open_clip_config.json`.

    Raises:
        ValueError: it is damaged, or has a key that is not allowed.
        FileNotFoundError: there is none.
    """
    path = folder / CONFIG_FILE
    described = read_object(path)
    # a description of a system's parts alone builds no model
    if described.get("model_cfg") is not None:
        description.check(described["model_cfg"], str(path))
    return described


def build_described(run: Path, device: str | torch.device) -> Model:
    """The model that `open_clip_config.json` in a run directory describes, with random weights.

    Raises:
        ValueError: the description is damaged, or has a key that is not allowed.
        FileNotFoundError: there is none.
    """
    return build_checked(read_description(run), str(run / CONFIG_FILE), device, folder=run)


def build_checked(
    described: dict[str, Any],
    origin: str,
    device: str | torch.device,
    *,
    folder: Path | None = None,
    weights: Path | None = None,
) -> Model:
    """The model of a description; nothing is read again, so what was checked is what is built.

    Args:
        described: what an `open_clip_config.json` holds.
        origin: the file, for messages.
        device: where the parameters are put.
        folder: where tokenizers of Hugging Face's kind are, and a language model's config.json
            where there is one; None for those that are named.
        weights: a checkpoint file of open_clip; None for random weights.

    Raises:
        ValueError: the description is damaged, or has a key that is not allowed.
    """
    config = copy.deepcopy(description.check(described.get("model_cfg"), origin))
    preprocess = described.get("preprocess_cfg") or {}
    if not isinstance(preprocess, dict):
        raise ValueError(f"{origin}: preprocess_cfg must be an object")
    if folder is not None and config["text_cfg"].get("hf_tokenizer_name"):
        config["text_cfg"]["hf_tokenizer_name"] = str(folder)
    if folder is not None and config["text_cfg"].get("hf_model_name"):
        beside = folder / LM_CONFIG_FILE
        if beside.is_file():
            description.require_harmless(read_object(beside), str(beside))
            config["text_cfg"]["hf_model_name"] = str(folder)
    if weights is not None:
        require_whole(weights)
    with _registered(config) as name:
        return _build(name, device, None if weights is None else str(weights), None, preprocess)


@contextmanager
def _registered(config: dict[str, Any], name: str = _NAME) -> Iterator[str]:
    """The name under which open_clip has a configuration inside, in place of its own."""
    from open_clip import factory

    with _BUILDING:
        before = dict(factory._MODEL_CONFIGS)
        factory._MODEL_CONFIGS[name] = config
        try:
            yield name
        finally:
            factory._MODEL_CONFIGS.clear()
            factory._MODEL_CONFIGS.update(before)


def load_weights(model: nn.Module, state_dict: dict[str, Tensor], origin: str) -> None:
    """Load weights, all of them.

    Args:
        origin: where they are from, for the message.

    Raises:
        ValueError: they are of another architecture; the message says which names differ.
    """
    own = model.state_dict()
    # a frozen batch normalization counts no batches: no difference in architecture
    counted = {n: v for n, v in own.items() if n.endswith(_COUNT)}
    kept = {n: v for n, v in state_dict.items() if n in own or not n.endswith(_COUNT)}
    problem = _differences(own, {**counted, **kept})
    if problem:
        raise ValueError(f"{origin} does not fit the model: {problem}")
    model.load_state_dict({**counted, **kept})


def _differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How weights differ in names and shapes from those wanted, in a line; empty if they do not."""
    shared = wanted.keys() & found.keys()
    others = sorted(name for name in shared if wanted[name].shape != found[name].shape)
    shapes = [f"{n} {tuple(found[n].shape)} for {tuple(wanted[n].shape)}" for n in others]
    kinds = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": shapes,
    }
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{', ...' if names[_SHOWN:] else ''}"
        for kind, names in kinds.items()
        if names
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """open_clip warns that the weights are random, which is what is wanted here."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(disabled)


def _build(
    name: str,
    device: str | torch.device,
    pretrained: str | None = None,
    options: dict[str, float] | None = None,
    preprocess_config: dict[str, Any] | None = None,
) -> Model:
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    # the size is the tower's
    forced = {key: value for key, value in (preprocess_config or {}).items() if key != "size"}
    with _BUILDING, _without_warnings(), description.without_remote_code():
        model = open_clip.create_model(
            name,
            pretrained,
            device=device,
            output_dict=True,
            load_weights=pretrained is not None,
            pretrained_text=False,
            force_preprocess_cfg=forced,
            **(options or {}),
        )
        tokenizer = open_clip.get_tokenizer(name)
    preprocess = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    return Model(model, image_transform_v2(preprocess, is_train=False), tokenizer)
