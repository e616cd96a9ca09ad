"""A picture of retrieved examples: a text or an image in front of the images that it finds."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from fastclip.atomic import writing
from fastclip.data.order import Order
from fastclip.data.preview import fitted_lines
from fastclip.data.samples import Source
from fastclip.evaluate.features import ImageFeatures, embed_texts
from fastclip.evaluate.search import search
from fastclip.models.clip import Model

COLUMNS = 8
"""Found images in a line; more are continued on the next."""
_MARGIN, _LINE, _FRAME = 8, 15, 3
# of a caption beneath an image
_CAPTION_LINES = 2
_RIGHT, _TEXT = "#2ca02c", "#444444"
# written into a picture, so that the next one may replace it and nothing else
_SOFTWARE = "fastclip search"


class Found(NamedTuple):
    """An image that a query has found.

    right: whether the query is one of its captions, which is framed.
    caption: of its own; "" where there is none.
    """

    image: Image.Image
    score: float
    right: bool = False
    caption: str = ""


def results_sheet(
    queries: Sequence[str | Image.Image], results: Sequence[Sequence[Found]], size: int = 128
) -> Image.Image:
    """A white sheet with a row for each query: the query, then what it has found.

    Beneath an image are its score and, where any has a caption, two lines of that.

    Args:
        queries: texts or images.
        results: of each query, the best first.
        size: side of the square that an image is fitted into, in pixels.
    """
    columns = min(COLUMNS, max(map(len, results)))
    captioned = any(one.caption for found in results for one in found)
    beneath = (1 + _CAPTION_LINES * captioned) * _LINE
    cell, line = size + _MARGIN, size + beneath + _MARGIN
    label = size + size // 2
    start = label + 3 * _MARGIN
    lines = [max(1, -(-len(found) // columns)) for found in results]
    sheet = Image.new("RGB", (start + columns * cell, _MARGIN + sum(lines) * line), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    small = ImageFont.load_default(11)
    top = _MARGIN
    for query, found, count in zip(queries, results, lines, strict=True):
        if isinstance(query, str):
            _write(draw, query, (_MARGIN, top, label, size))
        else:
            _paste(sheet, query, (_MARGIN + label - size, top), size)
            edge = _MARGIN + label - size - 1
            draw.rectangle((edge, top - 1, edge + size + 1, top + size), outline="black")
        for number, (image, score, right, caption) in enumerate(found):
            down, across = divmod(number, columns)
            corner = (start + across * cell, top + down * line)
            if right:
                edges = (corner[0] - _FRAME, corner[1] - _FRAME)
                draw.rectangle((*edges, *(edge + size + 2 * _FRAME - 1 for edge in edges)), _RIGHT)
            _paste(sheet, image, corner, size)
            middle, below = corner[0] + size / 2, corner[1] + size + _FRAME
            draw.text((middle, below), f"{score:.3f}", fill=_TEXT, font=font, anchor="ma")
            for text in fitted_lines(caption, small, size, _CAPTION_LINES):
                below += _LINE
                draw.text((middle, below), text, fill=_TEXT, font=small, anchor="ma")
        top += count * line
    return sheet


def save_sheet(path: Path, sheet: Image.Image) -> None:
    """Write the sheet as PNG, marked as what may be replaced by another."""
    marks = PngInfo()
    marks.add_text("Software", _SOFTWARE)
    with writing(path) as file:
        sheet.save(file, "PNG", pnginfo=marks, optimize=True)


def require_replaceable(path: Path) -> None:
    """Refuse a path where no picture can be written, or where something else lies.

    Raises:
        ValueError: it does not end in .png, or is something that `save_sheet` has not written.
        FileNotFoundError, PermissionError: its folder does not exist, or cannot be written to.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output {path} must end in .png")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"--output {path}: the folder {path.parent} does not exist; make it"
        )
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"--output {path}: the folder {path.parent} cannot be written to")
    if path.exists() and not _is_marked(path):
        raise ValueError(
            f"--output {path} exists and is no picture of fastclip search, so it is not replaced; "
            "give another name"
        )


def _is_marked(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return bool(image.info.get("Software") == _SOFTWARE)
    # of a damaged file Pillow raises more than OSError
    except Exception:
        return False


def draw_retrieval(
    path: Path,
    model: Model,
    source: Source,
    images: ImageFeatures,
    queries: list[str],
    *,
    per_query: int = 6,
) -> None:
    """Write a PNG with one row a query: the text, then the best images, true ones framed green.

    Args:
        images: the features of all of `source`'s samples, none skipped.
        queries: texts that are captions of some of the images.

    Raises:
        ValueError: some samples of the source were skipped, so rows and features do not match.
    """
    order = Order(source.counts, seed=0, window=0)
    if len(order) != len(images.texts):
        raise ValueError(f"{len(images.texts)} features of {len(order)} samples: some were skipped")
    scores, rows = search(images.features, embed_texts(model, queries), per_query)
    results = [
        [
            Found(
                source.read(*order.locate(0, row)).image,
                score,
                query in images.texts[row],
                next(iter(images.texts[row]), ""),
            )
            for score, row in zip(*best, strict=True)
        ]
        for query, *best in zip(queries, scores.tolist(), rows.tolist(), strict=True)
    ]
    save_sheet(path, results_sheet(queries, results))


def _paste(sheet: Image.Image, image: Image.Image, corner: tuple[int, int], size: int) -> None:
    """Put an image into the middle of a light gray square, fitted into it."""
    fitted = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color="#eeeeee")
    sheet.paste(fitted, corner)


def _write(draw: ImageDraw.ImageDraw, text: str, box: tuple[int, int, int, int]) -> None:
    """A text at the right of a box (left, top, width, height), in the middle of its height."""
    left, top, width, height = box
    font = ImageFont.load_default(14)
    lines = fitted_lines(text, font, width, max(1, height // 18))
    middle = (left + width, top + height / 2)
    draw.multiline_text(
        middle, "\n".join(lines), fill="black", font=font, anchor="rm", align="right", spacing=3
    )
