"""Whole models by their options: made for training, described, and loaded again."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fastclip.bounded import parse_json
from fastclip.models import checkpoint
from fastclip.models.classifier import Classifier
from fastclip.models.clip import (
    CONFIG_FILE,
    SYSTEM,
    Model,
    build_checked,
    build_described,
    create,
    load_weights,
    read_description,
    system_of,
)
from fastclip.models.clip import describe as describe_towers
from fastclip.models.image_tower import load_image_tower
from fastclip.models.language_model import LanguageModelTower, with_language_model
from fastclip.models.lock import lock_towers
from fastclip.models.options import SystemOptions
from fastclip.models.rocket import Rocket
from fastclip.models.simclr import SimCLR
from fastclip.models.system import PREFIX, System
from fastclip.models.uniclip import UniClip
from fastclip.models.weights import read_facts


def build(
    name: str,
    options: SystemOptions,
    device: str | torch.device = "cpu",
    *,
    pretrained: str | None = None,
    siglip: bool = False,
    classes: Sequence[str] = (),
    trust_checkpoint: bool = False,
) -> Model:
    """A model for training: towers, and around them the system that the options name.

    Args:
        name, device, siglip: of the towers, see `fastclip.models.clip.create`.
        pretrained: as there; or a run directory or a checkpoint, of the towers or the whole system.
        options: what to make of them.
        classes: names of a classifier's classes.
        trust_checkpoint: whether DeepSpeed's files may be read, which can run any code.

    Raises:
        ValueError: a name is unknown, weights do not fit, or options exclude each other.
        FileNotFoundError: a file that they name does not exist.
    """
    # weights of a language model's tower or of a system find their places only in the whole
    given = checkpoint.best_named(Path(pretrained)) if pretrained else None
    begin = given if given and given.exists() else None
    base = create(name, device, pretrained=None if begin else pretrained, siglip=siglip)
    if options.text_lm is not None:
        base = with_language_model(base, options)
    lock_towers(base.model, options)
    width = describe_towers(name, base)["model_cfg"]["embed_dim"]
    built = _wrap(base, width, device, options, classes)
    if begin:
        weights = checkpoint.read_weights(checkpoint.resolve(begin), trust=trust_checkpoint)
        whole = any(name.startswith(PREFIX) for name in weights)
        load_weights(built.model if whole else base.model, weights, str(begin))
    if options.finetune is not None:
        path = checkpoint.resolve(Path(options.finetune))
        load_image_tower(base.model, checkpoint.read_weights(path, trust=trust_checkpoint))
    return built


def _wrap(
    base: Model,
    width: int,
    device: str | torch.device,
    options: SystemOptions,
    classes: Sequence[str],
) -> Model:
    """The system around towers whose features are so wide; the towers themselves for CLIP."""
    system: System
    if options.objective == "clip":
        return base
    if options.objective == "classify":
        system = Classifier.of(base.model, width, options, len(classes))
    elif options.objective == "simclr":
        system = SimCLR.of(base.model, width, options)
    elif options.objective == "uniclip":
        system = UniClip.of(base.model, width, options)
    else:
        system = Rocket.of(base.model, width, options)
    return base._replace(model=system.to(device))


def describe(
    name: str, model: Model, options: SystemOptions, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """What `load` builds the model from: open_clip's description, and beside it the system's."""
    described = describe_towers(name, model)
    own: dict[str, Any] = {}
    # how training began is no part of the model
    lasting = options.lasting()
    if options.objective != "clip" or options.text_lm is not None:
        own["options"] = {f.name: getattr(lasting, f.name) for f in fields(SystemOptions)}
        own["classes"] = list(classes)
    tower = getattr(getattr(model.model, "towers", model.model), "text", None)
    if isinstance(tower, LanguageModelTower):
        own["language_model"] = tower.config_dict()
    return {**described, SYSTEM: own} if own else described


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    average: bool = False,
    trust_checkpoint: bool = False,
) -> Model:
    """A trained model, its evaluation transform and its tokenizer.

    Args:
        path: a run directory as `fastclip train` writes it (its latest whole checkpoint is taken),
            or one checkpoint file inside it; RUN@best for the best by the metric of its
            --best-metric; a folder of `fastclip convert to-hub`, or a .safetensors file of
            `fastclip convert to-open-clip`.
        device: where the parameters are put.
        average: take the averaged weights of a run with --ema.
        trust_checkpoint: whether DeepSpeed's files may be read, which can run any code.

    Returns:
        (model, preprocess, tokenizer), the model in evaluation mode.

    Raises:
        FileNotFoundError: there is no run, no checkpoint or no model description there.
        ValueError: the checkpoint is not of the described model, is not trusted, or has no average.

    Examples:
        >>> import fastclip, json, pathlib, tempfile
        >>> from fastclip.models import checkpoint, clip
        >>> new = clip.create("ViT-mini-16px")
        >>> with tempfile.TemporaryDirectory() as folder:  # with what `fastclip train` writes
        ...     run = pathlib.Path(folder)
        ...     described = json.dumps(clip.describe("ViT-mini-16px", new))
        ...     _ = (run / "open_clip_config.json").write_text(described)
        ...     (run / "checkpoints").mkdir()
        ...     content = {"state_dict": new.model.state_dict(), "step": 1}
        ...     checkpoint.write(run / "checkpoints" / "step_1.pt", content)
        ...     model, preprocess, tokenizer = fastclip.load(run)
        >>> model.encode_text(tokenizer(["a red circle"])).shape
        torch.Size([1, 64])
    """
    path = Path(path)
    run = checkpoint.run_of(path)
    if alone := _described_inside(path):
        built = build_checked(alone, str(path), device)
        weights = checkpoint.read_weights(path, average=average)
        load_weights(built.model, weights, str(path))
        built.model.eval()
        return built
    if not (run / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{run / CONFIG_FILE} does not exist: {path} is not a run directory of fastclip train"
        )
    found = checkpoint.resolve(path)
    state = checkpoint.read_weights(found, average=average, trust=trust_checkpoint)
    built = build_described(run, device)
    own = system_of(run)
    if own:
        plain = own["options"].items()
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain}
        options = SystemOptions(**values)
        if "language_model" in own:
            built = with_language_model(built, options, described=run)
        width = read_description(run)["model_cfg"]["embed_dim"]
        built = _wrap(built, width, device, options, own["classes"])
    load_weights(built.model, state, str(found))
    built.model.eval()
    return built


def _described_inside(path: Path) -> dict[str, Any]:
    """The description in a file of safetensors that is in no run; nothing of other paths."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    if (checkpoint.run_of(path) / CONFIG_FILE).is_file():
        return {}
    text = read_facts(path).get(CONFIG_FILE, "{}")
    described = parse_json(text, str(path))
    return described if isinstance(described, dict) else {}


def class_names(path: Path) -> list[str]:
    """The classes of a run's classifier, in the order of its logits; none of others."""
    return list(system_of(checkpoint.run_of(path)).get("classes", []))
