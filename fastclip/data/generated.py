"""Samples that are made when they are asked for: the embedded scenes, and noise."""

import numpy as np
from PIL import Image

from fastclip.data.index import Fault
from fastclip.data.order import hash64
from fastclip.data.samples import Sample
from fastclip.data.scenes import (
    QUALITIES,
    SHIFTS,
    SPLITS,
    caption,
    class_index,
    render,
    sample_scene,
)

SCENE_PIXELS = 64
SYNTHETIC_PIXELS = 224

# What may follow `scenes:`, as KEY=VALUE joined by commas.
SCENE_KEYS = {
    "split": SPLITS,
    "shift": SHIFTS,
    "caption": QUALITIES,
    "objects": ("1", "2", "3"),
}


class SceneSource:
    """The embedded procedural world: scene i of a split, drawn when it is asked for.

    Args:
        split: "train", "val", or another of `fastclip.data.scenes`.
        count: number of scenes.
        objects: draw exactly this many objects a scene; None for one to three.
        shift: one of `fastclip.data.scenes.SHIFTS`, or None.
        quality: of the captions, one of `fastclip.data.scenes.QUALITIES`.
    """

    def __init__(
        self,
        split: str,
        count: int,
        objects: int | None = None,
        shift: str | None = None,
        quality: str = "short",
    ) -> None:
        self.split = split
        self.objects = objects
        self.shift = shift
        self.quality = quality
        self.counts: tuple[int, ...] = (count,)
        self.parts: tuple[int, ...] = (1,)

    def read(self, shard: int, index: int) -> Sample:
        """The image, caption and class (of single objects) of scene `index`."""
        scene = sample_scene(index, split=self.split, shift=self.shift, objects=self.objects)
        text = caption(scene, self.quality, seed=hash64(index))
        image = render(scene, SCENE_PIXELS)
        return Sample(f"{self.split}{index:08d}", image, (text,), class_index(scene))

    def drain_faults(self) -> list[Fault]:
        """Nothing can be damaged here."""
        return []


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

    def read(self, shard: int, index: int) -> Sample:
        """The noise and caption of sample `index`."""
        shape = (SYNTHETIC_PIXELS, SYNTHETIC_PIXELS, 3)
        stream = np.random.PCG64(hash64(index, self.split == "train"))
        noise = stream.random_raw(np.prod(shape) // 8).view(np.uint8).reshape(shape)
        text = f"noise of {self.split} number {index}"
        return Sample(f"{self.split}{index:08d}", Image.fromarray(noise), (text,))

    def drain_faults(self) -> list[Fault]:
        """Nothing can be damaged here."""
        return []


def open_scenes(data: str, split: str, count: int) -> SceneSource:
    """The scenes that `scenes` or e.g. `scenes:split=compositional,caption=dense` names.

    Args:
        data: keys are split, shift, caption and objects.
        split: where `data` names none.
        count: number of scenes.

    Raises:
        ValueError: a key or value is unknown; the message lists the known ones.
    """
    world, _, options = data.partition(":")
    if world != "scenes":
        raise ValueError(f"{data!r} names no scenes; give 'scenes' or 'scenes:KEY=VALUE,...'")
    chosen: dict[str, str] = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in SCENE_KEYS:
            raise ValueError(f"{data!r}: unknown key {key!r}; known are {', '.join(SCENE_KEYS)}")
        if value not in SCENE_KEYS[key]:
            known = ", ".join(SCENE_KEYS[key])
            raise ValueError(f"{data!r}: unknown {key} {value!r}; known are {known}")
        if key in chosen:
            raise ValueError(f"{data!r} gives {key} twice")
        chosen[key] = value
    objects = int(chosen["objects"]) if "objects" in chosen else None
    quality = chosen.get("caption", "short")
    return SceneSource(chosen.get("split", split), count, objects, chosen.get("shift"), quality)
