"""What the losses have in common around their operators: arguments, reductions, metrics."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastclip.ops import checks
from fastclip.ops.collectives import Ranks, all_reduce_loss, ranks_of

REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: str) -> None:
    """Refuse an unknown one."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; use one of {', '.join(REDUCTIONS)}")


def with_bias(loss: Tensor, logit_bias: Tensor | float | None) -> Tensor:
    """Add 0 * bias: it changes nothing, has a gradient of 0, and gives NaN if it is not finite."""
    if logit_bias is None:
        return loss
    if isinstance(logit_bias, Tensor):
        logit_bias = logit_bias.to(loss.dtype).reshape(())
    return loss + 0 * logit_bias


def concatenate(blocks: list[Tensor]) -> Tensor:
    """Blocks of rows one after the other, in their own dtype under autocast too."""
    # the operator rounds for autocast, whose own rule here knows no float16 beside bfloat16
    with checks.without_autocast(blocks[0].device):
        return torch.cat(blocks)


def ranks_sharing(
    dist: str | None, group: ProcessGroup | None, sizes: Sequence[int] | None, features: Tensor
) -> Ranks | None:
    """The processes that share a loss of these rows; None for a process alone."""
    checks.check_features("features", features)
    return ranks_of(dist, group, sizes, features.shape[0])


def reduce(loss: Tensor, reduction: str, ranks: Ranks | None, blocks: int = 1) -> Tensor:
    """Reduce the losses of anchors, (blocks * rows,), over all processes."""
    if reduction == "none":
        return loss
    if ranks is None and reduction == "mean":
        return loss.mean()
    return reduce_sum(loss.sum(), reduction, ranks, loss.shape[0], blocks)


def reduce_weighted(loss: Tensor, weights: Tensor, reduction: str, ranks: Ranks | None) -> Tensor:
    """Reduce the losses of anchors with their weights, over the anchors of all processes."""
    loss = loss * weights
    if reduction == "none":
        return loss
    return reduce_weighted_sum(loss.sum(), weights, reduction, ranks)


def reduce_weighted_sum(
    total: Tensor, weights: Tensor, reduction: str, ranks: Ranks | None
) -> Tensor:
    """`total`, this process's sum of losses with their weights, as "sum" or "mean"."""
    total, mass = all_reduce_loss(torch.stack((total, weights.sum())), ranks).unbind()
    return total if reduction == "sum" else total / torch.where(mass == 0, 1.0, mass)


def reduce_sum(
    loss: Tensor, reduction: str, ranks: Ranks | None, anchors: int, blocks: int = 1
) -> Tensor:
    """`loss` summed over this process's anchors already, but for "none"."""
    if reduction == "none":
        return loss
    total = all_reduce_loss(loss, ranks)
    if reduction == "sum":
        return total
    return total / (anchors if ranks is None else ranks.rows * blocks)


def top1_accuracy(positive: Tensor, top: Tensor, ranks: Ranks | None) -> Tensor:
    """The share of anchors, of all processes, whose positive lies above every negative."""
    hits = (positive.detach() > top).to(positive.dtype)
    return hits.mean() if ranks is None else all_reduce_loss(hits.sum(), ranks) / ranks.rows
