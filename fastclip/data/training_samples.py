"""What is trained on at each position: a pure function of (seed, epoch, position).

A batch is never short: a sample that cannot be read is replaced by one that a hash of
(seed, epoch, position) chooses, and the fault is reported with the batch.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastclip.data.augment import Augmentation, Hue, draw_view
from fastclip.data.captions import CaptionSampling
from fastclip.data.index import Fault
from fastclip.data.jpeg import decode_pixels, portable, trim
from fastclip.data.labels import LabelSource
from fastclip.data.order import DEFAULT_WINDOW, Order, hash64
from fastclip.data.samples import (
    FEATURE_MEMBERS,
    Sample,
    Source,
    UnreadableSample,
    decode,
)
from fastclip.data.tokens import Tokenizer, tokenize
from fastclip.data.views import render_view
from fastclip.data.watchdog import ReadingBoard

REPLACEMENT_ATTEMPTS = 32
GroupBy = Literal["caption", "image"]


class TrainingSamples(Dataset[dict[str, Any]]):
    """The sample at (epoch, position), augmented and tokenized; a pure function of both.

    Args:
        source: where samples come from.
        order: which one is where.
        views: what each view of an image may be; one or more.
        tokenizer: makes (n, L) int64 of n texts; None for batches without texts, of samples that
            need no caption.
        captions: how texts are drawn; by default one of the sample's, as it is.
        labels: where labels come from; None for batches without.
        pixels: make the views here. Otherwise a batch carries the images' bytes and the drawn
            parameters, for `fastclip.data.dali`.
        group_by: "caption" or "image": samples with the same first text, or the same image file,
            have one group; None for batches without groups.
        one_text: refuse samples with several captions: stored text features are of one each.
        features: whether batches have a teacher's features, those that `source` reads.
        hue: "yiq" turns colors about the gray axis, as DALI does; "hsv" is torchvision's.

    Examples:
        >>> from fastclip.data.augment import Augmentation
        >>> from fastclip.data.order import Order
        >>> from fastclip.data.sources import open_source
        >>> from fastclip.data.training_samples import TrainingSamples
        >>> source = open_source("scenes", split="train", count=100)
        >>> samples = TrainingSamples(source, Order(source.counts, seed=0), Augmentation(32), None)
        >>> samples[0, 7]["images"][0].shape  # epoch 0, position 7
        torch.Size([3, 32, 32])
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        views: Augmentation | Sequence[Augmentation],
        tokenizer: Tokenizer | None,
        captions: CaptionSampling | None = None,
        *,
        labels: LabelSource | None = None,
        pixels: bool = True,
        group_by: GroupBy | None = None,
        one_text: bool = False,
        features: bool = False,
        hue: Hue = "yiq",
    ) -> None:
        self.source = source
        self.order = order
        self.views = (views,) if isinstance(views, Augmentation) else tuple(views)
        self.tokenizer = tokenizer
        self.captions = captions or CaptionSampling()
        self.labels = labels
        self.pixels = pixels
        self.group_by = group_by
        self.one_text = one_text
        self.features = features
        self._width: int | None = None
        self.hue: Hue = hue
        self.board = ReadingBoard()
        # where each shard's samples begin among all of them
        self._starts = np.cumsum(order.counts) - order.counts

    def __getitem__(self, where: tuple[int, int]) -> dict[str, Any]:
        return self._read(*where, decode_pixels if self.pixels else portable)

    def decoded(self, epoch: int, position: int) -> dict[str, Any]:
        """A sample as without pixels, but with an image that Pillow has decoded to its end.

        Args:
            epoch: from 0 on.
            position: in the epoch.
        """
        return self._read(epoch, position, lambda sample: decode(sample.image, sample.where))

    def _read(
        self, epoch: int, position: int, prepare: Callable[[Sample], Tensor | Image.Image | bytes]
    ) -> dict[str, Any]:
        """The sample, or the first readable one of those that a hash chooses in its place.

        Raises:
            ValueError: 32 in a row cannot be read; or a sample's captions or features are not what
                distillation needs.
        """
        faults: list[Fault] = []
        candidate = position
        for attempt in range(REPLACEMENT_ATTEMPTS):
            shard, index = self.order.locate(epoch, candidate)
            try:
                with self.board.reading(shard):
                    sample = self.source.read(shard, index, pixels=False)
                    image = prepare(sample)
                texts = self._texts(sample, self._stream(epoch, position, 5))
                faults += self.source.drain_faults()
                prepared = self._prepared(sample, image, epoch, position)
                prepared["index"] = torch.tensor(int(self._starts[shard]) + index)
                if self.group_by is not None:
                    texts["group"] = torch.tensor(self._group(sample, texts))
                if self.features:
                    texts |= self._features(sample)
                return {**prepared, **texts, "faults": faults}
            except UnreadableSample as error:
                faults.append(error.fault)
            candidate = self._replacement(epoch, position, attempt)
        cause = "the data is damaged beyond skipping"
        if faults[-1].kind == "shard not fetched":
            cause = "if the server cannot be reached, resume the run when it can"
        raise ValueError(
            f"{REPLACEMENT_ATTEMPTS} samples in a row could not be read, the last: {faults[-1]}; "
            f"{cause}"
        )

    def _replacement(self, epoch: int, position: int, attempt: int) -> int:
        """The position whose sample is tried next: near, as those shards are in use anyway.

        Later attempts go anywhere: all that is near may be unreadable.
        """
        order, drawn = self.order, hash64(self.order.seed, epoch, position, 3, attempt)
        window = order.window or DEFAULT_WINDOW
        if attempt >= REPLACEMENT_ATTEMPTS // 2:
            return drawn % len(order)
        first = position - position % window
        return first + drawn % min(window, len(order) - first)

    def _texts(self, sample: Sample, rng: random.Random) -> dict[str, Any]:
        """What a batch has of the sample's texts."""
        if self.tokenizer is None:
            return {}
        if self.one_text and len(sample.texts) > 1:
            raise ValueError(
                f"{sample.where or sample.key} has {len(sample.texts)} captions, and the teacher's "
                "stored features are of one text a sample; leave all captions but that one out, or "
                "give --distill-model"
            )
        drawn = self.captions.draw(sample, rng)
        tokens, cut = tokenize(self.tokenizer, [*drawn.texts, *drawn.negatives])
        count = len(drawn.texts)
        texts = {"texts": list(tokens[:count]), "captions": drawn.texts, "cut": cut}
        if drawn.negatives:
            texts |= {"negatives": tokens[count:], "false_captions": drawn.negatives}
        return texts

    def _features(self, sample: Sample) -> dict[str, Tensor]:
        """A teacher's features of the sample, (E,) each, of one width in all samples."""
        where = sample.where.rpartition(".")[0]
        for name, member in FEATURE_MEMBERS.items():
            if name not in sample.features:
                raise ValueError(
                    f"{where}.{member} is missing: --distill-shards reads a teacher's features of "
                    "every sample; write shards with fastclip embed shards, or give "
                    "--distill-embeddings"
                )
            width = len(sample.features[name])
            self._width = self._width or width
            if width != self._width:
                raise ValueError(
                    f"{where}.{member} has {width} numbers, other features {self._width}; write "
                    "all shards with one model: fastclip embed shards"
                )
        return {name: torch.from_numpy(vector) for name, vector in sample.features.items()}

    def _group(self, sample: Sample, texts: dict[str, Any]) -> int:
        """The same for samples of one group, and of others by a chance of 2^-64 a pair."""
        if self.group_by == "caption":
            content = texts["captions"][0].encode()
        else:
            content = sample.encoded or decode(sample.image, sample.where).tobytes()
        return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)

    def _prepared(
        self, sample: Sample, image: Tensor | Image.Image | bytes, epoch: int, position: int
    ) -> dict[str, Any]:
        """What a batch has of all but the sample's texts."""
        width, height = sample.image.size
        allowed = None
        if sample.meaning and (self.tokenizer is not None or self.labels is not None):
            # the model receives what is said: no view may make it false
            allowed = partial(sample.meaning.is_true_of, hue=self.hue)
        draws = [
            draw_view(view, width, height, self._stream(epoch, position, 2, number), allowed)
            for number, view in enumerate(self.views)
        ]
        prepared: dict[str, Any] = {
            "key": sample.key,
            "position": position,
            "params": torch.stack([draw.encode(width, height) for draw in draws]),
        }
        if self.labels is not None:
            label = self.labels.draw(sample, self._stream(epoch, position, 6))
            prepared["label"] = torch.tensor(label)
        if isinstance(image, Tensor):
            prepared["images"] = [
                render_view(image, draw, view.size, self.hue)
                for draw, view in zip(draws, self.views, strict=True)
            ]
            return prepared
        if isinstance(image, Image.Image):
            image, draws = trim(image, draws)
        prepared["encoded"] = torch.frombuffer(bytearray(image), dtype=torch.uint8)
        prepared["draws"] = draws
        return prepared

    def _stream(self, epoch: int, position: int, *purpose: int) -> random.Random:
        return random.Random(hash64(self.order.seed, epoch, position, *purpose))


def grouped_pairs(group: Tensor) -> int:
    """How many pairs of different samples have one group, of their ids."""
    return sum(count * (count - 1) // 2 for count in Counter(group.tolist()).values())
