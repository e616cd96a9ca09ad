"""Baselines of one direction of a softmax loss: cross-entropy over keys, never whole in memory.

Made for the heads of language models, where keys are a vocabulary; for CLIP they run twice, images
against texts and texts against images, and compute each product of S twice as well.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastclip.bench.runner import Baseline, Inputs, LossFunction

# rows whose logits are alive at a time where chunks are checkpointed
CHUNK = 1024


def baselines(suffix: str = "") -> tuple[Baseline, ...]:
    """All of them for one direction, or for both where their names end in `suffix`."""
    implementations = {
        "checkpointed chunks": _checkpointed,
        "linear_cross_entropy": _linear_cross_entropy,
        "cce": _cce,
        "cce exact": _cce_exact,
        "liger": _liger,
    }
    if not suffix:
        return tuple(Baseline(name, build) for name, build in implementations.items())
    return tuple(Baseline(name + suffix, _twice(build)) for name, build in implementations.items())


def _twice(build):
    def both(inputs: Inputs) -> LossFunction:
        one_way = build(inputs)
        return lambda x, y, scale: (one_way(x, y, scale) + one_way(y, x, scale)) / 2

    return both


def _checkpointed(inputs: Inputs) -> LossFunction:
    """Plain torch: the logits of a chunk of rows are computed again in the backward."""
    target = torch.arange(len(inputs[0]), device=inputs[0].device)

    def part(x: Tensor, y: Tensor, scale: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(scale * x @ y.T, target, reduction="sum")

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        pieces = zip(x.split(CHUNK), target.split(CHUNK), strict=True)
        sums = [checkpoint(part, a, y, scale, t, use_reentrant=False) for a, t in pieces]
        return torch.stack(sums).sum() / len(x)

    return loss


def _linear_cross_entropy(inputs: Inputs) -> LossFunction:
    if not hasattr(F, "LinearCrossEntropyOptions"):
        # without options it forms all logits
        raise ImportError("the chunked form came with torch 2.15")
    options = F.LinearCrossEntropyOptions()
    target = torch.arange(len(inputs[0]), device=inputs[0].device)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        scaled = (scale * x).to(y.dtype)
        return F.linear_cross_entropy(scaled, y, target, options=options)

    return loss


def _cce(inputs: Inputs) -> LossFunction:
    """Cut cross-entropy as it comes: tiles of small gradients are skipped."""
    return _cut(inputs, "high")


def _cce_exact(inputs: Inputs) -> LossFunction:
    return _cut(inputs, None)


def _cut(inputs: Inputs, filter_eps: str | None) -> LossFunction:
    on_cuda_only(inputs)
    from cut_cross_entropy import linear_cross_entropy

    target = torch.arange(len(inputs[0]), device=inputs[0].device)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        # its backward takes 16 bits only
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cuda") else y.dtype
        scaled = (scale * x).to(dtype)
        return linear_cross_entropy(scaled, y.to(dtype), target, filter_eps=filter_eps)

    return loss


def _liger(inputs: Inputs) -> LossFunction:
    on_cuda_only(inputs)
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    target = torch.arange(len(inputs[0]), device=inputs[0].device)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        scaled = (scale * x).to(y.dtype)
        found = LigerFusedLinearCrossEntropyFunction.apply(scaled, y, target)
        # with it come statistics that were not asked for
        return found[0] if isinstance(found, tuple) else found

    return loss


def on_cuda_only(inputs: Inputs) -> None:
    """Leave a baseline out where the inputs are not on a GPU.

    Raises:
        ImportError: they are not.
    """
    if not inputs[0].is_cuda:
        raise ImportError("it runs on CUDA only")
