"""UniCLIP (Lee et al. 2022): one space for views and texts, and a head told the augmentation."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.data.augment import PARAMS, AugmentationParams
from fastclip.losses.mp_nce import MPNCELoss
from fastclip.nn.augmentation_encoder import AugmentationEncoder, ResidualHead
from fastclip.nn.heads import linear_head

IMAGE, TEXT = 0, 1


class Blocks(NamedTuple):
    """What `MPNCELoss` takes: V + T blocks (N, D) of one pair order, and their domains."""

    features: list[Tensor]
    domains: list[int]


class UniClip(nn.Module):
    """Towers of open_clip's under UniCLIP's heads, with the loss's temperatures and offsets.

    The towers' own features, before their last normalisation, are what the heads project.

    Args:
        towers: has `encode_image` and `encode_text`, as open_clip's models have.
        width: of the towers' features, open_clip's `embed_dim`.
        output: of the common space; by default `width`.
        augmentation_encoder: False leaves the image head without it: the same residual head, which
            always sees the embedding of no augmentation (the paper's ablation).
        loss: by default MP-NCE with a temperature and offset for each domain pair and pairs weighed
            alike; `MPNCELoss(num_domains=1)` shares one (the ablation).
        blocks: residual blocks of the image head.

    Attributes:
        no_augmentation: (PARAMS,), the vector that evaluation uses.
    """

    no_augmentation: Tensor

    def __init__(
        self,
        towers: nn.Module,
        width: int,
        output: int | None = None,
        *,
        augmentation_encoder: bool = True,
        loss: MPNCELoss | None = None,
        blocks: int = 3,
    ) -> None:
        super().__init__()
        output = width if output is None else output
        self.towers = towers
        self.tells_augmentation = augmentation_encoder
        self.augmentation_encoder = AugmentationEncoder(PARAMS)
        self.image_head = ResidualHead(
            width, self.augmentation_encoder.width, output, blocks=blocks
        )
        self.text_head = linear_head(width, output)
        self.loss = MPNCELoss(pair_weight="balanced") if loss is None else loss
        neutral = AugmentationParams.identity(1, 1).encode(1, 1)
        self.register_buffer("no_augmentation", neutral, persistent=False)

    def forward(self, images: Sequence[Tensor], params: Tensor, texts: Sequence[Tensor]) -> Blocks:
        """The normalised blocks of a batch.

        Args:
            images: V views, each (N, 3, S, S), normalised as the towers want them.
            params: (N, V, PARAMS), a batch's `params`.
            texts: T tensors (N, L) of tokens.

        Raises:
            ValueError: `params` is not of these views.
        """
        if params.shape != (len(images[0]), len(images), PARAMS):
            raise ValueError(
                f"params are {tuple(params.shape)} for {len(images)} views of {len(images[0])} "
                f"images; give (N, V, {PARAMS})"
            )
        blocks = [
            self.encode_image(image, params[:, view], normalize=True)
            for view, image in enumerate(images)
        ]
        blocks += [self.encode_text(text, normalize=True) for text in texts]
        return Blocks(blocks, [IMAGE] * len(images) + [TEXT] * len(texts))

    def objective(self, blocks: Blocks) -> Tensor:
        """The loss, 0-d, of what `forward` gave; one shared domain where the loss has one."""
        domains = blocks.domains
        if self.loss.index.shape[0] == 1:
            domains = [0] * len(domains)
        return self.loss(blocks.features, domains)

    def encode_image(
        self, image: Tensor, params: Tensor | None = None, normalize: bool = False
    ) -> Tensor:
        """(N, 3, S, S) to (N, output); params (N, PARAMS), or None for no augmentation."""
        if params is None or not self.tells_augmentation:
            params = self.no_augmentation.expand(len(image), -1)
        features = self.towers.encode_image(image)  # type: ignore[operator]
        told = self.augmentation_encoder(params.to(self.no_augmentation.device))
        projected = self.image_head(features, told)
        return F.normalize(projected, dim=-1) if normalize else projected

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(N, L) tokens to (N, output)."""
        projected = self.text_head(self.towers.encode_text(text))  # type: ignore[operator]
        return F.normalize(projected, dim=-1) if normalize else projected

    @torch.no_grad()
    def clamp_scale_(self) -> None:
        """Hold every temperature in its bound; call it after an optimiser step."""
        self.loss.clamp_scale_()
