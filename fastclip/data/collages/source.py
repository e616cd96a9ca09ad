"""Collages as a source of samples."""

from PIL import Image

from fastclip.data.collages import captions as language
from fastclip.data.collages.meaning import CollageMeaning
from fastclip.data.collages.photos import PHOTO_PIXELS, Pictures, Shapes
from fastclip.data.collages.world import (
    CENTERS,
    MAX_PHOTOS,
    Claim,
    Collage,
    check_classes,
    sample_collage,
)
from fastclip.data.generated import World
from fastclip.data.index import Fault
from fastclip.data.regular import digest_of
from fastclip.data.scenes.captions import QUALITIES
from fastclip.data.scenes.world import SPLITS

COLLAGE_PIXELS = 2 * PHOTO_PIXELS
# What an empty place shows.
EMPTY = (128, 128, 128)

# What may follow `collages:`, as KEY=VALUE joined by commas; and the key of photographs, last.
COLLAGE_KEYS = {
    "split": SPLITS,
    "caption": QUALITIES,
    "objects": tuple(str(count + 1) for count in range(MAX_PHOTOS)),
}
PHOTOS_KEY = "photos"


class CollageSource(World[Collage, Claim]):
    """Collages of photographs, with captions of classes and places, made when they are asked for.

    Args:
        photos: photographs by class, a `fastclip.data.collages.Photographs`; None for drawn shapes.
        split: "train", "val", "test" or "compositional".
        count: number of collages.
        objects: photographs in each, 1 to 4; None for two or three.
        quality: of the captions, one of `fastclip.data.collages.QUALITIES`.
        captions: qualities to keep apart as sources of captions.
        negatives: whether samples have hard negatives.

    Raises:
        ValueError: a source of captions is no quality, or there are too few classes.

    Examples:
        >>> from fastclip.data.sources import CollageSource
        >>> source = CollageSource(None, "val", count=100, objects=2)
        >>> sample = source.read(0, 7)
        >>> sample.image.size, sample.texts
        ((64, 64), ('there is a circle at the bottom right, below a ring',))
    """

    name = "collages"
    keys = COLLAGE_KEYS
    last = PHOTOS_KEY
    language = language

    def __init__(
        self,
        photos: Pictures | None,
        split: str,
        count: int,
        objects: int | None = None,
        quality: str = "short",
        captions: tuple[str, ...] = (),
        negatives: bool = False,
    ) -> None:
        super().__init__(split, count, objects, quality, captions, negatives)
        self.pictures: Pictures = Shapes() if photos is None else photos
        check_classes(self.pictures.classes, objects)

    def collage(self, index: int) -> Collage:
        """Which photographs lie where in a sample, for code that asks what is true of it.

        Args:
            index: of the collage.
        """
        classes = self.pictures.classes
        return sample_collage(index, split=self.split, classes=classes, objects=self.objects)

    graph = collage

    def render(self, graph: Collage) -> Image.Image:
        image = Image.new("RGB", (COLLAGE_PIXELS, COLLAGE_PIXELS), EMPTY)
        for photo in graph.photos:
            x, y = CENTERS[photo.place]
            corner = (PHOTO_PIXELS * (x > 0), PHOTO_PIXELS * (y > 0))
            image.paste(self.pictures.picture(photo.name, graph.split, photo.draw), corner)
        return image

    def only(self, graph: Collage) -> tuple[int, Claim] | None:
        if len(graph.photos) > 1:
            return None
        [only] = graph.photos
        return graph.classes.index(only.name), Claim((only.name,))

    def meaning(
        self, graph: Collage, claims: tuple[Claim, ...], image: Image.Image
    ) -> CollageMeaning:
        return CollageMeaning(graph, claims, COLLAGE_PIXELS)

    def drain_faults(self) -> list[Fault]:
        """Those of the photographs."""
        return self.pictures.drain_faults()

    def digest(self) -> str:
        """Of what the images are made from."""
        own = {name: value for name, value in vars(self).items() if name != "pictures"}
        return digest_of([type(self).__name__, self.pictures.digest(), *sorted(own.items())])
