"""Opening what `--train-data` and `--data` name."""

from pathlib import Path

from fastclip.data.index import Fault
from fastclip.data.loader import Source
from fastclip.data.order import hash64
from fastclip.data.scenes import caption, class_index, render, sample_scene
from fastclip.data.shards import Sample, ShardSource

SCENES = "scenes"
SCENE_PIXELS = 64


class SceneSource:
    """The embedded procedural world: scene i of a split, drawn when it is asked for.

    Args:
        split: "train", "val", or another of `fastclip.data.scenes`.
        count: number of scenes.
        objects: draw exactly this many objects a scene; None for one to three.
    """

    def __init__(self, split: str, count: int, objects: int | None = None) -> None:
        self.split = split
        self.objects = objects
        self.counts: tuple[int, ...] = (count,)

    def read(self, shard: int, index: int) -> Sample:
        """The image, short caption and class (of single objects) of scene `index`."""
        scene = sample_scene(index, split=self.split, objects=self.objects)
        text = caption(scene, "short", seed=hash64(index))
        image = render(scene, SCENE_PIXELS)
        return Sample(f"{self.split}{index:08d}", image, (text,), class_index(scene))

    def drain_faults(self) -> list[Fault]:
        """Nothing can be damaged here."""
        return []


def is_scenes(data: str, dataset_type: str = "auto") -> bool:
    """Whether `data` means the embedded world."""
    return dataset_type == SCENES or (dataset_type == "auto" and data == SCENES)


def open_source(
    data: str,
    dataset_type: str = "auto",
    *,
    split: str,
    count: int,
    required: tuple[str, ...] = ("txt",),
) -> Source:
    """The samples of shards or of the embedded world.

    Args:
        data: a shard pattern (see `fastclip.data.shards.expand_shards`) or "scenes".
        dataset_type: "auto", "webdataset" or "scenes".
        split, count: which scenes and how many; of no meaning for shards.
        required: extensions a shard's sample must have besides an image.

    Raises:
        ValueError, FileNotFoundError: as `ShardSource`; a folder is named instead of shards.
    """
    if is_scenes(data, dataset_type):
        return SceneSource(split, count)
    if Path(data).is_dir():
        example = f"{data.rstrip('/')}/{{00000..00009}}.tar"
        raise ValueError(f"{data} is a folder; name the shards in it, e.g. '{example}'")
    return ShardSource(data, required)
