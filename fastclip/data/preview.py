"""A contact sheet: images with their captions beneath, to see what a model will see."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int = 4, size: int = 128
) -> Image.Image:
    """A white sheet of images, columns wide, with each caption wrapped beneath its image.

    Args:
        images: at least one; each is fitted into a square.
        captions: one for each image.
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
    texts = [wrapped(caption, font, size) for caption in captions]
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


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines of at most so many pixels, long words broken.

    Args:
        text: of any length; blanks and line breaks part its words.
        font: that it is drawn in.
        width: of a line, in pixels.
    """
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def fitted_lines(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int
) -> list[str]:
    """As `wrapped`, at most so many lines; of a longer text the last ends in dots, at a word."""
    lines = wrapped(text, font, width)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(f"{last}...") > width:
        last = last.rpartition(" ")[0] or last[:-1]
    return [*lines[: most - 1], f"{last}..."]
