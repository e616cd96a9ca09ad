"""Features of a whole data set in a .npy file, resumable."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from fastclip._version import __version__
from fastclip.atomic import write_text
from fastclip.bounded import read_object
from fastclip.data.faults import FaultLog
from fastclip.data.loader import EvaluationSamples, evaluation_loader
from fastclip.data.regular import digest_of
from fastclip.data.samples import Source
from fastclip.device import autocast
from fastclip.evaluate.features import evaluating, normalized, require_finite
from fastclip.models.clip import Model

SAVE_EVERY_BATCHES = 20


@dataclass
class Embedding:
    """A feature file in the making: `out.npy.partial`, and beside it how far it has come.

    Args:
        output: the .npy file, (count, D) float32; it appears when all rows are there.
        count: rows.
        identity: what the features are of; a started file of something else is not resumed.
        faults: of the rows; those of a started file are added to it.
    """

    output: Path
    count: int
    identity: dict[str, Any]
    faults: FaultLog = field(default_factory=FaultLog)

    @property
    def partial(self) -> Path:
        """The unfinished features."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def progress(self) -> Path:
        """Rows done and the identity, as JSON."""
        return self.output.with_name(self.output.name + ".progress.json")

    def done(self) -> int:
        """Rows that a former run has written.

        Raises:
            ValueError: they are features of something else.
        """
        if not (self.progress.is_file() and self.partial.is_file()):
            return 0
        state = read_object(self.progress)
        begun = state.get("identity")
        if begun != self.identity or "done" not in state:
            raise ValueError(
                f"{self.partial} was begun with {begun}, now it is {self.identity}; "
                "delete it, or choose another output"
            )
        return int(state["done"]) if self._is_whole() else 0

    def _is_whole(self) -> bool:
        """Whether the unfinished file can be read; a damaged one is begun again."""
        try:
            rows = open_memmap(self.partial, mode="r")
        except (OSError, ValueError, EOFError):
            return False
        return rows.ndim == 2 and len(rows) == self.count and rows.dtype == np.float32

    def discard_other(self) -> None:
        """Delete what a former run has begun, if it is of something else."""
        try:
            self.done()
        except ValueError:
            self.partial.unlink(missing_ok=True)
            self.progress.unlink(missing_ok=True)

    def run(self, batches: Callable[[int], Iterator[tuple[int, Tensor]]], progress: bool) -> Path:
        """Write the rows that are missing, then give the file its name.

        Args:
            batches: from a first row on, yields (row, features (B, D)) in order.
            progress: whether to draw a bar.

        Raises:
            OSError: the disk has no room for all rows; nothing is left behind.
        """
        done = self.done()
        if done:
            self.faults.counts.update(read_object(self.progress).get("faults", {}))
        if self.partial.is_symlink():
            raise ValueError(f"{self.partial} is a link, which is never written through; delete it")
        rows: np.memmap | None = open_memmap(self.partial, mode="r+") if done else None
        self.output.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=self.count, initial=done, unit="row", disable=None if progress else True)
        for number, (start, features) in enumerate(batches(done), 1):
            if rows is None:
                self.partial.unlink(missing_ok=True)
                shape = (self.count, features.shape[1])
                rows = open_memmap(self.partial, mode="w+", dtype=np.float32, shape=shape)
                self._reserve()
            done = start + len(features)
            rows[start:done] = features.numpy()
            bar.update(len(features))
            if number % SAVE_EVERY_BATCHES == 0:
                self._save(rows, done)
        bar.close()
        if rows is not None:
            self._save(rows, done)
        del rows
        self.partial.rename(self.output)
        self.progress.unlink()
        return self.output

    def _reserve(self) -> None:
        """Take the room on the disk now: without it a write to mapped memory kills the process."""
        if not hasattr(os, "posix_fallocate"):
            return
        size = self.partial.stat().st_size
        try:
            with self.partial.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                # a file system that reserves nothing
                return
            self.partial.unlink()
            raise OSError(
                f"{self.partial} needs {size:,} bytes: {error.strerror}; make room"
            ) from error

    def _save(self, rows: np.memmap, done: int) -> None:
        # rows first: the count may never be ahead of them
        rows.flush()
        state = {"done": done, "identity": self.identity, "faults": self.faults.counts}
        write_text(self.progress, json.dumps(state))


def features_identity(model: Model, name: str, precision: str) -> dict[str, Any]:
    """What a model's features depend on besides the data.

    Args:
        name: of the model, as the user gave it.
        precision: of the towers.
    """
    return {
        "model": name,
        "weights": fingerprint(model.model),
        "preprocessing": preprocessing_digest(model.preprocess),
        "precision": precision,
        "version": __version__,
    }


def preprocessing_digest(preprocess: Callable[[Any], Tensor]) -> str:
    """A digest of what a transform makes of a fixed image: which pixels a tower sees."""
    shape = (600, 900, 3)
    noise = np.random.PCG64(0).random_raw(np.prod(shape) // 8).view(np.uint8).reshape(shape)
    pixels = preprocess(Image.fromarray(noise)).contiguous()
    return digest_of([tuple(pixels.shape), pixels.dtype, pixels.numpy().tobytes()])


def fingerprint(model: torch.nn.Module) -> str:
    """A digest of every parameter and buffer: which weights features were made with."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@torch.no_grad()
def image_batches(
    model: Model,
    source: Source,
    start: int,
    *,
    batch_size: int,
    workers: int,
    precision: str,
    faults: FaultLog,
) -> Iterator[tuple[int, Tensor]]:
    """(row, normalized features) of a source's samples in order; NaN rows for unreadable ones.

    Raises:
        ValueError: features of a readable image are not finite.
    """
    device = next(model.model.parameters()).device
    samples = EvaluationSamples(source, model.preprocess)
    loader = evaluation_loader(
        Subset(samples, range(start, len(samples))),
        workers,
        batch_size=batch_size,
        collate_fn=list,
    )
    towers: Any = model.model
    with evaluating(model.model), autocast(device, precision):
        # asked of an image of zeros: the first batches may hold none that is readable
        blank = model.preprocess(Image.new("RGB", (8, 8)))[None].to(device)
        width = towers.encode_image(blank).shape[1]
        for batch in loader:
            readable = [i for i, sample in enumerate(batch) if "image" in sample]
            faults.add([fault for sample in batch for fault in sample["faults"]])
            rows = torch.full((len(batch), width), torch.nan)
            if readable:
                images = torch.stack([batch[i]["image"] for i in readable]).to(device)
                encoded = normalized(towers.encode_image(images))
                require_finite(encoded, [batch[i]["key"] for i in readable])
                rows[readable] = encoded
            yield start, rows
            start += len(batch)
