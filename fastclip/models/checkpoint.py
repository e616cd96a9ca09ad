"""Checkpoint files: written whole or not at all, and read without running code.

`step_00000120.pt` is written under another name, flushed to the disk and renamed; then the
manifest `step_00000120.json` with its size and SHA-256 follows in the same way. A file without a
matching manifest is torn and never chosen. Training with DeepSpeed or FSDP2 leaves folders instead,
see `sharded.py`.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclip.atomic import (
    PARTIAL_SUFFIX,
    create,
    describe,
    partial_of,
    prepare_text,
    publish,
    require_sums,
    write_text,
)
from fastclip.bounded import read_object
from fastclip.models import sharded

# of averaged weights, beside "state_dict"; timm's name
AVERAGE = "state_dict_ema"
# what a loss remembers of each sample
MEMORY = "loss_memory"
# names of the parameters that the run trains
TRAINED = "trained"
_NO_AVERAGE = "holds no averaged weights: its run had no --ema"
_MANIFEST_KEYS = {"file", "bytes", "sha256"}
# in a run directory, names its best checkpoint; and the end of a path that means that one
BEST_FILE, BEST_SUFFIX = "best.json", "@best"
# open_clip's name of the weights in a folder of the Hugging Face Hub
HUB_WEIGHTS = "open_clip_model.safetensors"


def write(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically, then its manifest.

    Args:
        path: ends in .pt; a file of this name is replaced.
        content: tensors, numbers, strings, lists and dictionaries of them; must hold "step".

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is then as it was.
    """
    partial, manifest = partial_of(path), path.with_suffix(".json")
    try:
        with create(partial) as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:
                # torch's writer hides what the file said
                raise OSError(str(error.__context__ or error)) from error
            file.flush()
            os.fsync(file.fileno())
        description = {"file": path.name, "step": content["step"], **describe(partial)}
        prepare_text(manifest, json.dumps(description, indent=1) + "\n")
        # the old manifest goes first: never may it vouch for the new file
        manifest.unlink(missing_ok=True)
        os.replace(partial, path)
        publish(manifest)
    except BaseException:
        partial.unlink(missing_ok=True)
        partial_of(manifest).unlink(missing_ok=True)
        raise


def find_latest(folder: Path) -> Path | None:
    """The whole checkpoint with the highest step, or None; torn ones are skipped with a warning."""
    steps = steps_of(folder)
    for path in sorted(steps, key=lambda path: (steps[path], path.name), reverse=True):
        if _is_whole(path):
            return path
        warnings.warn(f"{path} does not match its manifest; it is skipped", stacklevel=2)
    return None


def steps_of(folder: Path, prefix: str = "") -> dict[Path, int]:
    """The step of each checkpoint whose name begins so; those without a manifest are left out."""
    found = {}
    for path in named(folder, prefix):
        try:
            found[path] = step_of(path)
        except (OSError, ValueError, KeyError, TypeError):
            warnings.warn(
                f"{path} has no valid manifest: it was not written completely", stacklevel=3
            )
    return found


def _is_whole(path: Path) -> bool:
    if path.is_dir():
        return sharded.verify(path)
    manifest = read_object(path.with_suffix(".json"))
    # a difference in size is found without reading
    if path.stat().st_size != manifest.get("bytes"):
        return False
    return describe(path)["sha256"] == manifest.get("sha256")


def named(folder: Path, prefix: str) -> list[Path]:
    """The checkpoints whose names begin so, with or without a manifest, in order of their names.

    They are files (.pt), or folders where the training was DeepSpeed's or FSDP2's.
    """
    found = [p for p in folder.glob(f"{prefix}*") if p.suffix == ".pt" or p.is_dir()]
    # others are being written, or converted for the time of a start
    finished = [
        p for p in found if not {PARTIAL_SUFFIX, sharded.TEMPORARY_SUFFIX} & set(p.suffixes)
    ]
    return sorted(finished)


def run_of(path: Path) -> Path:
    """The run directory of a run directory or of a checkpoint inside it; see `best_named`.

    Of a folder as of the Hugging Face Hub, and of the weights in it, it is that folder.
    """
    path = best_named(path)
    if path.name == HUB_WEIGHTS:
        return path.parent
    return path.parent.parent if _is_checkpoint(path) else path


def _is_checkpoint(path: Path) -> bool:
    return not path.is_dir() or sharded.is_sharded(path)


def resolve(path: Path) -> Path:
    """The checkpoint that a run directory (its latest), RUN@best or a checkpoint's own path means.

    Of a folder as of the Hugging Face Hub, it is the weights in it.

    Raises:
        FileNotFoundError: the run has no whole checkpoint, or none that is known to be the best.
    """
    path = best_named(path)
    if _is_checkpoint(path):
        return path
    if (path / HUB_WEIGHTS).is_file():
        return path / HUB_WEIGHTS
    latest = find_latest(path / "checkpoints")
    if latest is None:
        raise FileNotFoundError(f"{path / 'checkpoints'} holds no whole checkpoint")
    return latest


def is_best(path: str | Path) -> bool:
    """Whether a path means the best checkpoint of a run, as RUN@best."""
    return str(path).endswith(BEST_SUFFIX) and not Path(path).exists()


def best_named(path: Path) -> Path:
    """The checkpoint that RUN@best means; any other path as it is.

    Raises:
        FileNotFoundError: no checkpoint of the run is known to be the best.
        ValueError: the file that says which one is damaged.
    """
    if not is_best(path):
        return path
    run = path.with_name(path.name.removesuffix(BEST_SUFFIX))
    file = run / BEST_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: no checkpoint of {run} is known to be the best, which needs "
            f"--val-data or --best-metric in training; give {run} for its newest"
        )
    name = read_object(file).get("checkpoint")
    # a name alone: a run from elsewhere may not lead out of its own directory
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{file} names no checkpoint: {name!r}; give one of {run / 'checkpoints'}")
    return run / "checkpoints" / name


def write_best(run: Path, path: Path | None, **why: str | float | None) -> None:
    """Note which checkpoint of a run is the best, and why; None: none is known to be.

    Raises:
        OSError: it could not be written; what was noted before still is.
    """
    if path is None:
        (run / BEST_FILE).unlink(missing_ok=True)
    else:
        described = json.dumps({"checkpoint": path.name, **why}, indent=1)
        write_text(run / BEST_FILE, described + "\n")


def remove(path: Path) -> None:
    """Delete a checkpoint and its manifest."""
    if path.is_dir():
        sharded.remove(path)
        return
    path.unlink()
    path.with_suffix(".json").unlink(missing_ok=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint that has a manifest."""
    return int(read_object(path.with_suffix(".json"))["step"])


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; never runs code from the file.

    Of a folder it is the part without parameters and optimizer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or no checkpoint of fastclip.
    """
    if sharded.is_sharded(path):
        return sharded.read_training(path)
    content = _load(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is not a checkpoint: it has no 'state_dict'")
    for key, kind in (("zero", "a DeepSpeed"), ("fsdp", "an FSDP2")):
        if key in content:
            raise ValueError(
                f"{path} is a file with the state of {kind} folder; give the folder itself"
            )
    return content


def read_weights(path: Path, *, average: bool = False, trust: bool = False) -> dict[str, Tensor]:
    """The state dictionary in a checkpoint of fastclip or open_clip, or a bare one.

    Names lose the "module." that data-parallel training puts in front.

    Args:
        average: the averaged weights beside them.
        trust: whether a folder of DeepSpeed's may be read, which can run code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds no weights or no average, or is not trusted.
    """
    if sharded.is_distributed(path):
        return _read_distributed(path, average)
    if average:
        content = read(path)
        if AVERAGE not in content:
            raise ValueError(f"{path} {_NO_AVERAGE}")
        return content[AVERAGE]
    if sharded.is_sharded(path):
        require_trust(path, trust)
        return sharded.export(path)
    content = _load(path)
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"{path} holds no state dictionary")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _read_distributed(path: Path, average: bool) -> dict[str, Tensor]:
    """As `read_weights`, of a folder of FSDP2's, which need not be trusted."""
    # its imports take a while
    from fastclip.models import distributed_checkpoint

    sharded.require_whole(path)
    saved = read(path)["fsdp"]
    if average and not saved["averaged"]:
        raise ValueError(f"{path} {_NO_AVERAGE}")
    wanted = distributed_checkpoint.AVERAGE if average else distributed_checkpoint.MODEL
    return distributed_checkpoint.export(path, wanted) | saved["buffers"]


def require_trust(path: Path, trust: bool) -> None:
    """Refuse a folder of DeepSpeed's that is not trusted.

    Raises:
        ValueError: it is not.
    """
    if sharded.is_sharded(path) and not sharded.is_distributed(path) and not trust:
        raise ValueError(
            f"{path} is DeepSpeed's: its files are pickles, which can run arbitrary code when they "
            "are loaded; if you trust its origin, add --trust-checkpoint (trust_checkpoint=True)"
        )


def require_whole(path: Path) -> None:
    """Refuse a file that differs from the manifest beside it, or else from its own checksums.

    Torch checks no sums: a flipped bit would be another weight.

    Raises:
        ValueError: it differs.
    """
    beside = path.with_suffix(".json")
    # another file of this name, such as a model's config, vouches for nothing
    if not (beside.is_file() and _MANIFEST_KEYS & read_object(beside).keys()):
        require_sums(path)
    elif not _is_whole(path):
        raise ValueError(
            f"{path} does not match its manifest {beside.name}: it was damaged or changed since it "
            f"was written; take another checkpoint, or delete {beside.name} if the change is yours"
        )


def _load(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    require_whole(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    # the loaders raise many kinds of errors on damaged input
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
