"""Whether two forms of one model give the same features, tried on a few samples."""

import math

import torch
from torch import Tensor

from fastclip.models.clip import Model

# short, empty, with words that no small vocabulary has, and longer than any context
TEXTS = ["a photo of a dog", "", "zyxwv 42!", "many words " * 500]


def sample_images(model: Model, count: int) -> Tensor:
    """Noise as the model's transform would give it, (count, 3, H, W)."""
    size = model.preprocess_config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    # the process's own stream of numbers stays where it is
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, height, width, generator=generator)


def require_same(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Refuse features that differ.

    Args:
        found, wanted: (N, D), normalized.
        tolerance: the greatest difference of a value.
        what: has the features, for the message.

    Raises:
        ValueError: they differ, or are no numbers.
    """
    difference = math.inf
    if found.shape == wanted.shape:
        difference = (found - wanted).abs().max().item()
    # so that NaN does not pass
    if not difference <= tolerance:
        raise ValueError(
            f"{what} gives other features: they differ by {difference:.1e}, more than "
            f"{tolerance:.0e}; nothing was written, please report it with `fastclip info`"
        )
