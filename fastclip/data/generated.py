"""Samples that are made when they are asked for: the embedded scenes, and noise."""

import numpy as np
from PIL import Image

from fastclip.data.index import Fault
from fastclip.data.order import hash64
from fastclip.data.regular import digest_of
from fastclip.data.samples import Sample
from fastclip.data.scenes import (
    NEGATIVE_KINDS,
    QUALITIES,
    SHIFTS,
    SPLITS,
    Claim,
    Mention,
    caption_claims,
    class_index,
    hard_negatives,
    render,
    sample_scene,
)
from fastclip.data.scenes.meaning import SceneMeaning
from fastclip.data.variants import check_captions, parse_variant

SCENE_PIXELS = 64
SYNTHETIC_PIXELS = 224

# What may follow `scenes:`, as KEY=VALUE joined by commas; shifts may be joined by '+'.
SCENE_KEYS = {
    "split": SPLITS,
    "shift": SHIFTS,
    "caption": QUALITIES,
    "objects": ("1", "2", "3"),
}


class SceneSource:
    """The embedded procedural world: scene i of a split, drawn when it is asked for.

    Args:
        split: "train", "val", "test" or "compositional".
        count: number of scenes.
        objects: draw exactly this many objects a scene; None for one to three.
        shift: one of `fastclip.data.scenes.SHIFTS`, or None; of several joined by '+' each scene
            has one or none, all alike often.
        quality: of the captions, one of `fastclip.data.scenes.QUALITIES`.
        captions: qualities to keep apart as sources of captions.
        negatives: whether samples have hard negatives.

    Raises:
        ValueError: a source is no quality.

    Examples:
        >>> from fastclip.data.sources import SceneSource
        >>> source = SceneSource("val", count=100, objects=1)
        >>> sample = source.read(0, 7)
        >>> sample.image.size, sample.texts, sample.label
        ((64, 64), ('a large red diamond',), 7)
    """

    def __init__(
        self,
        split: str,
        count: int,
        objects: int | None = None,
        shift: str | None = None,
        quality: str = "short",
        captions: tuple[str, ...] = (),
        negatives: bool = False,
    ) -> None:
        check_captions("scenes", captions, QUALITIES)
        self.captions = captions
        self.negatives = negatives
        self.split = split
        self.objects = objects
        self.shifts: tuple[str | None, ...] = (None,)
        if shift is not None:
            several = shift.split("+")
            self.shifts = tuple(several) if len(several) == 1 else (None, *several)
        self.quality = quality
        self.counts: tuple[int, ...] = (count,)
        self.parts: tuple[int, ...] = (1,)

    def read(self, shard: int, index: int, *, pixels: bool = True) -> Sample:
        """The image, captions, hard negatives and class (of single objects) of a scene.

        Args:
            shard: 0, the only one.
            index: of the scene, in [0, count).
            pixels: of no meaning here: scenes are always drawn.
        """
        seed = hash64(index)
        shift = self.shifts[hash64(index, 1) % len(self.shifts)]
        scene = sample_scene(index, split=self.split, shift=shift, objects=self.objects)
        described = [caption_claims(scene, name, seed) for name in self.captions or (self.quality,)]
        texts = tuple(text for text, _ in described)
        image = render(scene, SCENE_PIXELS)
        sample = Sample(f"{self.split}{index:08d}", image, texts, class_index(scene))
        said = [claim for _, claims in described for claim in claims]
        if self.captions:
            sample.captions = {n: (text,) for n, text in zip(self.captions, texts, strict=True)}
        if self.negatives:
            sample.negatives = tuple(
                text for kind in NEGATIVE_KINDS for text in hard_negatives(scene, kind, seed)
            )
            # a view of which the short caption is false could show what a negative says
            said += caption_claims(scene, "short", seed)[1]
        if sample.label is not None:
            [only] = scene.objects
            said.append(Claim((Mention(only.color, only.shape),)))
        sample.meaning = SceneMeaning(scene, tuple(said), image)
        return sample

    def place(self, shard: int) -> str:
        """What it is called in `--train-data`.

        Args:
            shard: 0, the only one.
        """
        return "scenes"

    def drain_faults(self) -> list[Fault]:
        """Nothing can be damaged here."""
        return []

    def digest(self) -> str:
        """Of what the images are made from."""
        return digest_of([type(self).__name__, *sorted(vars(self).items())])


class SyntheticSource:
    """Images of noise with a caption of its own each, for trying a machine out.

    Args:
        split: "train" or "val"; their images differ.
        count: number of samples.
    """

    def __init__(self, split: str, count: int) -> None:
        self.split = split
        self.counts: tuple[int, ...] = (count,)
        self.parts: tuple[int, ...] = (1,)

    def read(self, shard: int, index: int, *, pixels: bool = True) -> Sample:
        """The noise and caption of sample `index`."""
        shape = (SYNTHETIC_PIXELS, SYNTHETIC_PIXELS, 3)
        stream = np.random.PCG64(hash64(index, self.split == "train"))
        noise = stream.random_raw(np.prod(shape) // 8).view(np.uint8).reshape(shape)
        text = f"noise of {self.split} number {index}"
        return Sample(f"{self.split}{index:08d}", Image.fromarray(noise), (text,))

    def place(self, shard: int) -> str:
        """What it is called in `--train-data`."""
        return "synthetic"

    def drain_faults(self) -> list[Fault]:
        """Nothing can be damaged here."""
        return []

    def digest(self) -> str:
        """Of what the images are made from."""
        return digest_of([type(self).__name__, *sorted(vars(self).items())])


def open_scenes(
    data: str,
    split: str,
    count: int,
    captions: tuple[str, ...] = (),
    negatives: bool = False,
) -> SceneSource:
    """The scenes that `scenes` or e.g. `scenes:split=compositional,caption=dense` names.

    Args:
        data: keys are split, shift, caption and objects.
        split: where `data` names none.
        count: number of scenes.
        captions, negatives: see `SceneSource`.

    Raises:
        ValueError: a key or value is unknown; the message lists the known ones.
    """
    if data.partition(":")[0] != "scenes":
        raise ValueError(f"{data!r} names no scenes; give 'scenes' or 'scenes:KEY=VALUE,...'")
    chosen = parse_variant(data, SCENE_KEYS, several=("shift",))
    objects = int(chosen["objects"]) if "objects" in chosen else None
    quality = chosen.get("caption", "short")
    split, shift = chosen.get("split", split), chosen.get("shift")
    return SceneSource(split, count, objects, shift, quality, captions, negatives)
