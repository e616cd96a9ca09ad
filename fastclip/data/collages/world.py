"""The collage: which photograph lies where, how collages are drawn, and what is true of them.

A collage is a grid of two rows and two columns. Some of its places hold a photograph, each of
another class; the others are empty. Which ones is a pure function of integers and of the names of
the classes, in 64-bit integer arithmetic, so that a seed names the same collage on every platform.

Truth is decided here and nowhere else: a text makes `Claim`s, and `claim_holds` decides each by
where the centers of the photographs lie, in a collage or in a view of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, permutations

from fastclip.data.order import hash64
from fastclip.data.scenes.world import RELATIONS, SHAPES, SPLITS
from fastclip.data.streams import Stream, T, check_choice, check_seed

# The center of each place, from the middle of the collage, x to the right and y downwards, in
# units of half a photograph.
CENTERS = {
    "at the top left": (-1, -1),
    "at the top right": (1, -1),
    "at the bottom left": (-1, 1),
    "at the bottom right": (1, 1),
}
PLACES = tuple(CENTERS)
# Numbers of photographs that are drawn where none is asked for, and all that can be asked for.
USUAL_PHOTOS = (2, 3)
MAX_PHOTOS = len(PLACES)
# Share of the (class, place) pairs that training does not show.
HELD_OUT_SHARE = 0.3

# Keeps the draws apart from those of scenes with the same seeds.
_COLLAGE_KEY = 201

Pair = tuple[str, str]
# Of photographs by class, as those of `CENTERS`, in any unit
Centers = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Photo:
    """A photograph in a collage.

    Args:
        name: of its class.
        place: one of `PLACES`.
        draw: which of the class's photographs, an integer in [0, 2**64).

    Raises:
        ValueError: an unknown place.

    Examples:
        >>> from fastclip.data.collages import Photo
        >>> Photo("dog", "at the top left")
        Photo(name='dog', place='at the top left', draw=0)
    """

    name: str
    place: str
    draw: int = 0

    def __post_init__(self) -> None:
        check_choice("place", self.place, PLACES)


@dataclass(frozen=True)
class Collage:
    """One to four photographs of different classes at different places.

    Args:
        photos: they.
        classes: names of all classes, shown or not.
        split: which part of each class's photographs is drawn from.
        seed: chooses the phrasing of captions.

    Raises:
        ValueError: another number of photographs, one of no class, two of one class, or two at one
            place.

    Examples:
        >>> from fastclip.data.collages import Collage, Photo, caption
        >>> photos = (Photo("dog", "at the top left"), Photo("ship", "at the top right"))
        >>> collage = Collage(photos, classes=("cat", "dog", "ship"))
        >>> caption(collage)
        'a dog is at the top left, left of a ship'
    """

    photos: tuple[Photo, ...]
    classes: tuple[str, ...]
    split: str = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.photos) <= MAX_PHOTOS:
            raise ValueError(f"the collage has {len(self.photos)} photographs; give one to four")
        check_choice("split", self.split, SPLITS)
        for photo in self.photos:
            check_choice("class", photo.name, self.classes)
        names, places = ({getattr(p, key) for p in self.photos} for key in ("name", "place"))
        if min(len(names), len(places)) < len(self.photos):
            shown = ", ".join(f"{photo.name} {photo.place}" for photo in self.photos)
            raise ValueError(f"the collage shows {shown}; give different classes and places")

    def pairs(self) -> frozenset[Pair]:
        """The (class, place) pairs that it shows."""
        return frozenset((photo.name, photo.place) for photo in self.photos)

    def centers(self) -> Centers:
        """Where the photograph of each class lies."""
        return {photo.name: CENTERS[photo.place] for photo in self.photos}


@dataclass(frozen=True)
class Claim:
    """What a text says of a collage; None is left unsaid.

    Args:
        names: of the classes that it shows, one or two.
        place: of the first, one of `PLACES`.
        relation: of the first to the second, one of `RELATIONS`.

    Raises:
        ValueError: another number of names, an unknown place or relation, or a relation of one.

    Examples:
        >>> from fastclip.data.collages import Claim, holds, sample_collage
        >>> collage = sample_collage(0, objects=1)
        >>> [photo] = collage.photos
        >>> holds(Claim((photo.name,), photo.place), collage), holds(Claim(("dog",)), collage)
        (True, False)
    """

    names: tuple[str, ...]
    place: str | None = None
    relation: str | None = None

    def __post_init__(self) -> None:
        if self.place is not None:
            check_choice("place", self.place, PLACES)
        if self.relation is not None:
            check_choice("relation", self.relation, RELATIONS)
        if not 1 + (self.relation is not None) <= len(self.names) <= 2:
            raise ValueError(
                f"the claim names {len(self.names)} classes; give one or two, and two where there "
                "is a relation"
            )


def related(a: tuple[float, float], relation: str, b: tuple[float, float]) -> bool:
    """Whether the relation is true of a photograph with center a to one with center b.

    On a diagonal two relations are true, such as "left of" and "above".
    """
    if relation in ("left of", "right of"):
        first, second = a[0], b[0]
    else:
        first, second = a[1], b[1]
    return first < second if relation in ("left of", "above") else first > second


def relation_between(a: str, b: str) -> str | None:
    """The one relation of a place to another that a caption may name, None on a diagonal.

    Args:
        a, b: two of `PLACES`.

    Examples:
        >>> from fastclip.data.collages import relation_between
        >>> relation_between("at the top left", "at the bottom left")
        'above'
    """
    true = [name for name in RELATIONS if related(CENTERS[a], name, CENTERS[b])]
    return true[0] if len(true) == 1 else None


def claim_holds(claim: Claim, centers: Centers) -> bool:
    """Whether a claim is true where the centers of the photographs are these.

    A photograph is at a place where its center lies in that quarter.
    """
    if any(name not in centers for name in claim.names):
        return False
    points = [centers[name] for name in claim.names]
    if claim.place is not None:
        sides = zip(points[0], CENTERS[claim.place], strict=True)
        if not all(found * side > 0 for found, side in sides):
            return False
    return claim.relation is None or related(points[0], claim.relation, points[1])


def holds(claim: Claim, collage: Collage) -> bool:
    """Whether the claim is true of the collage.

    Args:
        claim: what is said.
        collage: of what.

    Examples:
        >>> from fastclip.data.collages import Claim, Collage, Photo, holds
        >>> photos = (Photo("dog", "at the top left"), Photo("ship", "at the bottom right"))
        >>> collage = Collage(photos, classes=("cat", "dog", "ship"))
        >>> holds(Claim(("dog", "ship"), relation="above"), collage)
        True
        >>> holds(Claim(("cat",)), collage)
        False
    """
    return claim_holds(claim, collage.centers())


@lru_cache(maxsize=32)
def held_out(classes: tuple[str, ...]) -> frozenset[Pair]:
    """The (class, place) pairs that train, val and test do not show: 30 % of them.

    Which ones is a function of the names of the classes, in any order. Every class has one or two
    of the pairs, and every place as many as any other, give or take one.

    Args:
        classes: names, all different.

    Raises:
        ValueError: two classes have the same name.

    Examples:
        >>> from fastclip.data.collages import PLACES, held_out
        >>> pairs = held_out(("bird", "cat", "dog", "ship"))
        >>> len(pairs), {name for name, _ in pairs} == {"bird", "cat", "dog", "ship"}
        (5, True)
    """
    names = sorted(classes, key=lambda name: (hash64(*name.encode()), name))
    twice = [name for name, after in pairwise(names) if name == after]
    if twice:
        raise ValueError(f"two classes are called {twice[0]!r}; give each a name of its own")
    count = len(names)
    pairs = set()
    for number in range(round(HELD_OUT_SHARE * len(PLACES) * count)):
        rank = number
        if number >= count:
            # a second place; of the next class where this one's is the same again
            rank = number - count + (count % len(PLACES) == 0)
        pairs.add((names[rank], PLACES[number % len(PLACES)]))
    return frozenset(pairs)


def is_held_out(name: str, place: str, classes: Sequence[str]) -> bool:
    """Whether train, val and test never show a class at a place; compositional does.

    Args:
        name: of the class.
        place: one of `PLACES`.
        classes: the names of all classes.

    Raises:
        ValueError: there is no such class or place.

    Examples:
        >>> from fastclip.data.collages import PLACES, is_held_out
        >>> animals = ("bird", "cat", "dog", "horse")
        >>> [sum(is_held_out(name, place, animals) for place in PLACES) for name in animals]
        [2, 1, 1, 1]
    """
    check_choice("class", name, classes)
    check_choice("place", place, PLACES)
    return (name, place) in held_out(tuple(classes))


def has_held_out(collage: Collage) -> bool:
    """Whether some photograph is of a class at a place that is kept out of training.

    Args:
        collage: of any split.

    Examples:
        >>> from fastclip.data.collages import has_held_out, sample_collage
        >>> has_held_out(sample_collage(7)), has_held_out(sample_collage(7, split="compositional"))
        (False, True)
    """
    return not held_out(collage.classes).isdisjoint(collage.pairs())


def _different(stream: Stream, items: Sequence[T], count: int) -> list[T]:
    """So many of the items in a drawn order, none twice."""
    chosen: list[T] = []
    while len(chosen) < count:
        item = stream.choice(items)
        if item not in chosen:
            chosen.append(item)
    return chosen


def check_classes(classes: Sequence[str], objects: int | None = None) -> None:
    """Raise ValueError where classes are too few for collages and for one that is not shown."""
    most = objects or max(USUAL_PHOTOS)
    if len(classes) <= most:
        raise ValueError(
            f"{len(classes)} classes are too few for collages of {most} photographs of different "
            f"classes: give at least {most + 1}, as a false caption names a class that is not "
            "shown, or fewer objects"
        )


def sample_collage(
    seed: int,
    *,
    split: str = "train",
    classes: Sequence[str] = SHAPES,
    objects: int | None = None,
) -> Collage:
    """The collage that the arguments name, the same on every platform.

    Args:
        seed: any integer in [0, 2**64).
        split: "train", "val" or "test", different draws in which no class is at a place that is
            held out for it; or "compositional", where at least one is.
        classes: names of the classes, at least one more than there are photographs.
        objects: number of photographs, 1 to 4; None draws two or three.

    Raises:
        ValueError: an argument is outside its range, or there are too few classes.

    Examples:
        >>> from fastclip.data.collages import sample_collage
        >>> collage = sample_collage(7, split="val", objects=2)
        >>> len(collage.photos), collage == sample_collage(7, split="val", objects=2)
        (2, True)
    """
    check_choice("split", split, SPLITS)
    seed = check_seed(seed)
    if objects not in (None, *range(1, MAX_PHOTOS + 1)):
        raise ValueError(f"objects is {objects}; use 1 to {MAX_PHOTOS}, or None to draw the number")
    check_classes(classes, objects)
    classes = tuple(classes)
    apart = held_out(classes)
    split_index = SPLITS.index(split)
    stream = Stream(_COLLAGE_KEY, split_index, seed)
    count = stream.choice(USUAL_PHOTOS)
    count = objects or count
    allowed: list[tuple[str, ...]] = []
    while not allowed:
        # all classes alike; their places may leave none of the allowed ways
        names = _different(stream, classes, count)
        allowed = [
            places
            for places in permutations(PLACES, count)
            if apart.isdisjoint(zip(names, places, strict=True)) != (split == "compositional")
        ]
    pairs = zip(names, stream.choice(allowed), strict=True)
    photos = tuple(Photo(name, place, stream.bits()) for name, place in pairs)
    # The last bits name the split: no collage of one split can equal a collage of another.
    return Collage(photos, classes, split, seed=(stream.bits() & ~3) | split_index)
