"""What collages show and say, read from pixels and words alone."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
CLASSES = ("airplane", "automobile", *ANIMALS, "ship", "truck")
EACH = 30
PLACES = [f"at the {row} {column}" for row in ("top", "bottom") for column in ("left", "right")]

Grid = dict[str, tuple[int, int]]
Facts = list[tuple[str, ...]]

_TOKENS = re.compile(
    rf"\b(?P<noun>{'|'.join(CLASSES)})\b"
    r"|\bat the (?P<place>(?:top|bottom) (?:left|right))\b"
    r"|\b(?:to the )?(?P<relation>left of|right of|above|below)\b",
    re.IGNORECASE,
)


def write_photographs(folder: Path, classes: tuple[str, ...] = CLASSES, each: int = EACH) -> Path:
    """A folder of class folders; an image's one color says its class and its number."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            color = (10 + 20 * label, 200, number)
            Image.new("RGB", (32, 32), color).save(folder / name / f"{number:03}.png")
    return folder


def shown(image: Image.Image) -> tuple[Grid, dict[str, int]]:
    """The (row, column) of each class that a collage of such photographs shows, and its number."""
    assert image.size == (64, 64) and image.mode == "RGB"
    pixels = np.asarray(image)
    grid, numbers = {}, {}
    for row in range(2):
        for column in range(2):
            quarter = pixels[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            color = quarter[0, 0]
            assert (quarter == color).all()
            if (color == 128).all():
                continue
            assert color[1] == 200
            name = CLASSES[(int(color[0]) - 10) // 20]
            assert name not in grid
            grid[name], numbers[name] = (row, column), int(color[2])
    return grid, numbers


def facts_of(sentence: str) -> Facts:
    """What a sentence says: ("shown", class), ("at", class, place), (relation, class, class)."""
    found = [(str(m.lastgroup), m[str(m.lastgroup)].lower()) for m in _TOKENS.finditer(sentence)]
    nouns = [value for kind, value in found if kind == "noun"]
    facts: Facts = [("shown", noun) for noun in nouns]
    for kind, value in found:
        if kind == "place":
            facts.append(("at", nouns[0], value))
        elif kind == "relation":
            facts.append((value, nouns[0], nouns[1]))
    return facts


def all_facts(text: str) -> Facts:
    """Those of all of its sentences."""
    return [fact for sentence in text.split(".") for fact in facts_of(sentence)]


def is_fact(fact: tuple[str, ...], grid: Grid) -> bool:
    kind, name, *rest = fact
    if name not in grid or (kind not in ("shown", "at") and rest[0] not in grid):
        return False
    if kind == "shown":
        return True
    (row, column), (other,) = grid[name], rest
    if kind == "at":
        return (("top", "bottom")[row], ("left", "right")[column]) == tuple(other.split())
    other_row, other_column = grid[other]
    return {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[kind]
