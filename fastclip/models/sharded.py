"""Checkpoints of sharded training: folders of the ranks' files beside fastclip's own plain state.

`step_00000120/` holds each rank's share of optimizer and parameters, in DeepSpeed's files or in
those of torch's distributed checkpoints (`distributed_checkpoint.py`), and training.pt. The
manifest `step_00000120.json` beside it has the size and SHA-256 of every file; a folder without a
matching one is torn and never chosen.

DeepSpeed's own files are pickles: reading them runs what is in them. The others are not read so.
"""

import argparse
import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclip.atomic import describe, require_sums, write_text
from fastclip.bounded import read_object

TRAINING = "training.pt"
METADATA = ".metadata"
"""Of torch's distributed checkpoints: what is in which file."""
TEMPORARY_SUFFIX = ".universal"
"""Of a copy that is made to resume with another number of processes."""


def read_training(path: Path) -> dict[str, Any]:
    """The plain state in a checkpoint folder: all but parameters and optimizer; runs no code.

    Returns:
        What was given to `write`.

    Raises:
        FileNotFoundError, ValueError: the folder is not such a checkpoint, or damaged.
    """
    file = path / TRAINING
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: {path} is not a checkpoint of a DeepSpeed or FSDP2 run"
        )
    _require_described(path, file)
    try:
        content = dict(torch.load(file, map_location="cpu", weights_only=True))
    # torch raises many kinds of errors on damaged input
    except Exception as error:
        raise ValueError(f"{file} cannot be read as a checkpoint: {error}") from error
    # by the files: what is trusted, and what need not be, is decided by them
    if is_distributed(path) != ("fsdp" in content):
        raise ValueError(f"{path} mixes files of DeepSpeed and of FSDP2; take another checkpoint")
    return content


def verify(path: Path) -> bool:
    """Whether a checkpoint folder holds exactly what its manifest says; reads every byte."""
    try:
        files = read_object(path.with_suffix(".json"))["files"]
        return set(files) == set(files_of(path)) and all(
            describe(path / name) == expected for name, expected in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def require_whole(path: Path) -> None:
    """Refuse a folder that differs from the manifest beside it, where there is one.

    Raises:
        ValueError: it differs.
    """
    if path.with_suffix(".json").is_file() and not verify(path):
        raise ValueError(
            f"{path} does not match its manifest: it was damaged or changed since it was written; "
            "take another checkpoint"
        )


def _require_described(path: Path, file: Path) -> None:
    """Refuse one file of a folder that differs from the manifest, or else from its own checksums.

    Raises:
        ValueError: it differs.
    """
    manifest = path.with_suffix(".json")
    files = read_object(manifest).get("files") if manifest.is_file() else None
    if not isinstance(files, dict):
        require_sums(file)
    elif describe(file) != files.get(str(file.relative_to(path))):
        raise ValueError(
            f"{file} does not match the manifest {manifest.name}: it was damaged or changed since "
            "it was written; take another checkpoint"
        )


def remove(path: Path) -> None:
    """Delete a checkpoint folder and its manifest."""
    # the manifest goes first: never may it vouch for half a folder
    path.with_suffix(".json").unlink(missing_ok=True)
    shutil.rmtree(path)


def export(path: Path) -> dict[str, Tensor]:
    """The model's state dictionary, float32, on the CPU, under open_clip's names.

    Reads DeepSpeed's pickles, which may run code: only for folders that are trusted.

    Args:
        path: a checkpoint folder of any stage, or one that `to_universal` wrote.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    require_whole(path)
    state = read_training(path)["zero"]
    if is_universal(path):
        parameters = {name: _universal_parameter(path, name) for name in state["shapes"]}
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            parameters = get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=path.name)
    # DeepSpeed takes no 0-d parameters, so they were (1,) in training
    weights = {name: parameters[name].view(shape) for name, shape in state["shapes"].items()}
    return weights | state["buffers"]


def to_universal(path: Path, target: Path) -> None:
    """Convert a checkpoint folder to DeepSpeed's universal format, for any number of processes.

    Reads DeepSpeed's pickles, which may run code: only for folders that are trusted.

    Args:
        path: a checkpoint folder of any stage.
        target: folder to write; its name goes to `latest_universal` beside it, as DeepSpeed's own
            tools have it.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint.
        FileExistsError: the target exists.
    """
    from deepspeed.checkpoint import ds_to_universal

    require_whole(path)
    training = read_training(path)
    frozen = training["zero"].get("frozen", [])
    if training["zero"]["stage"] == 3 and frozen:
        raise ValueError(
            f"{path} is of ZeRO-3 with frozen parameters ({frozen[0]}, {len(frozen)} in all), of "
            "which DeepSpeed's universal form holds nothing: resume with as many processes as "
            "before, or with its weights: --pretrained"
        )
    if target.exists():
        raise FileExistsError(f"{target} exists; give another name")
    target.mkdir(parents=True)
    options = argparse.Namespace(
        input_folder=str(path),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        # DeepSpeed writes it through a link
        (target.parent / "latest_universal").unlink(missing_ok=True)
        # its progress is of no use among a run's
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(options)
        shutil.copy2(path / TRAINING, target)
        described = {name: describe(target / name) for name in files_of(target)}
        write_text(target.with_suffix(".json"), manifest_text(training["step"], described))
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def is_sharded(path: Path) -> bool:
    """Whether a path is such a folder."""
    return (path / TRAINING).is_file()


def is_distributed(path: Path) -> bool:
    """Whether a checkpoint folder is of FSDP2, in the format of torch's distributed checkpoints."""
    return (path / METADATA).is_file()


def is_universal(path: Path) -> bool:
    """Whether `to_universal` wrote this folder."""
    return (path / "zero" / "optimizer_state.pt").is_file()


def files_of(folder: Path) -> list[str]:
    """The files of a checkpoint folder by their paths in it, in order."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def manifest_text(step: int, files: dict[str, Any]) -> str:
    """The manifest of a folder whose files are described so."""
    return json.dumps({"step": step, "files": dict(sorted(files.items()))}, indent=1) + "\n"


def _universal_parameter(path: Path, name: str) -> Tensor:
    content = torch.load(path / "zero" / name / "fp32.pt", map_location="cpu", weights_only=False)
    return (content["param"] if isinstance(content, dict) else content).float()
