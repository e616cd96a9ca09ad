"""UniCLIP (Lee et al. 2022): one space for views and texts; a head receives the augmentation."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.data.augment import PARAMS, AugmentationParams
from fastclip.functional import clip_loss, mil_nce_loss, mp_nce_loss, sup_con_loss
from fastclip.losses.mp_nce import balanced_pair_weight
from fastclip.models.options import SystemOptions
from fastclip.models.system import PREFIX, Criterion, Features, TwoTowers, View
from fastclip.nn.augmentation_encoder import AugmentationEncoder, ResidualHead
from fastclip.nn.heads import linear_head
from fastclip.ops.collectives import ranks_of

IMAGE, TEXT = 0, 1
MAX_SCALE = 100.0


class UniClipCriterion(Criterion):
    """Heads, the similarity of each domain pair, and the loss over the blocks of views and texts.

    The similarity of domains p and q is s = (cos - offset_pq) / temperature_pq; both are learned,
    packed as image-image, image-text, text-text.

    Args:
        width: of the towers' features.
        output: of the common space; by default `width`.
        pair_loss: "mp-nce"; or its ablations "info-nce", CLIP's loss of each two blocks by
            themselves, "mil-nce", where an anchor's positives count together and have no weights,
            and "sup-con", with positives in each other's denominators and one temperature.
        pair_weight: weights of image-image, image-text and text-text positives in the mean over
            all; None for weights under which each kind present contributes alike.
        augmentation_encoder: False leaves the image head as it is but gives it no augmentation.
        shared_similarity: one temperature for all pairs, whose offset would cancel.
        temperature: the initial one, of every pair.
        blocks: residual blocks of the image head.

    Attributes:
        no_augmentation: (1, PARAMS), the vector that evaluation uses.
        log_temperature: (3,), or (1,) where it is shared.
        offset: (3,), or None where it would cancel.

    Raises:
        ValueError: a weight is negative, that of image-text is 0, or `pair_loss` takes none.
    """

    no_augmentation: Tensor
    pair: Tensor

    def __init__(
        self,
        width: int,
        output: int | None = None,
        *,
        pair_loss: str = "mp-nce",
        pair_weight: tuple[float, float, float] | None = None,
        augmentation_encoder: bool = True,
        shared_similarity: bool = False,
        temperature: float = 0.07,
        blocks: int = 3,
    ) -> None:
        super().__init__()
        if pair_weight is not None:
            _check_weight(pair_weight, pair_loss)
        output = width if output is None else output
        self.pair_loss, self.pair_weight = pair_loss, pair_weight
        self.uses_augmentation = augmentation_encoder
        self.augmentation_encoder = AugmentationEncoder(PARAMS)
        self.image_head = ResidualHead(
            width, self.augmentation_encoder.width, output, blocks=blocks
        )
        self.text_head = linear_head(width, output)
        neutral = AugmentationParams.identity(1, 1).encode(1, 1)
        self.register_buffer("no_augmentation", neutral[None], persistent=False)

        shared = shared_similarity or pair_loss == "sup-con"
        table = torch.tensor([[0, 0], [0, 0]] if shared else [[0, 1], [1, 2]])
        self.register_buffer("pair", table, persistent=False)
        pairs = int(table.max()) + 1
        self.log_temperature = nn.Parameter(torch.full((pairs,), math.log(temperature)))
        self.bounds = {"log_temperature": (-math.log(MAX_SCALE), math.inf)}
        self.offset: nn.Parameter | None = None
        # a constant cancels in a softmax, so offsets count only where one mixes domain pairs
        if pair_loss in ("mp-nce", "mil-nce") and not shared:
            self.offset = nn.Parameter(torch.zeros(pairs))
            self.bounds["offset"] = (-math.inf, math.inf)

    def forward(
        self,
        features: Features,
        *,
        targets: Mapping[View, Tensor] | None = None,
        **exchange: Any,
    ) -> Tensor:
        """See `Criterion.forward`; of the features params too."""
        assert features.params is not None
        views = zip(features.images, features.params.unbind(1), strict=True)
        blocks = [self.project_image(rows, params) for rows, params in views]
        blocks += [self.text_head(rows) for rows in features.texts]
        domains = [IMAGE] * len(features.images) + [TEXT] * len(features.texts)
        losses = {
            "mp-nce": self._mp_nce,
            "info-nce": self._info_nce,
            "mil-nce": self._mil_nce,
            "sup-con": self._sup_con,
        }
        normalized = [F.normalize(block, dim=-1) for block in blocks]
        return losses[self.pair_loss](normalized, domains, exchange)

    def project_image(self, features: Tensor, params: Tensor | None = None) -> Tensor:
        """(N, width), with (N, PARAMS) or None for no augmentation, to (N, output)."""
        if params is None or not self.uses_augmentation:
            params = self.no_augmentation
        encoded = self.augmentation_encoder(params.to(features.dtype))
        return self.image_head(features, encoded.expand(features.shape[0], -1))

    @property
    def logit_scale(self) -> Tensor:
        """The inverse temperatures, (2, 2)."""
        return torch.exp(-self.log_temperature)[self.pair]

    def _mp_nce(
        self, blocks: Sequence[Tensor], domains: Sequence[int], exchange: dict[str, Any]
    ) -> Tensor:
        weight = self._weights(domains)
        return mp_nce_loss(blocks, domains, *self._tables(), pair_weight=weight, **exchange)

    def _mil_nce(
        self, blocks: Sequence[Tensor], domains: Sequence[int], exchange: dict[str, Any]
    ) -> Tensor:
        return mil_nce_loss(blocks, domains, *self._tables(), **exchange)

    def _tables(self) -> tuple[Tensor, Tensor | None]:
        """Scales and offsets of the logits, (2, 2) each."""
        scale = self.logit_scale
        return scale, None if self.offset is None else -self.offset[self.pair] * scale

    def _info_nce(
        self, blocks: Sequence[Tensor], domains: Sequence[int], exchange: dict[str, Any]
    ) -> Tensor:
        scale, weight = self.logit_scale, self._weights(domains)
        terms = [
            weight[p][q] * clip_loss(x, y, scale[p, q], **exchange)
            for (x, p), (y, q) in combinations(zip(blocks, domains, strict=True), 2)
        ]
        return torch.stack(terms).mean()

    def _sup_con(
        self, blocks: Sequence[Tensor], domains: Sequence[int], exchange: dict[str, Any]
    ) -> Tensor:
        count, own, sizes = len(blocks), len(blocks[0]), exchange.get("sizes")
        ranks = ranks_of(exchange.get("dist"), exchange.get("group"), sizes, own)
        if sizes is not None:
            exchange = {**exchange, "sizes": [count * size for size in sizes]}
        # samples are numbered over all ranks
        first = 0 if ranks is None else ranks.first
        sample = torch.arange(first, first + own, device=blocks[0].device)
        temperature = self.log_temperature.exp()
        return sup_con_loss(torch.cat(list(blocks)), sample.repeat(count), temperature, **exchange)

    def _weights(self, domains: Sequence[int]) -> list[list[float]]:
        if self.pair_weight is None:
            return balanced_pair_weight(domains, 2)
        image_image, image_text, text_text = self.pair_weight
        return [[image_image, image_text], [image_text, text_text]]


class UniClip(TwoTowers):
    """Towers under UniCLIP's heads; see `TwoTowers`."""

    criterion: UniClipCriterion

    @classmethod
    def of(cls, towers: nn.Module, width: int, options: SystemOptions) -> "UniClip":
        """The system that the options describe, on towers with features of this width."""
        criterion = UniClipCriterion(
            width,
            options.head_width,
            pair_loss=options.pair_loss,
            pair_weight=options.pair_weight,
            augmentation_encoder=options.augmentation_encoder,
            shared_similarity=options.shared_similarity,
        )
        return cls(towers, criterion, *options.views)

    def features(self, batch: Mapping[str, Any]) -> Features:
        """See `TwoTowers.features`; beside them params, (N, V, PARAMS).

        Raises:
            ValueError: `params` is not of these views.
        """
        images, params = batch["images"], batch["params"]
        if params.shape != (len(images[0]), len(images), PARAMS):
            raise ValueError(
                f"params are {tuple(params.shape)} for {len(images)} views of {len(images[0])} "
                f"images; give (N, V, {PARAMS})"
            )
        return replace(super().features(batch), params=params)

    def encode_image(
        self, image: Tensor, normalize: bool = False, params: Tensor | None = None
    ) -> Tensor:
        """(N, 3, S, S) to (N, output); params (N, PARAMS), or None for no augmentation."""
        projected = self.criterion.project_image(self.towers.encode_image(image), params)
        return F.normalize(projected, dim=-1) if normalize else projected

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(N, L) tokens to (N, output)."""
        projected = self.criterion.text_head(self.towers.encode_text(text))
        return F.normalize(projected, dim=-1) if normalize else projected

    def logit_scale(self, parameter: Callable[[str], Tensor]) -> float:
        """See `System.logit_scale`."""
        entry = int(self.criterion.pair[IMAGE, TEXT])
        return parameter(PREFIX + "log_temperature")[entry].neg().exp().item()

    def image_text_bias(self, parameter: Callable[[str], Tensor]) -> float | None:
        """See `System.image_text_bias`."""
        if self.criterion.offset is None:
            return None
        entry = int(self.criterion.pair[IMAGE, TEXT])
        offset = parameter(PREFIX + "offset")[entry].item()
        return -offset * self.logit_scale(parameter)


def _check_weight(weight: tuple[float, float, float], pair_loss: str) -> None:
    if pair_loss in ("mil-nce", "sup-con"):
        raise ValueError(f"pair_weight is {weight}, and has no part in {pair_loss}; leave it out")
    if not (min(weight) >= 0 and weight[1] > 0 and math.isfinite(sum(weight))):
        raise ValueError(
            f"pair_weight is {weight}; give three numbers of 0 or more; the second, of "
            "image-text pairs, must be above 0"
        )
