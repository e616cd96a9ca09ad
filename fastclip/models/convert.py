"""Checkpoints in and out: between fastclip's runs and open_clip's files."""

import json
from pathlib import Path
from typing import Any

import torch

from fastclip.atomic import write_text, writing
from fastclip.models import checkpoint, sharded
from fastclip.models.clip import CONFIG_FILE, create, describe, read_description, system_of
from fastclip.models.weights import write_safetensors


def export_open_clip(
    source: Path, target: Path, *, average: bool = False, trust_checkpoint: bool = False
) -> Path | None:
    """Write the weights of a run as a checkpoint that open_clip loads, of any of its towers.

    The architecture goes beside it, e.g. of `model.pt` to `model.json`, and open_clip reads both:
    `open_clip.add_model_config("model.json")`, `open_clip.create_model("model", "model.pt")`.

    Args:
        source: a run directory (its latest checkpoint is used) or one of its checkpoints.
        target: the file to write, safetensors if it ends in .safetensors, which `fastclip.load`
            reads without the run, else torch's format; the architecture is written if the source
            is in a run.
        average: take the averaged weights of a run with --ema.
        trust_checkpoint: whether DeepSpeed's files may be read, which can run any code.

    Returns:
        The file of the architecture; None where the source is in no run.

    Raises:
        FileNotFoundError: there is no checkpoint. FileExistsError: one of the files is there.
        ValueError: the checkpoint is not trusted, has no average, or is not an open_clip model.
    """
    described = target.with_suffix(".json")
    if there := [path for path in (target, described) if path.exists()]:
        raise FileExistsError(f"{there[0]} exists; choose another name")
    if target == described:
        raise ValueError(f"{target} is for weights; choose a name that ends in .safetensors or .pt")
    path = checkpoint.resolve(source)
    run = checkpoint.run_of(path)
    if (run / CONFIG_FILE).is_file() and system_of(run):
        raise ValueError(
            f"{source} is more than an open_clip model, which has no place for its heads or "
            "its language model; fastclip.load reads it"
        )
    content = checkpoint.read(path)
    kept: dict[str, Any] = {name: content[name] for name in ("epoch", "name") if name in content}
    weights = checkpoint.read_weights(path, average=average, trust=trust_checkpoint)
    target.parent.mkdir(parents=True, exist_ok=True)
    facts = {name: str(value) for name, value in kept.items()}
    if (run / CONFIG_FILE).is_file():
        facts[CONFIG_FILE] = json.dumps(read_description(run))
    with writing(target) as file:
        if target.suffix == ".safetensors":
            write_safetensors(file, weights, facts)
        else:
            torch.save({**kept, "state_dict": weights}, file)
    if not (run / CONFIG_FILE).is_file():
        return None
    architecture = read_description(run).get("model_cfg")
    write_text(described, json.dumps(architecture, indent=2) + "\n")
    return described


def import_open_clip(source: Path, model: str, run: Path) -> Path:
    """Make a run directory of an open_clip checkpoint, for `fastclip.load`, eval and embed.

    Args:
        source: a checkpoint of the open_clip trainer, or a bare state dictionary.
        model: the name of its architecture.
        run: the folder to make.

    Returns:
        The checkpoint inside the run.

    Raises:
        ValueError: the weights are not of this architecture. FileExistsError: the run exists.
    """
    if run.exists():
        raise FileExistsError(f"{run} exists; choose another folder")
    built = create(model, pretrained=str(source))
    folder = run / "checkpoints"
    folder.mkdir(parents=True)
    write_text(run / CONFIG_FILE, json.dumps(describe(model, built), indent=2) + "\n")
    write_text(run / "config.yaml", f"model: {json.dumps(model)}\n")
    path = folder / "imported.pt"
    checkpoint.write(path, {"step": 0, "epoch": 0, "state_dict": built.model.state_dict()})
    return path


def export_universal(source: Path, target: Path, *, trust_checkpoint: bool = False) -> None:
    """Convert a checkpoint of DeepSpeed's to its universal format, for any number of processes.

    Args:
        source: a run directory (its latest checkpoint is used) or one of its checkpoints.
        target: the folder to write; `--resume` takes it.
        trust_checkpoint: see `export_open_clip`; it has to be trusted.

    Raises:
        FileNotFoundError: there is no checkpoint. FileExistsError: the target is there already.
        ValueError: the checkpoint is not a folder of DeepSpeed's, or is not trusted.
    """
    path = checkpoint.resolve(source)
    if not sharded.is_sharded(path) or sharded.is_distributed(path):
        raise ValueError(f"{path} is not DeepSpeed's: it resumes on any number of processes")
    checkpoint.require_trust(path, trust_checkpoint)
    sharded.to_universal(path, target)
