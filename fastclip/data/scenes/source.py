"""Scenes as a source of samples."""

from PIL import Image

from fastclip.data.generated import World
from fastclip.data.order import hash64
from fastclip.data.scenes import captions as language
from fastclip.data.scenes.captions import QUALITIES
from fastclip.data.scenes.meaning import SceneMeaning
from fastclip.data.scenes.render import render
from fastclip.data.scenes.world import (
    SHIFTS,
    SPLITS,
    Claim,
    Mention,
    Scene,
    class_index,
    sample_scene,
)

SCENE_PIXELS = 64

# What may follow `scenes:`, as KEY=VALUE joined by commas; shifts may be joined by '+'.
SCENE_KEYS = {"split": SPLITS, "shift": SHIFTS, "caption": QUALITIES, "objects": ("1", "2", "3")}


class SceneSource(World[Scene, Claim]):
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

    name = "scenes"
    keys = SCENE_KEYS
    language = language

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
        super().__init__(split, count, objects, quality, captions, negatives)
        self.shifts: tuple[str | None, ...] = (None,)
        if shift is not None:
            several = shift.split("+")
            self.shifts = tuple(several) if len(several) == 1 else (None, *several)

    def graph(self, index: int) -> Scene:
        shift = self.shifts[hash64(index, 1) % len(self.shifts)]
        return sample_scene(index, split=self.split, shift=shift, objects=self.objects)

    def render(self, graph: Scene) -> Image.Image:
        return render(graph, SCENE_PIXELS)

    def only(self, graph: Scene) -> tuple[int, Claim] | None:
        label = class_index(graph)
        if label is None:
            return None
        [only] = graph.objects
        return label, Claim((Mention(only.color, only.shape),))

    def meaning(self, graph: Scene, claims: tuple[Claim, ...], image: Image.Image) -> SceneMeaning:
        return SceneMeaning(graph, claims, image)
