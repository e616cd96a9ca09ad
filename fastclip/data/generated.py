"""Samples that are made when they are asked for: what the embedded worlds share, and noise."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from fastclip.data.index import Fault
from fastclip.data.order import hash64
from fastclip.data.regular import digest_of
from fastclip.data.samples import Meaning, Sample
from fastclip.data.variants import check_captions, parse_variant

SYNTHETIC_PIXELS = 224

# what a world's samples are made from, and what a text may claim of that
G = TypeVar("G")
C = TypeVar("C")


class Generated:
    """One shard of samples, which cannot be damaged."""

    name: str

    def __init__(self, split: str, count: int) -> None:
        self.split = split
        self.counts: tuple[int, ...] = (count,)
        self.parts: tuple[int, ...] = (1,)

    def place(self, shard: int) -> str:
        """What it is called in `--train-data`.

        Args:
            shard: 0, the only one.
        """
        return self.name

    def drain_faults(self) -> list[Fault]:
        """Nothing can be damaged here."""
        return []

    def digest(self) -> str:
        """Of what the images are made from."""
        return digest_of([type(self).__name__, *sorted(vars(self).items())])


class SyntheticSource(Generated):
    """Images of noise with a caption of its own each, for trying a machine out.

    Args:
        split: "train" or "val"; their images differ.
        count: number of samples.
    """

    name = "synthetic"

    def read(self, shard: int, index: int, *, pixels: bool = True) -> Sample:
        """The noise and caption of sample `index`."""
        shape = (SYNTHETIC_PIXELS, SYNTHETIC_PIXELS, 3)
        stream = np.random.PCG64(hash64(index, self.split == "train"))
        noise = stream.random_raw(np.prod(shape) // 8).view(np.uint8).reshape(shape)
        text = f"noise of {self.split} number {index}"
        return Sample(f"{self.split}{index:08d}", Image.fromarray(noise), (text,))


class World(Generated, ABC, Generic[G, C]):
    """What the embedded worlds share: the order of the steps in which a sample is made.

    A world gives its `name`, the `keys` that may follow it with their values, the `last` key, which
    may have any, its `language`, a module like `fastclip.data.scenes.captions`, and four methods.
    """

    keys: Mapping[str, Sequence[str]]
    last: str | None = None
    language: ModuleType

    def __init__(
        self,
        split: str,
        count: int,
        objects: int | None,
        quality: str,
        captions: tuple[str, ...],
        negatives: bool,
    ) -> None:
        check_captions(self.name, captions, self.language.QUALITIES)
        super().__init__(split, count)
        self.objects = objects
        self.quality = quality
        self.captions = captions
        self.negatives = negatives

    @classmethod
    def parse(cls, data: str) -> dict[str, str]:
        """The values of the keys that follow the world's name, as in `scenes:caption=dense`.

        Raises:
            ValueError: another name, or an unknown key or value; the message lists the known ones.
        """
        name = cls.name
        if data.partition(":")[0] != name:
            raise ValueError(f"{data!r} names no {name}; give '{name}' or '{name}:KEY=VALUE,...'")
        return parse_variant(data, cls.keys, several=("shift",), last=cls.last)

    def read(self, shard: int, index: int, *, pixels: bool = True) -> Sample:
        """The image, captions, hard negatives and class (of single objects) of a graph.

        Args:
            shard: 0, the only one.
            index: of the graph, in [0, count).
            pixels: of no meaning here: images are always made.

        Raises:
            UnreadableSample: a photograph in the image cannot be read.
        """
        language, seed, graph = self.language, hash64(index), self.graph(index)
        names = self.captions or (self.quality,)
        described = [language.caption_claims(graph, name, seed) for name in names]
        texts = tuple(text for text, _ in described)
        sample = Sample(f"{self.split}{index:08d}", self.render(graph), texts)
        # what was false from the start cannot become so
        said = [c for _, claims in described for c in claims if language.holds(c, graph)]
        if self.captions:
            sample.captions = {n: (text,) for n, text in zip(self.captions, texts, strict=True)}
        if self.negatives:
            kinds = language.NEGATIVE_KINDS
            sample.negatives = tuple(
                text for kind in kinds for text in language.hard_negatives(graph, kind, seed)
            )
            # a view of which the short caption is false could show what a negative says
            said += language.caption_claims(graph, "short", seed)[1]
        only = self.only(graph)
        if only is not None:
            sample.label, claim = only
            said.append(claim)
        sample.meaning = self.meaning(graph, tuple(said), sample.image)
        return sample

    @abstractmethod
    def graph(self, index: int) -> G:
        """What sample `index` shows."""

    @abstractmethod
    def render(self, graph: G) -> Image.Image:
        """The image that shows a graph."""

    @abstractmethod
    def only(self, graph: G) -> tuple[int, C] | None:
        """The class index of a graph's single object, and the claim of its class."""

    @abstractmethod
    def meaning(self, graph: G, claims: tuple[C, ...], image: Image.Image) -> Meaning:
        """Of true claims: what a view of the image has to leave true."""
