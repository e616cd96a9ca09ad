"""The CLIP loss and one-direction InfoNCE beside their baselines."""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip.bench.cross_entropy as cross_entropy
from fastclip.bench.runner import Baseline, Inputs, LossFunction, Operator, clustered, compiled
from fastclip.functional import clip_loss, info_nce_loss


def _make(n: int, width: int, scale: float) -> Inputs:
    return [*clustered(2, n, width), torch.tensor(scale)]


def _open_clip(inputs: Inputs) -> LossFunction:
    from open_clip import ClipLoss

    return ClipLoss()


def _one_product(inputs: Inputs) -> LossFunction:
    """As Hugging Face's models have it: one product for both directions."""
    target = torch.arange(len(inputs[0]), device=inputs[0].device)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        logits = scale * x @ y.T
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return loss


def _inf_cl(inputs: Inputs) -> LossFunction:
    cross_entropy.on_cuda_only(inputs)
    from inf_cl import cal_flash_loss

    head = next(d for d in (256, 128, 64, 32, 16) if inputs[0].shape[1] % d == 0)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        ways = [cal_flash_loss(a, b, scale=scale, head_dim=head) for a, b in ((x, y), (y, x))]
        return (ways[0].mean() + ways[1].mean()) / 2

    return loss


def _cross_entropy(inputs: Inputs) -> LossFunction:
    target = torch.arange(len(inputs[0]), device=inputs[0].device)
    return lambda x, y, scale: F.cross_entropy(scale * x @ y.T, target)


OPERATORS = (
    Operator(
        "clip",
        _make,
        clip_loss,
        (
            Baseline("open_clip", _open_clip),
            Baseline("open_clip compiled", compiled(_open_clip)),
            Baseline("one product for S", _one_product),
            Baseline("one product for S, compiled", compiled(_one_product)),
            *cross_entropy.baselines(" twice"),
            Baseline("inf_cl", _inf_cl),
        ),
        (2, 1, 1),
    ),
    Operator(
        "info_nce",
        _make,
        info_nce_loss,
        (
            Baseline("cross_entropy", _cross_entropy),
            Baseline("cross_entropy compiled", compiled(_cross_entropy)),
            *cross_entropy.baselines(),
        ),
        (1, 1, 1),
    ),
)
