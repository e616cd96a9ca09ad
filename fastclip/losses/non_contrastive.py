"""What the improved baselines add to CLIP's loss (Fini et al. 2023; papers' names in brackets).

    prediction_loss            one modality's prediction of the other (SiamLIP, BYOLIP)
    cross_correlation_loss     the cross-correlation of two embeddings is the identity (BarLIP)
    swapped_assignment_loss    soft assignments of one view predicted from another (SwALIP)
    prototype_assignment_loss  soft assignments to learned prototypes (SwALIP's first version)

Functions of features. With `dist` several processes share a batch, as in `fastclip.functional`:
every rank returns the mean over all rows, and its gradients are W times the full batch's, which
data-parallel averaging makes right. Statistics and gathers are always differentiated through.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from fastclip.functional import Exchange
from fastclip.ops.checks import check_positive, without_autocast
from fastclip.ops.collectives import (
    Ranks,
    all_gather_rows,
    all_reduce_loss,
    all_reduce_sum,
    gather_rows_with_grad,
    ranks_of,
)
from fastclip.ops.gemm import accumulator_dtype

# of the cross-correlation matrix at a time
CHUNK_BYTES = 64 << 20


def prediction_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    dist: Exchange | None = None,
    group: ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """The mean of 2 - 2 cos(prediction, target); no gradient reaches the target.

    That is the squared distance of the normalized vectors (BYOL, Grill et al. 2020, eq. 2; SimSiam,
    Chen and He 2021, up to scale and shift).

    Args:
        prediction, target: (N, D), not normalized.
        dist: None, or "gather" or "ring" (here alike): processes share the batch. Rows are then one
            process's, the loss is that of all, and gradients averaged over the processes (DDP)
            are the full batch's.
        group: the process group; None: the default one.
        sizes: rows of every process; None: equally many.

    Returns:
        0-d, float32 (float64 for float64).

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> import torch
        >>> from fastclip.losses.non_contrastive import prediction_loss
        >>> target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> prediction_loss(2 * target, target).item(), prediction_loss(-target, target).item()
        (0.0, 4.0)
    """
    _check_alike(prediction, target, ("prediction", "target"))
    ranks = ranks_of(dist, group, sizes, len(prediction))
    with without_autocast(prediction.device):
        cosines = F.cosine_similarity(_wide(prediction), _wide(target.detach()), dim=1)
        return _mean(2 - 2 * cosines, ranks)


def cross_correlation_loss(
    first: Tensor,
    second: Tensor,
    *,
    off_diagonal: float = 0.005,
    scale: float = 0.025,
    dist: Exchange | None = None,
    group: ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Barlow Twins' loss (Zbontar et al. 2021, eq. 1) of two embeddings.

    C = first^T second / N over all ranks' rows; scale * (sum_i (C_ii - 1)^2 + off_diagonal *
    sum_{i != j} C_ij^2). C is formed in strips whose gradient is taken at once, so memory grows
    with N D and not with D^2: three products where autograd needs as many and C twice.

    Args:
        first, second: (N, D), each column standardized over the batch (a head's last
            `GlobalBatchNorm`).
        off_diagonal: weight of redundancy.
        scale: factor of the whole loss.
        dist: None, or "gather" or "ring" (here alike): processes share the batch. Rows are then one
            process's, the loss is that of all, and gradients averaged over the processes (DDP)
            are the full batch's.
        group: the process group; None: the default one.
        sizes: rows of every process; None: equally many.

    Returns:
        0-d, float32 (float64 for float64).

    Raises:
        ValueError: the shapes differ, or a weight is not positive.

    Examples:
        >>> import torch
        >>> from fastclip.losses.non_contrastive import cross_correlation_loss
        >>> columns = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> cross_correlation_loss(columns, columns).item()  # both uncorrelated
        0.0
        >>> round(cross_correlation_loss(columns, -columns).item(), 4)
        0.2
    """
    _check_alike(first, second, ("first", "second"))
    check_positive("off_diagonal", off_diagonal)
    check_positive("scale", scale)
    ranks = ranks_of(dist, group, sizes, len(first))
    with without_autocast(first.device):
        loss: Tensor = _CrossCorrelation.apply(first, second, off_diagonal, scale, ranks)
        return loss


class _CrossCorrelation(torch.autograd.Function):
    """The gradient is formed in the forward, strip by strip: dL/dC depends on C's strip alone."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor,
        off_diagonal: float,
        scale: float,
        ranks: Ranks | None,
    ) -> Tensor:
        a, b = _wide(first), _wide(second)
        rows = ranks.rows if ranks else len(a)
        wanted = ctx.needs_input_grad[:2]
        da = torch.empty_like(a) if wanted[0] else None
        db = torch.zeros_like(b) if wanted[1] else None
        loss = a.new_zeros(())
        width = a.shape[1]
        strip = max(1, CHUNK_BYTES // (width * a.element_size()))
        for start in range(0, width, strip):
            part = a[:, start : start + strip]
            correlation = part.T @ b / rows
            if ranks is not None:
                correlation = all_reduce_sum(ranks.group, correlation)
            index = torch.arange(len(correlation), device=a.device)
            diagonal = correlation[index, start + index] - 1
            correlation[index, start + index] = 0
            loss += off_diagonal * correlation.square().sum() + diagonal.square().sum()
            # dL/dC / 2
            gradient = off_diagonal * correlation
            gradient[index, start + index] = diagonal
            if da is not None:
                da[:, start : start + strip] = b @ gradient.T
            if db is not None:
                db += part @ gradient
        # each rank's rows belong to the loss of all, W times for the averaging
        world = len(ranks.sizes) if ranks else 1
        ctx.factor = 2 * scale * world / rows
        ctx.dtypes = first.dtype, second.dtype
        ctx.save_for_backward(*(g for g in (da, db) if g is not None))
        return loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        gradients = [
            (next(saved) * (ctx.factor * upstream)).to(dtype) if needed else None
            for needed, dtype in zip(ctx.needs_input_grad[:2], ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None)


def swapped_assignment_loss(
    images: Sequence[Tensor],
    texts: Sequence[Tensor],
    logit_scale: Tensor | float,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    dist: Exchange | None = None,
    group: ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """SwAV's swapped prediction (Caron et al. 2020) with the other modality as the prototypes.

    For image view a and text view b, each image is assigned to the texts of all ranks by
    Sinkhorn-Knopp of cos / epsilon (`assignments`, without gradient), and the softmax of
    logit_scale * cos of (a, b) predicts the assignment of the other views (1 - a, 1 - b);
    likewise texts to images. Mean over rows, the four pairs and both directions.

    Args:
        images, texts: two views each, (N, D), normalized.
        logit_scale: exponentiated, 0-d, (1,) or a float.
        epsilon: temperature of the assignments.
        iterations: of Sinkhorn-Knopp.
        dist: None, or "gather" or "ring" (here alike): processes share the batch. Rows are then one
            process's, the loss is that of all, and gradients averaged over the processes (DDP)
            are the full batch's.
        group: the process group; None: the default one.
        sizes: rows of every process; None: equally many.

    Returns:
        0-d, float32 (float64 for float64). Matrices are this rank's rows by all columns.

    Raises:
        ValueError: another number of views than two, shapes that differ, numbers out of range.

    Examples:
        >>> import torch
        >>> from fastclip.losses.non_contrastive import swapped_assignment_loss
        >>> images = texts = [torch.eye(3), torch.eye(3)]  # two views of each
        >>> round(swapped_assignment_loss(images, texts, logit_scale=2.0).item(), 4)
        0.2395
    """
    if len(images) != 2 or len(texts) != 2:
        raise ValueError(f"got {len(images)} image and {len(texts)} text views; give two of each")
    for view in (*images, *texts):
        _check_alike(images[0], view, ("a view", "another"))
    _check_sinkhorn(epsilon, iterations)
    ranks = ranks_of(dist, group, sizes, len(images[0]))
    with without_autocast(images[0].device):
        own = [[_wide(view) for view in views] for views in (images, texts)]
        everyone = [
            [gather_rows_with_grad(v, ranks, ranks.sizes) if ranks else v for v in views]
            for views in own
        ]
        total = own[0][0].new_zeros(())
        for here, there in ((0, 1), (1, 0)):
            for a in range(2):
                for b in range(2):
                    cosines = own[here][a] @ everyone[there][b].T
                    with torch.no_grad():
                        swapped = own[here][1 - a] @ everyone[there][1 - b].T
                        target = assignments(swapped / epsilon, iterations, ranks)
                    total = total + _predict(target, logit_scale * cosines, ranks)
        return total / 8


def prototype_assignment_loss(
    images: Tensor,
    texts: Tensor,
    prototypes: Tensor,
    logit_scale: Tensor | float,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    dist: Exchange | None = None,
    group: ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """SwAV's swapped prediction (Caron et al. 2020) between modalities, over learned prototypes.

    Images are assigned to the prototypes by Sinkhorn-Knopp of cos / epsilon (`assignments`, without
    gradient), and the softmax of logit_scale * cos of their texts predicts that; likewise texts
    and their images. Mean over rows and both directions. It is the first version of SwALIP in
    the code of Fini et al. 2023.

    Args:
        images, texts: (N, D), normalized; row i of both belongs to pair i.
        prototypes: (K, D), normalized, the same in all processes.
        logit_scale: exponentiated, 0-d, (1,) or a float.
        epsilon: temperature of the assignments.
        iterations: of Sinkhorn-Knopp.
        dist: None, or "gather" or "ring" (here alike): processes share the batch. Rows are then one
            process's, the loss is that of all, and gradients averaged over the processes (DDP)
            are the full batch's.
        group: the process group; None: the default one.
        sizes: rows of every process; None: equally many.

    Returns:
        0-d, float32 (float64 for float64). Matrices are this rank's rows by all prototypes.

    Raises:
        ValueError: shapes that differ, numbers out of range.

    Examples:
        >>> import torch
        >>> from fastclip.losses.non_contrastive import prototype_assignment_loss
        >>> images = texts = torch.eye(3)
        >>> round(prototype_assignment_loss(images, texts, torch.eye(3), logit_scale=2.0).item(), 4)
        0.2395
    """
    _check_alike(images, texts, ("images", "texts"))
    if prototypes.ndim != 2 or prototypes.shape[1] != images.shape[1] or not len(prototypes):
        raise ValueError(
            f"prototypes are {tuple(prototypes.shape)}; give (K, {images.shape[1]}), K at least 1"
        )
    _check_sinkhorn(epsilon, iterations)
    ranks = ranks_of(dist, group, sizes, len(images))
    with without_autocast(images.device):
        both = [_wide(rows) @ _wide(prototypes).T for rows in (images, texts)]
        total = both[0].new_zeros(())
        for cosines, other in (both, both[::-1]):
            target = assignments(other.detach() / epsilon, iterations, ranks)
            total = total + _predict(target, logit_scale * cosines, ranks)
        return total / 2


@torch.no_grad()
def assignments(logits: Tensor, iterations: int = 3, ranks: Ranks | None = None) -> Tensor:
    """Soft assignments by Sinkhorn-Knopp: of rows to columns, all columns taken alike.

    exp(logits) has its columns' sums over all ranks made equal, then its rows' sums, in turn; so
    each row of the result sums to 1, and the columns nearly to the same. All in logarithms: small
    temperatures make logits that float32 cannot take the exponential of.

    Args:
        logits: (n, m), this rank's rows; m are all ranks' columns.
        iterations: 1 or more.
        ranks: who holds the other rows (`fastclip.ops.collectives.Ranks`); None: nobody.

    Returns:
        (n, m), in the logits' dtype, without gradient.

    Examples:
        >>> import torch
        >>> from fastclip.losses.non_contrastive import assignments
        >>> shares = assignments(torch.tensor([[4.0, 0.0], [4.0, 3.0]]))
        >>> shares.sum(1).allclose(torch.ones(2)), shares.argmax(1).tolist()  # one each
        (True, [0, 1])
    """
    shares = logits - _columns(logits, ranks)
    for _ in range(iterations - 1):
        shares = shares - shares.logsumexp(1, keepdim=True)
        shares = shares - _columns(shares, ranks)
    return shares.softmax(1)


def _columns(logits: Tensor, ranks: Ranks | None) -> Tensor:
    """The log-sum-exp of each column over all ranks' rows, (m,)."""
    if ranks is None:
        return logits.logsumexp(0)
    tops = all_gather_rows(ranks.group, logits.max(0, keepdim=True).values, [1] * len(ranks.sizes))
    top = tops.max(0).values
    return top + all_reduce_sum(ranks.group, (logits - top).exp().sum(0)).log()


def _predict(target: Tensor, logits: Tensor, ranks: Ranks | None) -> Tensor:
    """The cross-entropy of rows' softmax under their assignments, its mean over all ranks' rows."""
    return _mean(-(target * F.log_softmax(logits, dim=1)).sum(1), ranks)


def _mean(terms: Tensor, ranks: Ranks | None) -> Tensor:
    """The mean over all ranks' rows."""
    return all_reduce_loss(terms.sum(), ranks) / (ranks.rows if ranks else len(terms))


def _wide(features: Tensor) -> Tensor:
    return features.to(accumulator_dtype(features.dtype))


def _check_alike(first: Tensor, second: Tensor, names: tuple[str, str]) -> None:
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        raise ValueError(
            f"{names[0]} is {tuple(first.shape)} and {names[1]} {tuple(second.shape)}; give (N, D) "
            "both, N at least 1"
        )


def _check_sinkhorn(epsilon: float, iterations: int) -> None:
    check_positive("epsilon", epsilon)
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; give 1 or more")
