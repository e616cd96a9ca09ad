"""Moving averages of a number a sample, in log space: what global contrastive losses remember.

`log_u` is (2, K): for each of K samples the log of an estimate of its image's and of its text's
negatives over the whole data; -inf where the sample has not been seen. A batch gives (index, g) of
its rows. Over several processes these are exchanged, and every process makes the update of the
whole batch, so that all of them hold the same estimates, whichever process a sample is on next.

Shape suffixes: N own rows, B rows of the whole batch, K samples.
"""

import math

import torch
from torch import Tensor

from fastclip.ops.collectives import Ranks, gather_rows_with_grad


@torch.no_grad()
def move_estimates(
    log_u: Tensor,
    index_N: Tensor,
    log_g: Tensor,
    gamma: float,
    ranks: Ranks | None,
    *,
    store: bool,
) -> Tensor:
    """The estimates of a batch's samples after u <- (1 - gamma) u + gamma g, logs of them.

    A sample that is seen for the first time has u = g; one that comes several times in the batch
    moves once, by the mean of its g. What is not finite is not stored.

    Args:
        log_u: (2, K), of all samples; changed in place where `store`.
        index_N: (N,) integers below K: this process's samples.
        log_g: (2, N), of images and texts.
        gamma: in (0, 1].
        ranks: the processes that share the batch; None for a process alone.
        store: whether `log_u` is changed.

    Returns:
        (2, N) in log_u's dtype: of this process's samples.
    """
    # from pinned memory without waiting for what is queued
    index = index_N.to(log_u.device, torch.int64, non_blocking=True)
    log_g, first, count = log_g.T.to(log_u.dtype), 0, len(index_N)
    if ranks is not None:
        first = ranks.first
        index, log_g = (gather_rows_with_grad(own, ranks, ranks.sizes) for own in (index, log_g))
    log_g = _mean_of_equal(index, log_g).T
    before = log_u[:, index]
    kept = math.log1p(-gamma) if gamma < 1 else -math.inf
    moved = torch.logaddexp(before + kept, log_g + math.log(gamma))
    after = torch.where(before == -math.inf, log_g, moved)
    if store:
        log_u[:, index] = torch.where(after.isfinite(), after, before)
    return after[:, first : first + count]


def _mean_of_equal(index_B: Tensor, log_g: Tensor) -> Tensor:
    """Of each row of (B, 2) the log of the mean of g over the rows with its index.

    Without a host read, and bitwise reproducible; a row of its own keeps its bits.
    """
    order = index_B.argsort(stable=True)
    arranged = index_B[order]
    begins = torch.ones_like(arranged)
    begins[1:] = (arranged[1:] != arranged[:-1]).to(begins.dtype)
    # which of the distinct indices each row has
    slot = torch.empty_like(order).scatter_(0, order, begins.cumsum(0) - 1)
    slots = slot[:, None].expand_as(log_g)
    greatest = torch.full_like(log_g, -math.inf).scatter_reduce_(0, slots, log_g, "amax")[slot]
    # sums of integers: their order, which a GPU does not keep, does not matter; as fine as B of
    # them fit 63 bits
    parts = 2 ** (62 - len(index_B).bit_length())
    part = ((log_g - greatest).exp() * parts).round().to(torch.int64)
    total = torch.zeros_like(part).index_add_(0, slot, part)[slot]
    count = torch.zeros_like(slot).index_add_(0, slot, torch.ones_like(slot))[slot]
    mean: Tensor = (
        greatest + (total.to(log_g.dtype) / (count[:, None] * parts).to(log_g.dtype)).log()
    )
    return mean
