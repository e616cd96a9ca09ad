"""CLIP_benchmark's layout of webdataset folders: names and templates, and a folder a split.

    FOLDER/classnames.txt, zeroshot_classification_templates.txt
    FOLDER/SPLIT/nshards.txt, 0.tar, 1.tar, ...

Samples hold KEY.cls, or for retrieval KEY.txt with one caption a line.
"""

import os
from dataclasses import replace
from pathlib import Path

from fastclip.bounded import read_text
from fastclip.data.templates import DEFAULT_TEMPLATES, read_lines
from fastclip.evaluate.features import ImageFeatures

_COUNT = "nshards.txt"


def is_wds(data: str) -> bool:
    """Whether the data are a folder in this layout."""
    # os.path takes a name that is too long, as of many shards, for one that is not there
    return os.path.isdir(_folder(data)) and any(_folder(data).glob(f"*/{_COUNT}"))


def expand_wds(data: str, split: str = "test") -> str:
    """The pattern of a split's shards where `data` is a folder in this layout; else `data` itself.

    Raises:
        ValueError: there is no such split, or its number of shards is not a positive number.
    """
    if not is_wds(data):
        return data
    folder = _folder(data)
    count = folder / split / _COUNT
    if not count.is_file():
        known = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{_COUNT}")))
        raise ValueError(f"{data} has no split {split!r}; give --split, one of: {known}")
    text = read_text(count).strip()
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{count} holds {text[:20]!r}; it must be the number of shards, e.g. 3")
    return f"{folder / split}/{{0..{int(text) - 1}}}.tar"


def wds_classes(data: str) -> tuple[list[str], list[str]] | None:
    """Class names and prompt templates of a folder in this layout; None without class names."""
    names, templates = (
        _folder(data) / name for name in ("classnames.txt", "zeroshot_classification_templates.txt")
    )
    if not names.is_file():
        return None
    found = read_lines(templates) if templates.is_file() else list(DEFAULT_TEMPLATES)
    return read_lines(names), found


def split_captions(images: ImageFeatures) -> ImageFeatures:
    """The same images with each line of a text as a caption of its own."""
    texts = [
        tuple(line.strip() for text in own for line in text.split("\n") if line.strip())
        for own in images.texts
    ]
    return replace(images, texts=texts)


def _folder(data: str) -> Path:
    return Path(data).expanduser()
