"""A teacher's features of a batch: of a model, of files, or of the shards themselves."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.data.samples import FEATURE_MEMBERS
from fastclip.data.shards import expand_shards
from fastclip.device import autocast
from fastclip.messages import note
from fastclip.models.build import build
from fastclip.models.clip import Model
from fastclip.models.options import SystemOptions
from fastclip.train.config import TrainConfig

IMAGE, TEXT = FEATURE_MEMBERS
# tokenized alike by tokenizers that are alike; short, since a student's context may be
_PROBES = ("a photo", "Red DOGS!", "café 3.5")


class Teacher(Protocol):
    """A teacher's normalized features.

    Attributes:
        logit_scale: exponentiated.
        is_live: whether it sees the images and texts of a batch, so that it needs one on the
            device; else it takes the loader's.
    """

    logit_scale: float
    is_live: bool

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Features by `IMAGE` and `TEXT`, (n, E) float32 each.

        Args:
            batch: of the loader; of a live teacher on the device, see
                `fastclip.train.engine.Engine`.
        """


def build_teacher(
    config: TrainConfig, student: Model, device: torch.device, samples: int
) -> Teacher | None:
    """The teacher that the flags name; None without one. The random streams stay as they are.

    Args:
        config: of the run.
        student: whose images and tokens a live teacher gets.
        device: where features are wanted.
        samples: that the data hold.

    Raises:
        ValueError, FileNotFoundError: the teacher cannot be had, or not with this student or data.
    """
    options = config.loss
    if options.distill_stored:
        assert options.distill_logit_scale is not None
        scale = options.distill_logit_scale
        if options.distill_embeddings is None:
            return ShardTeacher(scale, device)
        return StoredTeacher(options.distill_embeddings, scale, samples, device)
    if options.distill_model is None:
        return None
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        teacher = build(
            options.distill_model, SystemOptions(), device, pretrained=options.distill_pretrained
        )
    return LiveTeacher(teacher, student, config.model.precision, device)


class LiveTeacher:
    """A model that sees the batches that the student sees.

    Args:
        teacher: the model; it is frozen.
        student: what the batches are for.
        precision: of its towers.
        device: where it is.

    Raises:
        ValueError: it takes images of another size, or other tokens.
    """

    is_live = True

    def __init__(
        self, teacher: Model, student: Model, precision: str, device: torch.device
    ) -> None:
        self._model: Any = teacher.model.eval().requires_grad_(False)
        self._precision, self._device = precision, device
        own, given = teacher.preprocess_config, student.preprocess_config
        if _side(own) != _side(given):
            raise ValueError(
                f"--distill-model takes images of {_side(own)} pixels, the student of "
                f"{_side(given)}; store its features instead: fastclip embed, --distill-embeddings"
            )
        self._pad = _padding(teacher, student)
        mean, std, own_mean, own_std = (
            torch.tensor(which[name], device=device).view(3, 1, 1)
            for which in (given, own)
            for name in ("mean", "std")
        )
        # from the student's normalization to the teacher's
        self._factor, self._shift = std / own_std, (mean - own_mean) / own_std
        self.logit_scale = math.exp(self._model.get_parameter("logit_scale").item())

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Teacher`."""
        images = batch["images"][0] * self._factor + self._shift
        texts = F.pad(batch["texts"][0], (0, self._pad))
        with autocast(self._device, self._precision):
            found = self._model.encode_image(images), self._model.encode_text(texts)
        return _named(*found)


class StoredTeacher:
    """Features in .npy files, one row a sample in the order of the data.

    Args:
        patterns: of the images' and of the texts' files, e.g. "images-{000..041}.npy".
        logit_scale: of the teacher, exponentiated.
        samples: that the data hold.
        device: where features are wanted.

    Raises:
        ValueError, FileNotFoundError: files are no matrices of numbers, or of another number of
            rows than the data have samples.
    """

    is_live = False

    def __init__(
        self, patterns: Sequence[str], logit_scale: float, samples: int, device: torch.device
    ) -> None:
        self.logit_scale, self._device = logit_scale, device
        self._images, self._texts = map(_Rows, patterns)
        for pattern, rows in zip(patterns, (self._images, self._texts), strict=True):
            if len(rows) != samples:
                raise ValueError(
                    f"--distill-embeddings {pattern} has {len(rows)} rows, the training data "
                    f"{samples} samples; give a row for each, in the order of the data"
                )

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Teacher`."""
        index = batch["index"].numpy()
        found = (rows[index].to(self._device) for rows in (self._images, self._texts))
        return _named(*found)


class ShardTeacher:
    """Features that come with the samples of shards.

    Args:
        logit_scale: of the teacher, exponentiated.
        device: where features are wanted.
    """

    is_live = False

    def __init__(self, logit_scale: float, device: torch.device) -> None:
        self.logit_scale, self._device = logit_scale, device

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Teacher`."""
        found = (batch[name].to(self._device, non_blocking=True) for name in (IMAGE, TEXT))
        return _named(*found)


class _Rows:
    """The rows of some .npy files, one file after the other, read where they are asked for."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._files = []
        for path in expand_shards(pattern):
            try:
                found = np.load(path, mmap_mode="r", allow_pickle=False)
            except ValueError as error:
                raise ValueError(f"--distill-embeddings {path}: {error}") from error
            if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f":
                raise ValueError(f"--distill-embeddings {path} is no matrix of numbers, (rows, E)")
            self._files.append(found)
        if len({found.shape[1] for found in self._files}) != 1:
            raise ValueError(f"--distill-embeddings {pattern}: the files differ in width")
        self._starts = np.cumsum([0, *map(len, self._files)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: np.ndarray) -> Tensor:
        """Rows by their numbers, float32."""
        found = np.empty((len(index), self._files[0].shape[1]), np.float32)
        owner = np.searchsorted(self._starts, index, side="right") - 1
        for file in np.unique(owner):
            rows = owner == file
            found[rows] = self._files[file][index[rows] - self._starts[file]]
        finite = np.isfinite(found).all(axis=1)
        if not finite.all():
            row = index[int(np.argmin(finite))]
            raise ValueError(
                f"--distill-embeddings {self._pattern}: row {row} (from 0 on) is not finite, as "
                "fastclip embed writes it for an image that it could not read, but the sample can "
                "be read; write the features again"
            )
        return torch.from_numpy(found)


def _named(images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    pair = {IMAGE: images, TEXT: texts}
    return {name: F.normalize(features.float(), dim=-1) for name, features in pair.items()}


def _side(preprocess: Mapping[str, Any]) -> int:
    size = preprocess["size"]
    return int(size[0] if isinstance(size, tuple | list) else size)


def _padding(teacher: Model, student: Model) -> int:
    """Columns of zeros that make the teacher's tokens of the student's.

    Raises:
        ValueError: nothing does.
    """
    own, given = teacher.tokenizer(list(_PROBES)), student.tokenizer(list(_PROBES))
    missing = own.shape[1] - given.shape[1]
    if missing < 0 or not own.equal(F.pad(given, (0, missing))):
        raise ValueError(
            f"--distill-model reads other tokens than the student ({own.shape[1]} and "
            f"{given.shape[1]} a text); store its features instead: fastclip embed, "
            "--distill-embeddings"
        )
    if missing:
        note(f"the teacher reads texts as they are cut for the student, to {given.shape[1]} tokens")
    return missing
