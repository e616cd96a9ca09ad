"""Models as folders of the Hugging Face Hub, which open_clip loads as they are."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclip.atomic import new_folder, write_text, writing
from fastclip.models import checkpoint, description
from fastclip.models.build import load
from fastclip.models.clip import (
    CONFIG_FILE,
    LM_CONFIG_FILE,
    SYSTEM,
    Model,
    build_checked,
    read_description,
    system_of,
)
from fastclip.models.compare import TEXTS, require_same, sample_images
from fastclip.models.language_model import LanguageModelCLIP, LanguageModelTower
from fastclip.models.system import PREFIX, System
from fastclip.models.weights import write_safetensors

# ORG/NAME, or a name of before there were organizations
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
# of normalized features; the same arithmetic in another order at most
_TOLERANCE = 1e-5
_INSTEAD = "`fastclip convert to-onnx` exports the model, and fastclip.load reads it"


def export_hub(
    source: Path,
    target: Path,
    *,
    card: str = "",
    repository: str | None = None,
    average: bool = False,
    trust_checkpoint: bool = False,
) -> None:
    """Write a run's model as a folder that open_clip loads as it is, and the Hub shows.

    `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads it, and `fastclip.load`. It
    holds the description with how images are prepared, the weights as safetensors, the tokenizer
    where it is one of Hugging Face's, and the card. Before the folder appears, open_clip has built
    the model from it, with the tokens of the run's tokenizer and its features to 1e-5.

    Args:
        source: a run directory (its latest checkpoint is used), RUN@best, or a checkpoint of a run.
        target: the folder to make.
        card: the text of README.md; none is written without.
        repository: ORG/NAME, where the folder will be published. A language model as text tower
            that was given as a folder is looked for there; by default in `target` itself.
        average: take the averaged weights of a run with --ema.
        trust_checkpoint: whether DeepSpeed's files may be read, which can run any code.

    Raises:
        FileNotFoundError: there is no run, or no checkpoint. FileExistsError: the target exists.
        ValueError: open_clip cannot express the model: it has heads of its own, or a language
            model that open_clip does not have; the message says what to use instead.
    """
    if repository is not None and not REPOSITORY.fullmatch(repository):
        raise ValueError(f"repository is {repository!r}; give ORG/NAME as on the Hugging Face Hub")
    with new_folder(target) as folder:
        model = load(source, average=average, trust_checkpoint=trust_checkpoint)
        run = checkpoint.run_of(source)
        described = read_description(run)
        described.pop(SYSTEM, None)
        weights = model.model.state_dict()
        if isinstance(model.model, System):
            raise ValueError(f"{source} {_what_is_left_out(model.model)}")
        if isinstance(model.model, LanguageModelCLIP):
            weights = _as_open_clip(model, described)
        text = described["model_cfg"]["text_cfg"]
        tower = getattr(model.model, "text", None)
        if text.get("hf_model_name"):
            name = system_of(run).get("options", {}).get("text_lm") or text["hf_model_name"]
            config = _language_model_config(tower)
            write_text(folder / LM_CONFIG_FILE, json.dumps(config, indent=2) + "\n")
            text["hf_model_name"] = repository or _reachable(name, target)
        if save := getattr(model.tokenizer, "save_pretrained", None):
            save(str(folder))
        write_text(folder / CONFIG_FILE, json.dumps(described, indent=2) + "\n")
        with writing(folder / checkpoint.HUB_WEIGHTS) as file:
            write_safetensors(file, weights)
        if card:
            write_text(folder / "README.md", card)
        _check(model, folder, source)


def _what_is_left_out(system: System) -> str:
    """Why open_clip has no such model, and what exports it."""
    kind = type(system).__name__
    if system.text_views == 0:
        return (
            f"has no text tower: {kind} was trained without language, and an open_clip model has "
            "two towers; `fastclip convert to-onnx` exports the image tower"
        )
    parts = {name.partition(".")[0] for name, _ in system.criterion.named_parameters()}
    left = ", ".join(f"{PREFIX}{part}" for part in sorted(parts))
    return (
        f"is more than an open_clip model, which has no place for what {kind} adds ({left}), and "
        "the towers without it give other features; `fastclip convert to-onnx` exports them with "
        "their heads, and fastclip.load reads the run"
    )


def _as_open_clip(model: Model, described: dict[str, Any]) -> dict[str, Tensor]:
    """The weights under the names of an open_clip model, which `described` then describes.

    Raises:
        ValueError: open_clip has no such text tower.
    """
    from open_clip.hf_configs import arch_dict

    tower: Any = model.model.text
    tokenizer: Any = model.tokenizer
    config = tower.language_model.model.config
    kind, padding = config.model_type, tokenizer.tokenizer.pad_token_id
    why = None
    if kind not in arch_dict:
        known = ", ".join(sorted(arch_dict))
        why = f"--text-lm is a {kind}, and open_clip takes {known} as text towers"
    elif config.is_decoder:
        why = f"--text-lm is a {kind} whose tokens see earlier ones only, as open_clip's do not"
    elif tower.pooling != "mean":
        why = f"--text-lm-pooling is {tower.pooling}, which open_clip does not have"
    elif padding is None or padding != config.pad_token_id:
        why = f"--text-lm pads with {padding} and its model expects {config.pad_token_id}"
    if why:
        raise ValueError(f"{why}; {_INSTEAD}")
    own = model.model.state_dict()
    weights = {name: value for name, value in own.items() if not name.startswith("text.")}
    for name, value in tower.language_model.plain_state().items():
        # of the first token, which nothing uses
        if not name.startswith("pooler."):
            weights[f"text.transformer.{name}"] = value
    weights["text.proj.weight"] = tower.projection.weight
    described["model_cfg"] = {**described["model_cfg"], "custom_text": True}
    described["model_cfg"]["text_cfg"] = {
        "hf_model_name": kind,
        "hf_tokenizer_name": kind,
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "linear",
        "context_length": tokenizer.context_length,
    }
    return weights


def _language_model_config(tower: Any) -> dict[str, Any]:
    """What config.json holds: the architecture of a language model, in float32."""
    if isinstance(tower, LanguageModelTower):
        config = tower.config_dict()
    else:
        config = json.loads(tower.config.to_json_string(use_diff=False))
    plain = description.harmless(config)
    for key in ("_name_or_path", "torch_dtype"):
        plain.pop(key, None)
    return {**plain, "dtype": "float32"}


def _reachable(name: str, target: Path) -> str:
    """Where open_clip finds a language model's architecture: on the Hub, or in the folder."""
    local = not REPOSITORY.fullmatch(name) or Path(name).exists()
    return str(target.absolute()) if local else name


def _check(model: Model, folder: Path, source: Path) -> None:
    """Have open_clip build what was written, and compare.

    Raises:
        ValueError: it differs.
    """
    described, weights = read_description(folder), folder / checkpoint.HUB_WEIGHTS
    built = build_checked(described, str(source), "cpu", folder=folder, weights=weights)
    built.model.eval()
    ours, theirs = model.tokenizer(TEXTS), built.tokenizer(TEXTS)
    # fastclip's language models are padded with numbers that are no token's
    config = getattr(getattr(built.model, "text", None), "config", None)
    padding = getattr(config, "pad_token_id", -1) if (ours < 0).any() else -1
    if (ours == padding).any() or not torch.equal(ours.where(ours >= 0, padding), theirs):
        raise ValueError(
            f"the tokenizer of {source} gives other tokens in open_clip, which marks no end of a "
            f"text itself; {_INSTEAD}"
        )
    images = sample_images(model, 2)
    with torch.inference_mode():
        for encode, mine, its in (("encode_image", images, images), ("encode_text", ours, theirs)):
            wanted = getattr(model.model, encode)(mine, normalize=True)
            found = getattr(built.model, encode)(its, normalize=True)
            require_same(found, wanted, _TOLERANCE, f"open_clip's {encode} of {source}")
