"""What a view shows of a scene, so that augmentation leaves its captions true.

A view is described as a scene graph of its own: the objects whose centers it shows, with the names
of the colors and sizes that they have in it, mirrored where it is. `holds` then decides as ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from fastclip.data.augment import AugmentationParams, Hue
from fastclip.data.scenes.render import PALETTE_RGB, PLAIN_RGB, RGB, object_colors
from fastclip.data.scenes.world import (
    SHAPES,
    SIZES,
    Claim,
    Object,
    Scene,
    holds,
    relation_between,
)
from fastclip.data.views import GRAY, recolor, solarize

# An object keeps its color's name where that is nearer than any other by so many levels: contrast
# depends on the mean of all pixels, which is taken from some of them.
CLEARLY = 8.0
# Of the crop at least so many pixels a side are looked at.
_LOOKED_AT = 16

# Nouns, to which the words before them belong, and what relates them.
STRUCTURE = frozenset(
    (
        *SHAPES,
        "shape",
        "shapes",
        "background",
        "left",
        "right",
        "above",
        "below",
        "of",
        "with",
        "it",
    )
)


@dataclass(frozen=True)
class SceneMeaning:
    """What is said of a scene: see `fastclip.data.samples.Meaning`.

    Args:
        scene: of which all claims are true.
        claims: of its captions and its class.
        image: the scene as it was rendered.

    Examples:
        >>> from fastclip.data.augment import AugmentationParams
        >>> from fastclip.data.scenes import caption_claims, render, sample_scene
        >>> from fastclip.data.scenes.meaning import SceneMeaning
        >>> scene = sample_scene(12, objects=2)
        >>> text, claims = caption_claims(scene, "short")
        >>> meaning = SceneMeaning(scene, claims, render(scene))
        >>> gray = AugmentationParams(top=0, left=0, height=64, width=64, gray=True)
        >>> meaning.is_true_of(gray, "yiq")
        False
    """

    scene: Scene
    claims: tuple[Claim, ...]
    image: Image.Image

    @property
    def structure(self) -> frozenset[str]:
        """Words that a text augmentation neither drops nor replaces; it moves words only where a
        text has at most one of these."""
        return STRUCTURE

    def is_true_of(self, view: AugmentationParams, hue: Hue) -> bool:
        """Whether every claim is true of what a view of the image shows.

        Args:
            view: of the image.
            hue: "yiq" or "hsv", as its colors are turned.
        """
        if not self.claims:
            return True
        shown = self._shown(view, hue)
        return shown is not None and all(holds(claim, shown) for claim in self.claims)

    def _shown(self, view: AugmentationParams, hue: Hue) -> Scene | None:
        """The view as a scene; None where it shows no object.

        Places are those of the whole scene, so that relations keep their margin in any crop.
        """
        scene, (width, height) = self.scene, self.image.size
        colors, background = [obj.color for obj in scene.objects], scene.background
        if view.jitter or view.gray or view.solarize < 256:
            colors, background = self._names(view, hue)
        zoom = math.sqrt(width * height / (view.width * view.height))
        objects = []
        for obj, color in zip(scene.objects, colors, strict=True):
            x, y = scene.view.apply(obj.x, obj.y)
            inside = (
                view.left <= x * width <= view.left + view.width
                and view.top <= y * height <= view.top + view.height
            )
            if inside and color:
                place = 1 - obj.x if view.flip else obj.x
                objects.append(Object(obj.shape, color, _size(obj.radius * zoom), place, obj.y))
        if not objects:
            return None
        relation = relation_between(*objects[:2]) if len(objects) > 1 else None
        return replace(scene, objects=tuple(objects), relation=relation, background=background)

    def _names(self, view: AugmentationParams, hue: Hue) -> tuple[list[str], str]:
        """Names of the objects' colors and of the background in the view; "" for a gray object."""
        scene = self.scene
        plain = PLAIN_RGB.get(scene.background)
        own = object_colors(scene) + ([plain] if plain else [])
        step = max(1, min(view.width, view.height) // _LOOKED_AT)
        rows = slice(view.top, view.top + view.height, step)
        columns = slice(view.left, view.left + view.width, step)
        around = np.asarray(self.image)[rows, columns].reshape(-1, 3)
        pixels = np.concatenate([np.array(own), around]).T[:, :, None].astype(np.float32)
        seen = solarize(recolor(pixels, view, hue), view.solarize)[:, : len(own), 0].T
        names = []
        for obj, color in zip(scene.objects, seen, strict=False):
            level = round(float(GRAY @ color))
            named = {**PALETTE_RGB[scene.palette], "": (level, level, level)}
            names.append(_nearest(color, named, obj.color))
        background = _nearest(seen[-1], PLAIN_RGB, scene.background) if plain else scene.background
        return names, background


def _nearest(color: np.ndarray, named: Mapping[str, RGB], own: str) -> str:
    """The name of the nearest color; its own only where that is clearly the nearest."""

    def distance(name: str) -> float:
        return math.dist(color, named[name]) + (CLEARLY if name == own else 0.0)

    return min(named, key=distance)


def _size(radius: float) -> str:
    return min(SIZES, key=lambda name: abs(SIZES[name] - radius))
