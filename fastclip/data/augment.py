"""Training augmentation: parameters drawn here, applied by torchvision.

The parameters are a pure function of the random state given, so the same numbers can be replayed
on the original image, and later be handed to a model.
"""

import math
import random
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop and horizontal flip.

    Args:
        size: side of the square output, in pixels.
        scale: least and greatest share of the image's area that a crop keeps.
        ratio: least and greatest width / height of a crop.
        flip: probability of a horizontal flip.

    Raises:
        ValueError: a range is empty or outside what it can mean.
    """

    size: int
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"crop scale is {self.scale}; give 0 < least <= greatest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"crop ratio is {self.ratio}; give 0 < least <= greatest")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip probability is {self.flip}; give a number in [0, 1]")


@dataclass(frozen=True)
class View:
    """The parameters of one augmented view: crop box in pixels of the original, and flip."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw_view(augmentation: Augmentation, width: int, height: int, rng: random.Random) -> View:
    """Draw the parameters for an image of `width` x `height` pixels.

    The crop is Inception's (Szegedy et al. 2015, section 6): area and aspect ratio drawn until
    the box fits, ten times at most, then the largest central box within the ratio's bounds.
    """
    least, greatest = augmentation.ratio
    box = None
    for _ in range(10):
        area = width * height * rng.uniform(*augmentation.scale)
        ratio = math.exp(rng.uniform(math.log(least), math.log(greatest)))
        crop_width = round(math.sqrt(area * ratio))
        crop_height = round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.random() * (height - crop_height + 1))
            left = int(rng.random() * (width - crop_width + 1))
            box = (top, left, crop_height, crop_width)
            break
    if box is None:
        crop_width = max(1, min(width, round(height * greatest)))
        crop_height = max(1, min(height, round(width / least)))
        box = ((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)
    return View(*box, flip=rng.random() < augmentation.flip)


def apply_view(image: Image.Image, view: View, size: int) -> Tensor:
    """The view of an RGB image as a (3, size, size) uint8 tensor."""
    box = [view.top, view.left, view.height, view.width]
    cropped = tv.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
    pixels: Tensor = tv.pil_to_tensor(cropped)
    return torch.flip(pixels, dims=(2,)) if view.flip else pixels
