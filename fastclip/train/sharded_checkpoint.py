"""Writing a checkpoint folder from all ranks: whole or not at all.

It is written under another name; when every rank has its files on the disk, the folder is renamed
and the manifest follows (`fastclip.models.sharded` has the format). All ranks must see one folder.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastclip.atomic import (
    describe,
    flush,
    partial_of,
    prepare_text,
    publish,
)
from fastclip.models import sharded
from fastclip.train.distributed import World


def write(
    path: Path, training: dict[str, Any], world: World, write_shares: Callable[[Path], list[Path]]
) -> None:
    """Write a checkpoint folder from all ranks, atomically.

    Args:
        path: without suffix; a folder of this name is replaced.
        training: the plain state, on the first rank; must hold "step".
        write_shares: writes this rank's files into the folder that it gets and returns their
            paths; takes part in every exchange between ranks even where its own writing fails with
            OSError.

    Raises:
        OSError: some rank could not write; raised on all ranks. `path` is as it was, or, where the
            renaming itself failed, gone; it never is half a checkpoint.
    """
    partial = partial_of(path)

    def together(action: Callable[[], Any]) -> Any:
        return _together(action, partial, world)

    def prepare() -> None:
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write_own() -> dict[str, Any]:
        # what a rank wrote it describes: listings of a shared folder may lag behind
        own = write_shares(partial)
        if world.is_first:
            torch.save(training, partial / sharded.TRAINING)
            own = [*own, partial / sharded.TRAINING]
        for file in own:
            flush(file)
        return {str(file.relative_to(partial)): describe(file) for file in own}

    def publish_all() -> None:
        if not world.is_first:
            return
        flush(partial)
        manifest = path.with_suffix(".json")
        files = {name: described for share in shares for name, described in share.items()}
        prepare_text(manifest, sharded.manifest_text(training["step"], files))
        if path.exists():
            sharded.remove(path)
        os.replace(partial, path)
        publish(manifest)

    together(prepare)
    shares = world.gather(together(write_own))
    together(publish_all)


def require_shapes(
    path: Path,
    model: str,
    saved: Mapping[str, Sequence[int]],
    own: Mapping[str, Sequence[int]],
) -> None:
    """Refuse a checkpoint whose parameters have other names or shapes than the model's own.

    Raises:
        ValueError: they differ.
    """
    if saved != own:
        raise ValueError(f"{path} is not of model {model}: its parameters differ")


def _together(action: Callable[[], Any], partial: Path, world: World) -> Any:
    """Act on every rank; where one fails, all raise and the unfinished folder goes."""
    result, failure = None, None
    try:
        result = action()
    # torch's own writer reports a full disk as RuntimeError
    except (OSError, RuntimeError) as error:
        failure = f"{type(error).__name__}: {error}"
    failures = world.gather(failure)
    if not any(failures):
        return result
    if world.is_first:
        shutil.rmtree(partial, ignore_errors=True)
    world.barrier()
    failed = (f"rank {rank}: {text}" for rank, text in enumerate(failures) if text)
    raise OSError("; ".join(failed))
