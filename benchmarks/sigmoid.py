"""The SigLIP loss beside its baselines."""

import torch
from torch import Tensor

from fastclip.bench.cross_entropy import on_cuda_only
from fastclip.bench.runner import Baseline, Inputs, LossFunction, Operator, clustered, compiled
from fastclip.functional import siglip_loss


def _make(n: int, width: int, scale: float) -> Inputs:
    return [*clustered(2, n, width), torch.tensor(scale), torch.tensor(-10.0)]


def _open_clip(inputs: Inputs) -> LossFunction:
    from open_clip.loss import SigLipLoss

    return SigLipLoss()


def _siglip_kernel(inputs: Inputs) -> LossFunction:
    on_cuda_only(inputs)
    from siglip_kernel import fused_siglip_loss

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return fused_siglip_loss(x, y, scale.log(), bias)

    return loss


OPERATORS = (
    Operator(
        "siglip",
        _make,
        siglip_loss,
        (
            Baseline("open_clip", _open_clip),
            Baseline("open_clip compiled", compiled(_open_clip)),
            Baseline("siglip_kernel", _siglip_kernel),
        ),
        (1, 1, 1),
    ),
)
