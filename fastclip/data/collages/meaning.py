"""What a view shows of a collage, so that augmentation leaves its captions true."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fastclip.data.augment import AugmentationParams, Hue
from fastclip.data.collages.world import Centers, Claim, Collage, claim_holds
from fastclip.data.text_augment import PUNCTUATION

# Besides the classes: places, relations, and what joins two photographs.
STRUCTURE = frozenset(
    ("at", "top", "bottom", "left", "right", "of", "above", "below", "and", "with")
)


@dataclass(frozen=True)
class CollageMeaning:
    """What is said of a collage: see `fastclip.data.samples.Meaning`.

    A view shows a photograph where it shows its center, and at the place in which quarter of the
    view that lies. Of colors nothing is said, so that any may change.

    Args:
        collage: of which all claims are true.
        claims: of its captions and its class.
        side: of its image, in pixels.

    Examples:
        >>> from fastclip.data.augment import AugmentationParams
        >>> from fastclip.data.collages import Claim, Collage, Photo
        >>> from fastclip.data.collages.meaning import CollageMeaning
        >>> collage = Collage((Photo("cat", "at the top left"),), classes=("cat", "dog"))
        >>> meaning = CollageMeaning(collage, (Claim(("cat",), "at the top left"),), side=64)
        >>> crop = AugmentationParams(top=0, left=0, height=40, width=40)
        >>> mirrored = AugmentationParams(top=0, left=0, height=40, width=40, flip=True)
        >>> meaning.is_true_of(crop, "yiq"), meaning.is_true_of(mirrored, "yiq")
        (True, False)
    """

    collage: Collage
    claims: tuple[Claim, ...]
    side: int

    @property
    def structure(self) -> frozenset[str]:
        """Words that a text augmentation neither drops nor replaces; it moves words only where a
        text has at most one of these."""
        return _structure(self.collage.classes)

    def is_true_of(self, view: AugmentationParams, hue: Hue) -> bool:
        """Whether every claim is true of what a view of the image shows.

        Args:
            view: of the image.
            hue: of no meaning here.
        """
        if not self.claims:
            return True
        shown = self._shown(view)
        return all(claim_holds(claim, shown) for claim in self.claims)

    def _shown(self, view: AugmentationParams) -> Centers:
        """The photographs whose centers the view shows, from its middle, in pixels."""
        shown = {}
        for name, (x, y) in self.collage.centers().items():
            # a photograph's center is a quarter of the side from the middle
            right = self.side / 2 + x * self.side / 4 - (view.left + view.width / 2)
            down = self.side / 2 + y * self.side / 4 - (view.top + view.height / 2)
            if abs(right) <= view.width / 2 and abs(down) <= view.height / 2:
                shown[name] = (-right if view.flip else right, down)
        return shown


@lru_cache(maxsize=32)
def _structure(classes: tuple[str, ...]) -> frozenset[str]:
    words = (word for name in classes for word in name.lower().split())
    return STRUCTURE.union(word.strip(PUNCTUATION) for word in words)
