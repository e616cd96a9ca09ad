"""Gathering features across processes, with or without gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(
    features: Tensor, group: dist.ProcessGroup | None = None, *, with_grad: bool
) -> Tensor:
    """The rows of all ranks, (W * N, D), in the order of the ranks.

    With gradient, a rank receives the sum over all ranks of the gradients of its rows: each
    rank's loss contributes. Without, only the rank's own rows carry gradient, its own loss's.

    Args:
        features: (N, D), the same N on every rank.
        group: the process group; None is the default one.
        with_grad: whether gradients flow back across ranks.
    """
    if with_grad:
        gathered: Tensor = _GatherRows.apply(features, group)
        return gathered
    rank = dist.get_rank(group)
    parts = list(_all_gather(features.detach(), group).chunk(dist.get_world_size(group)))
    parts[rank] = features
    return torch.cat(parts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.rows = group, features.shape[0]
        return _all_gather(features, group)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = upstream
        gradient = gradient.contiguous()
        if dist.get_backend(ctx.group) == "nccl":
            own = gradient.new_empty((ctx.rows, *gradient.shape[1:]))
            dist.reduce_scatter_tensor(own, gradient, group=ctx.group)
            return own, None
        # gloo has no reduce-scatter in every release
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return gradient[start : start + ctx.rows].clone(), None


def _all_gather(features: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    features = features.contiguous()
    parts = [torch.empty_like(features) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, features, group=group)
    return torch.cat(parts)
