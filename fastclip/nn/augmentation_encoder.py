"""UniCLIP's augmentation-aware image head (Lee et al. 2022, section 3.3).

The image tower sees pixels alone. An encoder embeds how a view was made, and the head projects the
tower's feature together with that embedding, so that views of one image may differ where their
augmentations do and still be near in the common space.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.nn.heads import linear_head


class AugmentationEncoder(nn.Module):
    """An MLP over the vector of a view's augmentation parameters.

    Args:
        params: entries of the vector; `fastclip.data.augment.PARAMS` for a batch's `params`.
        widths: of the layers; the last is the embedding's.

    Attributes:
        width: of the embedding.

    Raises:
        ValueError: a width below 1, or none.

    Examples:
        >>> import torch
        >>> from fastclip.data.augment import PARAMS, AugmentationParams
        >>> from fastclip.nn.augmentation_encoder import AugmentationEncoder
        >>> encoder = AugmentationEncoder(PARAMS)
        >>> view = AugmentationParams.identity(224, 224).encode(224, 224)
        >>> encoder(view[None]).shape
        torch.Size([1, 128])
    """

    def __init__(self, params: int, widths: Sequence[int] = (128, 128, 128)) -> None:
        super().__init__()
        if not widths or min(widths) < 1 or params < 1:
            raise ValueError(f"params is {params} and widths {tuple(widths)}; give each at least 1")
        self.width = widths[-1]
        sizes = (params, *widths)
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))

    def forward(self, params: Tensor) -> Tensor:
        """The embeddings, (N, last width).

        Args:
            params: (N, params), the views' vectors.
        """
        for layer in self.layers[:-1]:
            params = F.relu(layer(params))
        return self.layers[-1](params)


class ResidualHead(nn.Module):
    """Residual blocks that see a condition, then a linear projection.

    A block adds W2 relu(W1 [h, condition]) to h. W2 begins as zero, so that the head begins as the
    plain projection and learns what the condition changes.

    Args:
        width: of the feature.
        condition: width of the condition.
        output: width of the projection.
        blocks: number of residual blocks.
        hidden: inner width of a block; None: `width`.

    Raises:
        ValueError: a width below 1, or a negative number of blocks.

    Examples:
        >>> import torch
        >>> from fastclip.nn.augmentation_encoder import ResidualHead
        >>> head = ResidualHead(width=512, condition=128, output=256)
        >>> features, condition = torch.randn(4, 512), torch.randn(4, 128)
        >>> head(features, condition).equal(head.project(features))  # before training
        True
    """

    def __init__(
        self, width: int, condition: int, output: int, *, blocks: int = 3, hidden: int | None = None
    ) -> None:
        super().__init__()
        hidden = width if hidden is None else hidden
        if min(width, condition, output, hidden) < 1 or blocks < 0:
            raise ValueError(
                f"width {width}, condition {condition}, output {output}, hidden {hidden}, blocks "
                f"{blocks}: give widths of at least 1 and 0 blocks or more"
            )
        self.enter = nn.ModuleList(nn.Linear(width + condition, hidden) for _ in range(blocks))
        leave = [nn.Linear(hidden, width) for _ in range(blocks)]
        for layer in leave:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.leave = nn.ModuleList(leave)
        self.project = linear_head(width, output)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """The projections, (N, output).

        Args:
            features: (N, width).
            condition: (N, condition), of each feature.
        """
        for enter, leave in zip(self.enter, self.leave, strict=True):
            features = features + leave(F.relu(enter(torch.cat([features, condition], dim=1))))
        return self.project(features)
