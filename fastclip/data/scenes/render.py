"""Draws scene graphs, deterministically and fast enough to render while training.

Each object is drawn as a mask on a small patch at OVERSAMPLING times the resolution, reduced with
a box filter, and pasted in its color: only the pixels near objects are paid for. Backgrounds are
cut from cached tiles of twice the image's side, which leaves room to move, rotate and shrink them.
Backgrounds are near neutral and objects are saturated, so that none hides in the other.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from fastclip.data.scenes.world import Object, Scene
from fastclip.data.streams import Stream

RGB = tuple[int, int, int]
Contour = tuple[tuple[float, float], ...]

OVERSAMPLING = 4
# Tiles of each background kind; the seed also chooses where the tile is cut.
TILE_VARIANTS = 8
# Each channel of an object's color differs from the palette's by at most this many levels.
TINT_JITTER = 10

PALETTE_RGB: dict[str, dict[str, RGB]] = {
    "standard": {
        "red": (220, 35, 40),
        "yellow": (245, 210, 25),
        "green": (40, 165, 65),
        "cyan": (40, 205, 215),
        "blue": (45, 80, 225),
        "purple": (135, 45, 175),
        "pink": (245, 125, 185),
        "brown": (135, 80, 35),
    },
    "deep": {
        "red": (150, 12, 22),
        "yellow": (205, 170, 0),
        "green": (15, 100, 40),
        "cyan": (0, 145, 155),
        "blue": (20, 35, 145),
        "purple": (85, 15, 120),
        "pink": (225, 60, 145),
        "brown": (90, 50, 20),
    },
    "soft": {
        "red": (240, 85, 75),
        "yellow": (250, 235, 115),
        "green": (120, 205, 120),
        "cyan": (145, 235, 235),
        "blue": (110, 145, 250),
        "purple": (175, 115, 220),
        "pink": (255, 175, 215),
        "brown": (175, 125, 80),
    },
}

PLAIN_RGB: dict[str, RGB] = {
    "white": (250, 250, 250),
    "gray": (140, 140, 140),
    "black": (20, 20, 20),
    "beige": (236, 224, 202),
}
# The two tones of a patterned background: light, middling and dark pairs.
_TONES = ((242, 206), (214, 176), (150, 116), (84, 52), (46, 22))
_SAMPLE_KEY, _TILE_KEY, _NOISE_KEY = 101, 102, 103
# Numbers that a background takes from a scene's stream, before the objects do.
_BACKGROUND_DRAWS = 3


@cache
def _unit_contours(shape: str) -> tuple[Contour, ...]:
    """The shape's closed contours in the unit disc, y downwards; a second contour is a hole."""
    if shape == "circle":
        return (_regular(40, 0.9),)
    if shape == "ring":
        return (_regular(40, 0.95), _regular(40, 0.5))
    if shape == "square":
        return (_regular(4, 1.0, math.pi / 4),)
    if shape == "triangle":
        return (_regular(3, 1.0),)
    if shape == "diamond":
        return (((0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)),)
    if shape == "star":
        radii = (1.0, 0.43)
        return (tuple(_polar(radii[i % 2], i * math.pi / 5) for i in range(10)),)
    if shape == "cross":
        arm, end = 0.33, 0.94
        quarter = [(-arm, -end), (arm, -end), (arm, -arm)]
        turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]
        return (tuple((x * c - y * s, x * s + y * c) for c, s in turns for x, y in quarter),)
    # The heart curve of sines and cosines, moved to the middle and scaled to the disc.
    steps = [2 * math.pi * i / 40 for i in range(40)]
    heart = [
        (
            16 * math.sin(t) ** 3,
            5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) - 13 * math.cos(t) - 2,
        )
        for t in steps
    ]
    reach = max(math.hypot(x, y) for x, y in heart)
    return (tuple((x / reach, y / reach) for x, y in heart),)


def _polar(radius: float, angle: float) -> tuple[float, float]:
    return radius * math.sin(angle), -radius * math.cos(angle)


def _regular(corners: int, radius: float, turn: float = 0.0) -> Contour:
    return tuple(_polar(radius, 2 * math.pi * i / corners + turn) for i in range(corners))


class _Patch:
    """The square of pixels around one object, and masks of the object drawn on it."""

    def __init__(self, scene: Scene, obj: Object, size: int) -> None:
        x, y = scene.view.apply(obj.x, obj.y)
        x, y, radius = x * size, y * size, obj.radius * size
        self.stroke = max(1.3, 0.022 * size) * OVERSAMPLING
        self.radius = radius * OVERSAMPLING
        half = math.ceil(radius * scene.view.scale * 1.1) + 2
        self.corner = (math.floor(x) - half, math.floor(y) - half)
        self.side = 2 * half + 1
        self.origin = (
            (x - self.corner[0]) * OVERSAMPLING,
            (y - self.corner[1]) * OVERSAMPLING,
        )
        a, b, c, d = scene.view.matrix()
        # A stroke is centered on the contour and must not widen the object.
        r = self.radius if scene.style == "filled" else self.radius - self.stroke / 2
        self.matrix = (a * r, b * r, c * r, d * r)
        self.contours = [self.placed(contour) for contour in _unit_contours(obj.shape)]

    def placed(self, contour: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """The contour of the unit disc in the patch's oversampled pixels."""
        a, b, c, d = self.matrix
        x0, y0 = self.origin
        return [(a * x + b * y + x0, c * x + d * y + y0) for x, y in contour]

    def canvas(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        image = Image.new("L", (self.side * OVERSAMPLING,) * 2)
        return image, ImageDraw.Draw(image)

    def fill(self) -> Image.Image:
        """The oversampled mask of the shape."""
        mask, draw = self.canvas()
        for contour, ink in zip(self.contours, (255, 0), strict=False):
            draw.polygon(contour, fill=ink)
        return mask

    def outline(self, width: float) -> Image.Image:
        """The oversampled mask of the contours, width oversampled pixels thick."""
        mask, draw = self.canvas()
        for contour in self.contours:
            # One point more than closed, so that the last corner is joined as well.
            draw.line([*contour, *contour[:2]], fill=255, width=round(width), joint="curve")
        return mask


def _sketch_lines(patch: _Patch, obj: Object, stream: Stream) -> Image.Image:
    """Three shaky passes over the contours, as of a pencil."""
    mask, draw = patch.canvas()
    for _ in range(3):
        dx, dy = stream.uniform(-0.08, 0.08), stream.uniform(-0.08, 0.08)
        grow, turn = stream.uniform(0.86, 1.02), stream.uniform(-0.1, 0.1)
        for contour in _unit_contours(obj.shape):
            points = []
            for (x, y), (x2, y2) in zip(contour, (*contour[1:], contour[0]), strict=True):
                steps = max(1, round(math.hypot(x2 - x, y2 - y) / 0.4))
                for k in range(steps):
                    px, py = x + (x2 - x) * k / steps, y + (y2 - y) * k / steps
                    wobble = stream.uniform(-0.02, 0.02)
                    points.append(
                        (grow * (px - turn * py) + dx + wobble, grow * (py + turn * px) + dy)
                    )
            placed = patch.placed(points)
            draw.line([*placed, *placed[:2]], fill=255, width=round(0.6 * patch.stroke))
    return mask


def _hatching(patch: _Patch, stream: Stream) -> Image.Image:
    mask, draw = patch.canvas()
    side, step = patch.side * OVERSAMPLING, 2.2 * patch.stroke
    rising = stream.below(2) == 0
    at = stream.uniform(0.0, step) - side
    while at < side:
        ends = [(at, side), (at + side, 0)] if rising else [(at, 0), (at + side, side)]
        draw.line(ends, fill=255, width=round(0.75 * patch.stroke))
        at += step
    return mask


def _stipple(patch: _Patch, stream: Stream) -> Image.Image:
    mask, draw = patch.canvas()
    side, step, dot = patch.side * OVERSAMPLING, 1.8 * patch.stroke, 0.62 * patch.stroke
    start, row = stream.uniform(0.0, step), 0
    y = start
    while y < side:
        x = start - (row % 2) * step / 2
        while x < side + step:
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=255)
            x += step
        y, row = y + 0.87 * step, row + 1
    return mask


@lru_cache(maxsize=32)
def _highlight(side: int) -> Image.Image:
    """A soft light from the upper left, as a mask."""
    light = Image.radial_gradient("L").point([max(0, 125 - level) for level in range(256)])
    # The gradient's center is moved a fifth of the patch up and to the left.
    moved = light.transform((256, 256), Image.Transform.AFFINE, (1, 0, 48, 0, 1, 48))
    return moved.resize((side, side), Image.Resampling.BILINEAR)


def _shade(color: RGB, factor: float) -> RGB:
    red, green, blue = (round(level * factor) for level in color)
    return red, green, blue


def _draw_object(image: Image.Image, scene: Scene, obj: Object, color: RGB, seed: int) -> None:
    patch = _Patch(scene, obj, image.width)
    stream = Stream(seed)

    def paste(ink: RGB, mask: Image.Image) -> None:
        image.paste(ink, patch.corner, mask.reduce(OVERSAMPLING))

    if scene.style == "filled":
        paste(color, patch.fill())
    elif scene.style == "bordered":
        paste(color, patch.fill())
        paste(_shade(color, 0.3), patch.outline(0.8 * patch.stroke))
    elif scene.style == "shaded":
        mask = patch.fill()
        paste(_shade(color, 0.88), mask)
        paste((255, 255, 255), ImageChops.multiply(mask, _highlight(mask.width)))
    elif scene.style == "outline":
        paste(color, patch.outline(patch.stroke))
    elif scene.style == "sketch":
        paste(color, _sketch_lines(patch, obj, stream))
    elif scene.style == "hatched":
        lines = ImageChops.multiply(patch.fill(), _hatching(patch, stream))
        paste(color, ImageChops.lighter(lines, patch.outline(0.8 * patch.stroke)))
    else:
        paste(color, ImageChops.multiply(patch.fill(), _stipple(patch, stream)))


def _random_bytes(count: int, *keys: int) -> np.ndarray:
    """Uniform bytes; NumPy guarantees a bit generator's raw stream, not its distributions."""
    words = np.random.PCG64(list(keys)).random_raw(-(-count // 8))
    return words.astype("<u8").view(np.uint8)[:count]


def _noise_field(cells: int, side: int, key: int) -> np.ndarray:
    """Smooth noise in [0, 1] with cells x cells knots, of shape (side, side)."""
    knots = Image.fromarray(_random_bytes(cells * cells, _TILE_KEY, key).reshape(cells, cells))
    smooth = knots.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) / 255


def _pattern(kind: str, side: int, stream: Stream) -> np.ndarray:
    """The mix of the two tones, in [0, 1], of a tile that spans two sides of the image."""
    axis = (np.arange(side, dtype=np.float32) + 0.5) * (2.0 / side)
    u, v = axis[None, :], axis[:, None]
    if kind == "gradient":
        angle = stream.uniform(0.0, 2 * math.pi)
        return 0.5 + 0.5 * ((u - 1) * math.cos(angle) + (v - 1) * math.sin(angle))
    if kind == "striped":
        angle, rate = stream.below(4) * math.pi / 4, stream.uniform(3.5, 7.0)
        return (u * math.cos(angle) + v * math.sin(angle)) * rate % 1 < 0.5
    rate = stream.uniform(4.0, 7.0)
    if kind == "checkered":
        return (np.floor(u * rate) + np.floor(v * rate)) % 2
    if kind == "speckled":
        return _noise_field(96, side, stream.bits())
    if kind == "dotted":
        return np.hypot(u * rate % 1 - 0.5, v * rate % 1 - 0.5) < 0.27
    if kind == "gridded":
        return (u * rate % 1 < 0.16) | (v * rate % 1 < 0.16)
    if kind == "wavy":
        return (v + 0.05 * np.sin(2 * math.pi * rate * 0.5 * u)) * rate % 1 < 0.5
    if kind == "cloudy":
        coarse, fine = _noise_field(7, side, stream.bits()), _noise_field(17, side, stream.bits())
        return np.clip(1.6 * (0.65 * coarse + 0.35 * fine) - 0.3, 0.0, 1.0)
    course = v * rate
    return (course % 1 < 0.15) | ((u * rate / 2 + 0.5 * (np.floor(course) % 2)) % 1 < 0.075)


@lru_cache(maxsize=128)
def _tile(kind: str, variant: int, size: int) -> Image.Image:
    """A background of twice the image's side, to cut images from."""
    stream = Stream(_TILE_KEY, sum(kind.encode()), variant)
    jitter = [stream.uniform(-2.5, 2.5) for _ in range(3)]
    if kind in PLAIN_RGB:
        plain = tuple(min(255, round(x + j)) for x, j in zip(PLAIN_RGB[kind], jitter, strict=True))
        return Image.new("RGB", (2 * size, 2 * size), plain)
    first, second = _TONES[variant % len(_TONES)]
    if kind == "gradient":
        # An image shows half of the tile, so that half must span a visible difference.
        first, second = min(250, first + 30), max(10, second - 70)
    mix = np.broadcast_to(_pattern(kind, 4 * size, stream), (4 * size, 4 * size))
    gray = first + (second - first) * mix.astype(np.float32)
    levels = np.clip(gray[:, :, None] + np.array(jitter, dtype=np.float32), 0, 255)
    return Image.fromarray(np.rint(levels).astype(np.uint8)).reduce(2)


def _background(scene: Scene, size: int, stream: Stream) -> Image.Image:
    tile = _tile(scene.background, stream.below(TILE_VARIANTS), size)
    left, top = stream.below(size + 1), stream.below(size + 1)
    if scene.view.matrix() == (1.0, 0.0, 0.0, 1.0):
        return tile.crop((left, top, left + size, top + size))
    a, b, c, d = scene.view.matrix()
    det = a * d - b * c
    a, b, c, d = d / det, -b / det, -c / det, a / det
    half = size / 2
    # From the middle of the tile: only from there does it cover a shrunk and rotated view.
    move = (size - (a + b) * half, size - (c + d) * half)
    return tile.transform(
        (size, size),
        Image.Transform.AFFINE,
        (a, b, move[0], c, d, move[1]),
        Image.Resampling.BILINEAR,
    )


def _corrupted(image: Image.Image, kind: str, severity: int, seed: int) -> Image.Image:
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(image.width * (0.008 + 0.007 * severity)))
    if kind == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=(20, 12, 6)[severity - 1])
        buffer.seek(0)
        return Image.open(buffer).convert("RGB")
    pixels = np.asarray(image, dtype=np.float32)
    if kind == "contrast":
        pixels = pixels.mean() + (0.55, 0.4, 0.28)[severity - 1] * (pixels - pixels.mean())
    else:
        # The sum of four uniform bytes is close to a normal variable of deviation 148.
        noise = _random_bytes(4 * pixels.size, _NOISE_KEY, seed).reshape(4, *pixels.shape)
        deviation = (12.0, 22.0, 34.0)[severity - 1]
        pixels = pixels + (noise.sum(axis=0, dtype=np.float32) - 510) * (deviation / 147.8)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _paints(scene: Scene, stream: Stream) -> list[tuple[RGB, int]]:
    """Each object's color and the seed of its texture."""
    paints = []
    for obj in scene.objects:
        jitter = [stream.below(2 * TINT_JITTER + 1) - TINT_JITTER for _ in range(3)]
        levels = zip(PALETTE_RGB[scene.palette][obj.color], jitter, strict=True)
        red, green, blue = (min(255, max(0, level + j)) for level, j in levels)
        paints.append(((red, green, blue), stream.bits()))
    return paints


def object_colors(scene: Scene) -> list[RGB]:
    """The color that `render` gives each object: the palette's, tinted."""
    stream = Stream(_SAMPLE_KEY, scene.seed)
    for _ in range(_BACKGROUND_DRAWS):
        stream.bits()
    return [color for color, _ in _paints(scene, stream)]


def render(scene: Scene, size: int = 64) -> Image.Image:
    """The scene as an RGB image of size x size pixels, the same for equal arguments.

    Another build of Pillow or NumPy may round differently, and its JPEG encoder may differ.

    Args:
        scene: what to draw.
        size: side of the image, in pixels, at least 16; 64 or more to distinguish shapes.

    Raises:
        ValueError: the size is below 16 pixels: a small object would be three pixels wide.

    Examples:
        >>> from fastclip.data.scenes import render, sample_scene
        >>> image = render(sample_scene(7), size=64)
        >>> image.size, image.mode
        ((64, 64), 'RGB')
    """
    if size < 16:
        raise ValueError(
            f"size is {size}; use at least 16 pixels, 64 or more to distinguish shapes"
        )
    stream = Stream(_SAMPLE_KEY, scene.seed)
    image = _background(scene, size, stream)
    for obj, (color, seed) in zip(scene.objects, _paints(scene, stream), strict=True):
        _draw_object(image, scene, obj, color, seed)
    if scene.corruption is not None:
        image = _corrupted(image, scene.corruption, scene.severity, stream.bits())
    return image
