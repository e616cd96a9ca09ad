"""The CLIP loss and one-direction InfoNCE beside their rivals."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.bench.runner import Inputs, LossFunction, Operator, Rival, clustered
from fastclip.functional import clip_loss, info_nce_loss


def _make(n: int, width: int, scale: float) -> Inputs:
    return [*clustered(2, n, width), torch.tensor(scale)]


def _open_clip(inputs: Inputs) -> LossFunction:
    from open_clip import ClipLoss

    return ClipLoss()


def _open_clip_compiled(inputs: Inputs) -> LossFunction:
    torch._dynamo.reset()
    return torch.compile(_open_clip(inputs))


def _linear_cross_entropy_twice(inputs: Inputs) -> LossFunction:
    one_way = _linear_cross_entropy(inputs)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return (one_way(x, y, scale) + one_way(y, x, scale)) / 2

    return loss


def _linear_cross_entropy(inputs: Inputs) -> LossFunction:
    if not hasattr(F, "LinearCrossEntropyOptions"):
        # without options it forms all logits
        raise ImportError("the chunked form came with torch 2.15")
    options = F.LinearCrossEntropyOptions()
    target = torch.arange(len(inputs[0]), device=inputs[0].device)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        scaled = (scale * x).to(y.dtype)
        return F.linear_cross_entropy(scaled, y, target, options=options)  # type: ignore

    return loss


def _inf_cl(inputs: Inputs) -> LossFunction:
    if not inputs[0].is_cuda:
        raise ImportError("it runs on CUDA only")
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
            Rival("open_clip", _open_clip),
            Rival("open_clip compiled", _open_clip_compiled),
            Rival("linear_cross_entropy twice", _linear_cross_entropy_twice),
            Rival("inf_cl", _inf_cl),
        ),
        (2, 1, 1),
    ),
    Operator(
        "info_nce",
        _make,
        info_nce_loss,
        (
            Rival("cross_entropy", _cross_entropy),
            Rival("linear_cross_entropy", _linear_cross_entropy),
        ),
        (1, 1, 1),
    ),
)
