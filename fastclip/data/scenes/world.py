"""The scene graph: its vocabulary, how scenes are sampled, and what is true of them.

A scene is one to three colored shapes in the unit square (x to the right, y downwards), with a
background, a drawing style and, in shifted test sets, another palette, view or corruption. Scenes
are a pure function of integers: sampling uses 64-bit integer arithmetic and exactly rounded
floating-point operations only, so that a seed names the same scene on every platform.

Truth is decided here and nowhere else. A text is a set of `Claim`s, and `holds` decides each of
them on the scene graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import combinations, permutations

from fastclip.data.streams import Stream, check_choice, check_seed

COLORS = ("red", "yellow", "green", "cyan", "blue", "purple", "pink", "brown")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
# Radius of the disc that holds the shape, as a fraction of the image's side.
SIZES = {"small": 0.12, "large": 0.21}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE)

BACKGROUNDS = ("white", "gray", "black", "beige", "gradient", "striped", "checkered", "speckled")
SHIFTED_BACKGROUNDS = ("dotted", "gridded", "wavy", "cloudy", "brick")
STYLES = ("filled", "bordered", "shaded")
SHIFTED_STYLES = ("outline", "sketch", "hatched", "stippled")
PALETTES = ("standard", "deep", "soft")
CORRUPTIONS = ("noise", "blur", "jpeg", "contrast")

SPLITS = ("train", "val", "test", "compositional")
SHIFTS = ("style", "palette", "background", "viewpoint", "corruption")

# One pair for each color and each shape, so that neither is rarer than another in training.
HELD_OUT = frozenset((c, SHAPES[(3 * i + 1) % len(SHAPES)]) for i, c in enumerate(COLORS))
_KNOWN_PAIRS = tuple((c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT)
_HELD_OUT_PAIRS = tuple((c, s) for c in COLORS for s in SHAPES if (c, s) in HELD_OUT)

CLASSES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
# No template names a size, a place, a background or a style: each is true of every such scene.
TEMPLATES = (
    "a {}",
    "a picture of a {}",
    "a photo of a {}",
    "an image of a {}",
    "a drawing of a {}",
    "there is a {}",
)

# Least distance of two centers along a relation's axis, and how far that must exceed the distance
# along the other axis for the relation to be the one that a caption names.
RELATION_MARGIN = 0.2
DOMINANCE = 2.0
# Least distance of two objects, and of an object from the frame.
GAP = 0.03


@dataclass(frozen=True)
class Object:
    """A colored shape somewhere in the image.

    Args:
        shape: one of `SHAPES`.
        color: one of `COLORS`.
        size: "small" or "large", see `SIZES`.
        x, y: the center, as fractions of the image's side, y downwards.

    Raises:
        ValueError: a name outside the vocabulary, or a center outside [0, 1].

    Examples:
        >>> from fastclip.data.scenes import Object
        >>> Object("star", "red", "large", x=0.25, y=0.5).radius
        0.21
    """

    shape: str
    color: str
    size: str
    x: float
    y: float

    def __post_init__(self) -> None:
        check_choice("shape", self.shape, SHAPES)
        check_choice("color", self.color, COLORS)
        check_choice("size", self.size, tuple(SIZES))
        if not (0.0 <= self.x <= 1.0 and 0.0 <= self.y <= 1.0):
            raise ValueError(f"the center is ({self.x}, {self.y}); keep both within [0, 1]")

    @property
    def radius(self) -> float:
        """Radius of the disc that holds the shape, as a fraction of the image's side."""
        return SIZES[self.size]


@dataclass(frozen=True)
class View:
    """How the scene is seen: sheared along x, then rotated, then scaled about its center.

    Args:
        rotation: in degrees, clockwise.
        scale, shear: plain factors.

    Examples:
        >>> from fastclip.data.scenes import View
        >>> View(scale=0.5).apply(1.0, 0.5)
        (0.75, 0.5)
    """

    rotation: float = 0.0
    scale: float = 1.0
    shear: float = 0.0

    def matrix(self) -> tuple[float, float, float, float]:
        """The linear part (a, b, c, d) of the map (x, y) -> (a x + b y, c x + d y)."""
        angle = math.radians(self.rotation)
        cos, sin = self.scale * math.cos(angle), self.scale * math.sin(angle)
        return cos, cos * self.shear - sin, sin, sin * self.shear + cos

    def apply(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the scene is seen, in the same units.

        Args:
            x, y: of the point, as fractions of the image's side.
        """
        a, b, c, d = self.matrix()
        x, y = x - 0.5, y - 0.5
        return a * x + b * y + 0.5, c * x + d * y + 0.5


@dataclass(frozen=True)
class Scene:
    """One to three objects and how they are drawn.

    Args:
        objects: one to three.
        relation: that of objects[0] to objects[1], one of `RELATIONS`; None for a single object.
        background: one of `BACKGROUNDS` or `SHIFTED_BACKGROUNDS`.
        style: one of `STYLES` or `SHIFTED_STYLES`.
        palette: one of `PALETTES`.
        view: how it is seen.
        corruption: one of `CORRUPTIONS`, or None.
        severity: of the corruption, 1 to 3.
        seed: chooses what the graph leaves open: textures, tints and the phrasing of captions.

    Raises:
        ValueError: a name outside the vocabulary, another number of objects, or a relation that is
            not the one the centers show.

    Examples:
        >>> from fastclip.data.scenes import Object, Scene, caption
        >>> star = Object("star", "red", "large", x=0.25, y=0.5)
        >>> ring = Object("ring", "blue", "small", x=0.75, y=0.5)
        >>> caption(Scene((star, ring), "left of"))
        'a blue ring with a red star left of it'
    """

    objects: tuple[Object, ...]
    relation: str | None
    background: str = "white"
    style: str = "filled"
    palette: str = "standard"
    view: View = field(default_factory=View)
    corruption: str | None = None
    severity: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.objects) <= 3:
            raise ValueError(f"the scene has {len(self.objects)} objects; give one to three")
        check_choice("background", self.background, BACKGROUNDS + SHIFTED_BACKGROUNDS)
        check_choice("style", self.style, STYLES + SHIFTED_STYLES)
        check_choice("palette", self.palette, PALETTES)
        if self.corruption is not None:
            check_choice("corruption", self.corruption, CORRUPTIONS)
        if self.severity not in (1, 2, 3):
            raise ValueError(f"severity is {self.severity}; use 1, 2 or 3")
        shown = relation_between(*self.objects[:2]) if len(self.objects) > 1 else None
        if self.relation != shown:
            raise ValueError(
                f"relation is {self.relation!r} but the centers show {shown!r}; "
                "move the objects or name the relation they show"
            )


@dataclass(frozen=True)
class Mention:
    """What a text says of one object; None is left unsaid.

    Args:
        color: one of `COLORS`.
        shape: one of `SHAPES`.
        size: "small" or "large".

    Examples:
        >>> from fastclip.data.scenes import Mention
        >>> Mention(color="red", shape="star")
        Mention(color='red', shape='star', size=None)
    """

    color: str | None = None
    shape: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Claim:
    """What a sentence says of a scene; None is left unsaid.

    Args:
        objects: mentions, each of a different object of the scene.
        relation: that of the first mention to the second, one of `RELATIONS`.
        background, style: of the scene.
        count: the exact number of objects in the scene.

    Raises:
        ValueError: an unknown relation, or one with fewer than two mentions.

    Examples:
        >>> from fastclip.data.scenes import Claim, Mention, holds, sample_scene
        >>> scene = sample_scene(0, objects=1)
        >>> holds(Claim(count=1), scene), holds(Claim((Mention(), Mention())), scene)
        (True, False)
    """

    objects: tuple[Mention, ...] = ()
    relation: str | None = None
    background: str | None = None
    style: str | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        if self.relation is not None:
            check_choice("relation", self.relation, RELATIONS)
            if len(self.objects) < 2:
                raise ValueError(
                    f"a relation needs two mentions and the claim has {len(self.objects)}; "
                    "add a mention or drop the relation"
                )


def _along(a: Object, relation: str, b: Object) -> float:
    """How far a lies from b in the relation's direction, as a fraction of the image's side."""
    if relation in ("left of", "right of"):
        distance = a.x - b.x
    else:
        distance = a.y - b.y
    return distance if relation in ("right of", "below") else -distance


def related(a: Object, relation: str, b: Object) -> bool:
    """Whether the relation is true of a to b: their centers differ by at least RELATION_MARGIN.

    Of two objects on a diagonal, two relations can be true ("left of" and "above").
    """
    return _along(a, relation, b) >= RELATION_MARGIN


def relation_between(a: Object, b: Object) -> str | None:
    """The one relation of a to b that a caption may name, None where the two lie diagonally.

    Their centers differ by 0.2 of the image's side or more along its axis, and by twice as much as
    along the other, so that it stays true in every view that `sample_scene` chooses.

    Args:
        a, b: the two objects.

    Returns:
        "left of", "right of", "above" or "below", or None.

    Examples:
        >>> from fastclip.data.scenes import Object, relation_between
        >>> star = Object("star", "red", "large", x=0.25, y=0.5)
        >>> relation_between(star, Object("ring", "blue", "small", x=0.75, y=0.5))
        'left of'
    """
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) >= max(RELATION_MARGIN, DOMINANCE * abs(dy)):
        return "left of" if dx > 0 else "right of"
    if abs(dy) >= max(RELATION_MARGIN, DOMINANCE * abs(dx)):
        return "above" if dy > 0 else "below"
    return None


def _matches(mention: Mention, obj: Object) -> bool:
    return (
        mention.color in (None, obj.color)
        and mention.shape in (None, obj.shape)
        and mention.size in (None, obj.size)
    )


def holds(claim: Claim, scene: Scene) -> bool:
    """Whether the claim is true of the scene, by the scene graph alone.

    It is where some choice of different objects, one for each mention, has every attribute
    mentioned and the relation, and where background, style and count, if said, are the scene's.

    Args:
        claim: what is said.
        scene: of what.

    Examples:
        >>> from fastclip.data.scenes import Claim, Mention, holds, sample_scene
        >>> scene = sample_scene(0, objects=1)
        >>> [one] = scene.objects
        >>> holds(Claim((Mention(shape=one.shape),)), scene), holds(Claim(count=2), scene)
        (True, False)
    """
    if claim.background not in (None, scene.background) or claim.style not in (None, scene.style):
        return False
    if claim.count not in (None, len(scene.objects)):
        return False
    for chosen in permutations(scene.objects, len(claim.objects)):
        if all(map(_matches, claim.objects, chosen)):
            if claim.relation is None or related(chosen[0], claim.relation, chosen[1]):
                return True
    return False


def class_index(scene: Scene) -> int | None:
    """The index in `CLASSES` of the scene's only object; None where it has several.

    Args:
        scene: of one to three objects.

    Examples:
        >>> from fastclip.data.scenes import CLASSES, Object, Scene, class_index
        >>> scene = Scene((Object("star", "red", "large", x=0.5, y=0.5),), relation=None)
        >>> CLASSES[class_index(scene)]
        'red star'
    """
    if len(scene.objects) != 1:
        return None
    obj = scene.objects[0]
    return COLORS.index(obj.color) * len(SHAPES) + SHAPES.index(obj.shape)


def has_held_out(scene: Scene) -> bool:
    """Whether some object is one of the (color, shape) pairs kept out of training."""
    return any((obj.color, obj.shape) in HELD_OUT for obj in scene.objects)


def apart(a: Object, b: Object) -> bool:
    """Whether the discs of the two objects are at least GAP apart."""
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2 >= (a.radius + b.radius + GAP) ** 2


def _sample_pairs(stream: Stream, count: int, held_out: bool) -> list[tuple[str, str]]:
    """Different (color, shape) pairs; with held_out, exactly one of them is a held-out pair."""
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        pair = stream.choice(_KNOWN_PAIRS)
        if pair not in pairs:
            pairs.append(pair)
    if held_out:
        pairs[stream.below(count)] = stream.choice(_HELD_OUT_PAIRS)
    return pairs


def _place(stream: Stream, color: str, shape: str, size: str) -> Object:
    edge = SIZES[size] + GAP
    # Four decimals keep the graph readable; round() is exact on every platform.
    x, y = (round(stream.uniform(edge, 1.0 - edge), 4) for _ in range(2))
    return Object(shape, color, size, x, y)


def _well_placed(objects: tuple[Object, ...]) -> bool:
    """No two objects touch, the first two are related, and a third to one of them."""
    if not all(apart(a, b) for a, b in combinations(objects, 2)):
        return False
    if len(objects) > 1 and relation_between(*objects[:2]) is None:
        return False
    return all(any(relation_between(o, other) for other in objects[:2]) for o in objects[2:])


def _sample_objects(stream: Stream, pairs: list[tuple[str, str]]) -> tuple[Object, ...]:
    while True:
        sizes = [stream.choice(tuple(SIZES)) for _ in pairs]
        # Many tries for the same sizes, or most objects would be small; not without end, as three
        # large objects have no room.
        for _ in range(60):
            objects = tuple(
                _place(stream, *pair, size) for pair, size in zip(pairs, sizes, strict=True)
            )
            if _well_placed(objects):
                return objects


def _sample_view(stream: Stream, objects: tuple[Object, ...]) -> View:
    """A view that leaves every object in the frame and small objects smaller than large ones."""
    rotation = round(stream.choice((-1, 1)) * stream.uniform(6.0, 15.0), 1)
    shear = round(stream.uniform(-0.1, 0.1), 3)
    # |sin| is bounded by its angle: an upper bound on the reach without libm, whose last digit
    # differs between platforms.
    tilt = abs(rotation) * (math.pi / 180.0) + abs(shear)
    reach = 0.0
    for obj in objects:
        dx, dy = abs(obj.x - 0.5), abs(obj.y - 0.5)
        reach = max(
            reach, max(dx + tilt * dy, dy + tilt * dx) + obj.radius * (1 + abs(shear)) + 0.01
        )
    return View(rotation, round(stream.uniform(0.75, min(1.15, 0.5 / reach)), 3), shear)


def _shifted(scene: Scene, shift: str, stream: Stream) -> Scene:
    if shift == "style":
        return replace(scene, style=stream.choice(SHIFTED_STYLES))
    if shift == "palette":
        return replace(scene, palette=stream.choice(PALETTES[1:]))
    if shift == "background":
        return replace(scene, background=stream.choice(SHIFTED_BACKGROUNDS))
    if shift == "viewpoint":
        return replace(scene, view=_sample_view(stream, scene.objects))
    return replace(scene, corruption=stream.choice(CORRUPTIONS), severity=1 + stream.below(3))


def sample_scene(
    seed: int, *, split: str = "train", shift: str | None = None, objects: int | None = None
) -> Scene:
    """The scene that the arguments name, the same on every platform.

    Args:
        seed: any integer in [0, 2**64).
        split: "train", "val" or "test", disjoint streams in which no object is a HELD_OUT pair;
            or "compositional", where exactly one object is.
        shift: None, or the one thing that differs from what training shows: "style", "palette",
            "background", "viewpoint" or "corruption". The objects are those of the same call
            without a shift.
        objects: number of objects, 1 to 3; None draws it (40 % one, 40 % two, 20 % three).

    Raises:
        ValueError: an argument is outside its range.

    Examples:
        >>> from fastclip.data.scenes import sample_scene
        >>> scene = sample_scene(7, split="val", objects=2)
        >>> len(scene.objects), scene == sample_scene(7, split="val", objects=2)
        (2, True)
    """
    check_choice("split", split, SPLITS)
    if shift is not None:
        check_choice("shift", shift, SHIFTS)
    seed = check_seed(seed)
    if objects not in (None, 1, 2, 3):
        raise ValueError(f"objects is {objects}; use 1, 2, 3, or None to draw the number")
    split_index = SPLITS.index(split)
    stream = Stream(split_index, seed)
    drawn = stream.choice((1, 1, 2, 2, 3))
    pairs = _sample_pairs(stream, objects or drawn, held_out=split == "compositional")
    placed = _sample_objects(stream, pairs)
    scene = Scene(
        objects=placed,
        relation=relation_between(*placed[:2]) if len(placed) > 1 else None,
        background=stream.choice(BACKGROUNDS),
        style=stream.choice(STYLES),
        # The last bits name the split: no scene of one split can equal a scene of another.
        seed=(stream.bits() & ~3) | split_index,
    )
    if shift is None:
        return scene
    return _shifted(scene, shift, Stream(split_index, seed, 1 + SHIFTS.index(shift)))
