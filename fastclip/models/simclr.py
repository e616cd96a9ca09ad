"""An image tower trained by contrasting views of images: a control without language.

Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations"; compared
with CLIP by Fang et al. 2022, "Data Determines Distributional Robustness in Contrastive Language
Image Pre-training".
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.functional import nt_xent_loss
from fastclip.models.image_tower import ImageSystem
from fastclip.models.options import SystemOptions
from fastclip.models.rocket import SIMCLR_TEMPERATURE, TERMS
from fastclip.models.system import Criterion, Features, View
from fastclip.nn.heads import MLPHead


class ViewCriterion(Criterion):
    """SimCLR's loss of two views (Chen et al. 2020, eq. 1) behind an MLP.

    Each view is normalized by its own batch statistics, as in SLIP (Mu et al. 2021).

    Args:
        width, hidden, output: of the features, the MLP's two hidden layers, and what it gives.
        temperature: > 0, fixed.
    """

    def __init__(self, width: int, hidden: int, output: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.projector = MLPHead([width, hidden, hidden, output], last_bias=True)

    def forward(
        self,
        features: Features,
        *,
        targets: Mapping[View, Tensor] | None = None,
        **exchange: Any,
    ) -> Tensor:
        """See `Criterion.forward`; of the features two image views, (N, width)."""
        first, second = (F.normalize(self.projector(rows), dim=1) for rows in features.images)
        return nt_xent_loss(first, second, self.temperature, **exchange)


class SimCLR(ImageSystem):
    """An image tower trained to know two views of an image from those of others.

    Args:
        visual: see `ImageSystem`.
        width: of its features.
        hidden, output, temperature: see `ViewCriterion`; by default SLIP's.
    """

    def __init__(
        self,
        visual: nn.Module,
        width: int,
        *,
        hidden: int = TERMS["slip"].widths[0],
        output: int = TERMS["slip"].widths[-1],
        temperature: float = SIMCLR_TEMPERATURE,
    ) -> None:
        super().__init__(visual, ViewCriterion(width, hidden, output, temperature), image_views=2)

    @classmethod
    def of(cls, model: Any, width: int, options: SystemOptions) -> "SimCLR":
        """With the image tower of an open_clip model, whose features have `width`."""
        widths = {"hidden": options.projector_hidden, "output": options.projector_width}
        return cls(model.visual, width, **{k: v for k, v in widths.items() if v is not None})
