"""The pixels of a view on the host: one definition of each step, which DALI's pipeline follows too.

torch resizes 8-bit images in integers, three times as fast as Pillow and to within a mean of 0.3
levels of it. The steps after it are elementwise and in one thread, so that the bits do not depend
on the number of threads or loader processes.

Each step rounds and clamps to 8 bits, as image libraries do; so their order matters.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastclip.data.augment import COLOR_STEPS, AugmentationParams, Hue, blur_radius
from fastclip.data.jpeg import as_tensor

# ITU-R BT.601, as Pillow, torchvision and DALI use it
GRAY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
# Of the NTSC color space: luma, and two axes of color that a turn of the hue mixes
RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


def render_view(image: Tensor, params: AugmentationParams, size: int, hue: Hue = "yiq") -> Tensor:
    """A view of an image.

    Args:
        image: (3, H, W) uint8, best with channels innermost.
        params: of the view.
        size: side of the view, in pixels.
        hue: "yiq" turns colors about the gray axis, which is linear; "hsv" is torchvision's,
            which DALI does not have.

    Returns:
        (3, size, size) uint8.

    Examples:
        >>> import torch
        >>> from fastclip.data.augment import AugmentationParams
        >>> from fastclip.data.views import render_view
        >>> image = torch.randint(256, (3, 48, 64), dtype=torch.uint8)
        >>> params = AugmentationParams(top=0, left=16, height=48, width=48, flip=True)
        >>> render_view(image, params, size=32).shape
        torch.Size([3, 32, 32])
    """
    p = params
    crop = image[None, :, p.top : p.top + p.height, p.left : p.left + p.width]
    # the fast way, and to all callers the same one
    crop = crop.contiguous(memory_format=torch.channels_last)
    view = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
    if p.flip:
        view = view.flip(2)
    if not (p.jitter or p.gray or p.sigma or p.solarize < 256):
        return view.contiguous()
    pixels = view.numpy().astype(np.float32, order="C")
    pixels = recolor(pixels, params, hue)
    if p.sigma:
        pixels = blur(pixels, p.sigma)
    return torch.from_numpy(solarize(pixels, p.solarize).astype(np.uint8))


def replay(
    image: Image.Image | Tensor,
    params: AugmentationParams | Tensor,
    size: int,
    hue: Hue = "yiq",
) -> Tensor:
    """The view of an original image that its augmentation parameters describe.

    Args:
        image: RGB, or (3, H, W) uint8.
        params: of the view, or its vector of a batch's `params`.
        size: side of the view, in pixels.
        hue: "yiq" or "hsv", as it was made with.

    Returns:
        (3, size, size) uint8: the delivered view, to the bit where torchvision's pipeline made it.

    Raises:
        ValueError: the vector cannot be of this image.

    Examples:
        >>> import random
        >>> from fastclip.data.augment import Augmentation, draw_view
        >>> from fastclip.data.scenes import render, sample_scene
        >>> from fastclip.data.views import replay
        >>> image = render(sample_scene(7))
        >>> params = draw_view(Augmentation.strong(32), *image.size, random.Random(0))
        >>> replay(image, params, 32).equal(replay(image, params.encode(*image.size), 32))
        True
    """
    pixels = image if isinstance(image, Tensor) else as_tensor(image.convert("RGB"))
    if isinstance(params, Tensor):
        params = AugmentationParams.decode(params, pixels.shape[2], pixels.shape[1])
    return render_view(pixels, params, size, hue)


def recolor(pixels: np.ndarray, params: AugmentationParams, hue: Hue) -> np.ndarray:
    """Color jitter and gray, those that a view has."""
    if params.jitter:
        for step in params.order:
            pixels = _color_step(pixels, COLOR_STEPS[step], params, hue)
    return saturate(pixels, 0.0) if params.gray else pixels


def solarize(pixels: np.ndarray, least: int) -> np.ndarray:
    """Levels from `least` on inverted."""
    return np.where(pixels >= least, 255 - pixels, pixels) if least < 256 else pixels


def brighten(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Levels times a factor. This and the steps below take and give (3, H, W) float32."""
    return _rounded(pixels * np.float32(factor))


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Distances from the image's mean gray level times a factor."""
    center = float(pixels.reshape(3, -1).mean(axis=1) @ GRAY)
    return _rounded(pixels * np.float32(factor) + np.float32((1 - factor) * center))


def saturate(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Distances from each pixel's gray level times a factor; 0 takes all color out."""
    red, green, blue = pixels
    gray = GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue
    return _rounded(pixels * np.float32(factor) + gray * np.float32(1 - factor))


def turn_hue(pixels: np.ndarray, turn: float) -> np.ndarray:
    """Colors turned about the gray axis, in YIQ, by a share of the full circle: red to yellow."""
    angle = -2 * math.pi * turn
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    matrix = (np.linalg.inv(RGB_TO_YIQ) @ rotation @ RGB_TO_YIQ).astype(np.float32)
    red, green, blue = pixels
    rows = [row[0] * red + row[1] * green + row[2] * blue for row in matrix]
    return _rounded(np.stack(rows))


def blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur to `blur_radius`, the image mirrored at its edge pixels."""
    distances = np.arange(blur_radius(sigma) + 1)
    weights = np.exp(-(distances**2) / (2 * sigma**2))
    weights = (weights / (2 * weights.sum() - weights[0])).astype(np.float32)
    blurred = np.empty_like(pixels)
    # one channel at a time stays in the cache
    for channel, out in zip(pixels, blurred, strict=True):
        columns = np.ascontiguousarray(_smoothed(channel, weights).T)
        out[:] = _smoothed(columns, weights).T
    return _rounded(blurred)


def _smoothed(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Each row's weighted sum with those above and below it; weights by distance."""
    radius, height = len(weights) - 1, len(rows)
    padded = np.concatenate([rows[radius:0:-1], rows, rows[-2 : -radius - 2 : -1]])
    total = padded[radius : radius + height] * weights[0]
    pair = np.empty_like(total)
    for distance in range(1, radius + 1):
        above = padded[radius - distance : radius - distance + height]
        below = padded[radius + distance : radius + distance + height]
        np.add(above, below, out=pair)
        pair *= weights[distance]
        total += pair
    return total


def _color_step(pixels: np.ndarray, step: str, params: AugmentationParams, hue: Hue) -> np.ndarray:
    if step == "brightness":
        return brighten(pixels, params.brightness)
    if step == "contrast":
        return contrast(pixels, params.contrast)
    if step == "saturation":
        return saturate(pixels, params.saturation)
    if hue == "yiq":
        return turn_hue(pixels, params.hue)
    from torchvision.transforms.v2 import functional as tv

    turned: Tensor = tv.adjust_hue(torch.from_numpy(pixels.astype(np.uint8)), params.hue)
    return turned.numpy().astype(np.float32)


def _rounded(pixels: np.ndarray) -> np.ndarray:
    np.rint(pixels, out=pixels)
    return np.clip(pixels, 0, 255, out=pixels)
