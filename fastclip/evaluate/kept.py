"""Features of a data set that are computed once and kept, and computed again when they must be."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from fastclip.atomic import write_text
from fastclip.bounded import read_object
from fastclip.data.faults import FaultLog
from fastclip.data.samples import Source
from fastclip.evaluate.embed import Embedding, features_identity, image_batches
from fastclip.evaluate.features import Encoding
from fastclip.messages import counted, logger
from fastclip.models.clip import Model

# faults that may be gone at the next try, although the data are the same
_PASSING = {"shard not fetched", "shard not readable", "unreadable image file"}


@dataclass(frozen=True)
class KeptFeatures:
    """Image features of a data set in a file.

    features: (N, D) float32, normalized, a memory map; rows of unreadable images are NaN.
    readable: the number of the others.
    """

    features: NDArray[np.float32]
    readable: int


def keep_features(
    model: Model, source: Source, file: Path, encoding: Encoding, *, name: str
) -> KeptFeatures:
    """The features of a source's images, out of a file if it has them.

    Beside FILE.npy, FILE.json says what they are of: the model and its weights, the preprocessing,
    the precision, the data's files with their sizes and times, and fastclip's version. If any of
    these is different now, all is computed again, and the log says what has changed; also after
    faults that may be gone, such as a shard that could not be fetched. Stopped, the computation is
    resumed. Of several processes that want the same file one computes it.

    Args:
        file: ends in .npy; its folder is made.
        name: of the model, as the user gave it.

    Raises:
        ValueError: no image can be read, or the model's features are not finite.
        OSError: the file cannot be written, or the disk has no room for it.
    """
    identity = features_identity(model, name, encoding.precision) | {"data": source.digest()}
    count = sum(source.counts)
    described = file.with_suffix(".json")
    _make_folder(file.parent)
    with _alone(file.parent):
        before = _read(described)
        changed = [part for part, value in identity.items() if before.get(part) != value]
        if not changed and (features := _load(file, count)) is not None:
            return KeptFeatures(features, before["readable"])
        if not os.access(file.parent, os.W_OK):
            raise _refused(file.parent, "it is not writable")
        _announce(file, count, changed if before else [])
        # what described the old features must never be beside the new ones
        described.unlink(missing_ok=True)
        faults = FaultLog()
        embedding = Embedding(file, count, identity, faults)
        embedding.discard_other()
        batches = partial(
            image_batches,
            model,
            source,
            batch_size=encoding.batch_size,
            workers=encoding.workers,
            precision=encoding.precision,
            faults=faults,
        )
        embedding.run(batches, progress=encoding.progress)
        if faults.counts:
            logger.warning(f"left out: {faults.report()}")
        features = open_memmap(file, mode="r")
        readable = int(np.isfinite(features[:, 0]).sum())
        if not readable:
            raise ValueError(f"none of {count:,} images can be read: {faults.summary()}")
        if not _PASSING & faults.counts.keys():
            write_text(described, json.dumps({**identity, "readable": readable}, indent=1) + "\n")
    return KeptFeatures(features, readable)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(folder, str(error.strerror)) from error


def _refused(folder: Path, why: str) -> OSError:
    return OSError(f"{folder} cannot hold features: {why}; give another folder with --features")


def _announce(file: Path, count: int, changed: list[str]) -> None:
    if changed:
        are = " and ".join([", ".join(changed[:-1]), changed[-1]] if changed[1:] else changed)
        logger.info(f"changed since {file} was made: {are}; its features are computed again")
    else:
        logger.info(f"features of {counted(count, 'image')}: computed now, then kept in {file}")


def _read(described: Path) -> dict[str, Any]:
    """What the features are said to be of; empty where nothing is, or nothing that can be read."""
    try:
        content = read_object(described)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content.get("readable"), int) else {}


def _load(file: Path, count: int) -> NDArray[np.float32] | None:
    """The features; None where they are damaged or missing."""
    # a named pipe, which a run from elsewhere may hold, would be waited for
    if not file.is_file():
        return None
    try:
        features = open_memmap(file, mode="r")
    except (OSError, ValueError, EOFError):
        return None
    whole = features.ndim == 2 and len(features) == count and features.dtype == np.float32
    return features if whole else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder; another process that wants it waits."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # some file systems have no locks; there, two processes must not be started at once
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info(f"another process computes features in {folder}: waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
