"""A contact sheet: images with their captions beneath, to see what a model will see."""

from collections.abc import Iterator, Sequence
from itertools import islice

from PIL import Image, ImageDraw, ImageFont, ImageOps

# Of a caption beneath its image; enough for five sentences.
CAPTION_LINES = 40


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int = 4, size: int = 128
) -> Image.Image:
    """A white sheet of images, columns wide, with each caption wrapped beneath its image.

    Args:
        images: at least one; each is fitted into a square.
        captions: one for each image; what takes more than 40 lines is cut.
        columns: images in a row.
        size: side of a square, in pixels.

    Raises:
        ValueError: no images, another number of captions, or columns below 1.
    """
    if not images or len(images) != len(captions):
        raise ValueError(
            f"got {len(images)} images and {len(captions)} captions; give one caption for each "
            "image, and at least one"
        )
    if columns < 1:
        raise ValueError(f"columns is {columns}; use 1 or more")
    margin, line_height = 8, 14
    font = ImageFont.load_default()
    texts = [fitted_lines(caption, font, size, CAPTION_LINES) for caption in captions]
    rows = [texts[i : i + columns] for i in range(0, len(texts), columns)]
    heights = [size + 4 + line_height * max(map(len, row)) + margin for row in rows]
    width = margin + columns * (size + margin)
    sheet = Image.new("RGB", (width, margin + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top, index = margin, 0
    for row, height in zip(rows, heights, strict=True):
        for column, lines in enumerate(row):
            left = margin + column * (size + margin)
            fitted = ImageOps.contain(images[index], (size, size), Image.Resampling.BICUBIC)
            sheet.paste(fitted, (left, top))
            for k, line in enumerate(lines):
                draw.text((left, top + size + 4 + k * line_height), line, fill="black", font=font)
            index += 1
        top += height
    return sheet


def wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> Iterator[str]:
    """The text in lines of at most so many pixels, long words broken; at least one line.

    Args:
        text: of any length; blanks and line breaks part its words.
        font: that it is drawn in.
        width: of a line, in pixels.
    """
    line = ""
    for word in text.split():
        joined = f"{line} {word}".strip()
        # to measure a long text takes long
        if len(joined) <= width and font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            yield line
            line = ""
        for letter in word:
            if line and font.getlength(line + letter) > width:
                yield line
                line = ""
            line += letter
    yield line


def fitted_lines(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int
) -> list[str]:
    """As `wrapped`, at most so many lines; of a longer text the last ends in dots, at a word."""
    lines = list(islice(wrapped(text, font, width), most + 1))
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(f"{last}...") > width:
        last = last.rpartition(" ")[0] or last[:-1]
    return [*lines[: most - 1], f"{last}..."]
