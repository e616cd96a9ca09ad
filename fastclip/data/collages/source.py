"""Collages as a source of samples, and what `collages:KEY=VALUE,...` says."""

from PIL import Image

from fastclip.data.collages.captions import NEGATIVE_KINDS, caption_claims, hard_negatives
from fastclip.data.collages.meaning import CollageMeaning
from fastclip.data.collages.photos import PHOTO_PIXELS, Pictures, Shapes
from fastclip.data.collages.world import (
    CENTERS,
    MAX_PHOTOS,
    Claim,
    Collage,
    check_classes,
    holds,
    sample_collage,
)
from fastclip.data.index import Fault
from fastclip.data.order import hash64
from fastclip.data.regular import digest_of
from fastclip.data.samples import Sample
from fastclip.data.scenes.captions import QUALITIES
from fastclip.data.scenes.world import SPLITS
from fastclip.data.variants import check_captions, parse_variant

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


class CollageSource:
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
        check_captions("collages", captions, QUALITIES)
        self.pictures: Pictures = Shapes() if photos is None else photos
        check_classes(self.pictures.classes, objects)
        self.split = split
        self.objects = objects
        self.quality = quality
        self.captions = captions
        self.negatives = negatives
        self.counts: tuple[int, ...] = (count,)
        self.parts: tuple[int, ...] = (1,)

    def collage(self, index: int) -> Collage:
        """Which photographs lie where in a sample, for code that asks what is true of it.

        Args:
            index: of the collage.
        """
        classes = self.pictures.classes
        return sample_collage(index, split=self.split, classes=classes, objects=self.objects)

    def read(self, shard: int, index: int, *, pixels: bool = True) -> Sample:
        """The image, captions, hard negatives and class (of single photographs) of a collage.

        Args:
            shard: 0, the only one.
            index: of the collage, in [0, count).
            pixels: of no meaning here: collages are always made.

        Raises:
            UnreadableSample: one of the photographs cannot be read.
        """
        seed = hash64(index)
        collage = self.collage(index)
        described = [
            caption_claims(collage, name, seed) for name in self.captions or (self.quality,)
        ]
        texts = tuple(text for text, _ in described)
        sample = Sample(f"{self.split}{index:08d}", self._render(collage), texts)
        # what was false from the start cannot become so
        said = [claim for _, claims in described for claim in claims if holds(claim, collage)]
        if self.captions:
            sample.captions = {n: (text,) for n, text in zip(self.captions, texts, strict=True)}
        if self.negatives:
            sample.negatives = tuple(
                text for kind in NEGATIVE_KINDS for text in hard_negatives(collage, kind, seed)
            )
            # a view of which the short caption is false could show what a negative says
            said += caption_claims(collage, "short", seed)[1]
        if len(collage.photos) == 1:
            [only] = collage.photos
            sample.label = collage.classes.index(only.name)
            said.append(Claim((only.name,)))
        sample.meaning = CollageMeaning(collage, tuple(said), COLLAGE_PIXELS)
        return sample

    def place(self, shard: int) -> str:
        """What it is called in `--train-data`.

        Args:
            shard: 0, the only one.
        """
        return "collages"

    def drain_faults(self) -> list[Fault]:
        """Those of the photographs."""
        return self.pictures.drain_faults()

    def digest(self) -> str:
        """Of what the images are made from."""
        own = {name: value for name, value in vars(self).items() if name != "pictures"}
        return digest_of([type(self).__name__, self.pictures.digest(), *sorted(own.items())])

    def _render(self, collage: Collage) -> Image.Image:
        image = Image.new("RGB", (COLLAGE_PIXELS, COLLAGE_PIXELS), EMPTY)
        for photo in collage.photos:
            x, y = CENTERS[photo.place]
            corner = (PHOTO_PIXELS * (x > 0), PHOTO_PIXELS * (y > 0))
            image.paste(self.pictures.picture(photo.name, collage.split, photo.draw), corner)
        return image


def parse_collages(data: str) -> dict[str, str]:
    """What `collages` or e.g. `collages:objects=2,photos=FOLDER` says: keys with their values.

    Args:
        data: keys are split, caption, objects, and photos, the last.

    Raises:
        ValueError: it names no collages, a key or value is unknown, or one comes behind photos.
    """
    if data.partition(":")[0] != "collages":
        raise ValueError(f"{data!r} names no collages; give 'collages' or 'collages:KEY=VALUE,...'")
    return parse_variant(data, COLLAGE_KEYS, last=PHOTOS_KEY)
