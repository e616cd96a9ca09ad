"""Losses among the rows of one side, blocks of views and texts: MP-NCE, NT-Xent, SupCon."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastclip.ops import checks, dense
from fastclip.ops.collectives import Exchange, global_sum
from fastclip.ops.labels import label_statistics
from fastclip.ops.numerics import softplus
from fastclip.ops.problem import couples
from fastclip.ops.reductions import (
    check_reduction,
    concatenate,
    ranks_sharing,
    reduce,
    share_above,
)
from fastclip.ops.symmetric import block_statistics


def mp_nce_loss(
    features: Sequence[Tensor],
    domains: Sequence[int],
    logit_scale: Tensor | float,
    logit_offset: Tensor | float | None = None,
    *,
    pair_weight: Tensor | Sequence[Sequence[float]] | None = None,
    metrics: dict[str, Tensor] | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
    precision: str = "auto",
    dist: Exchange | None = None,
    group: ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Multi-positive NCE over several views and texts (UniCLIP, Lee et al. 2022).

    With s_ij = logit_scale * <z_i, z_j> + logit_offset of the domains of i and j, P(i) the rows
    of i's pair in the other blocks and N(i) the rows of all other pairs, an anchor's loss is

        1/|P(i)| * sum_{p in P(i)} weight * softplus(logsumexp_{n in N(i)} s_in - s_ip):

    positives stay out of each other's denominators.

    Args:
        features: B >= 2 blocks, each (N, D), normalized, of any one floating-point dtype, in the
            same pair order.
        domains: the domain of each block, e.g. [0, 0, 0, 1] for three views and a text.
        logit_scale, logit_offset: (P, P) tensors for P domains, the entry (a, b) read with
            a <= b; a number, and None for offset 0, stand for a full table.
        pair_weight: the positives' weights by domain pair, read likewise: (P, P) as a tensor or
            as lists of numbers, or None for ones.
        metrics: a dictionary for the "accuracy", 0-d, without gradient: the share of anchors and
            positives where the positive lies above every negative.
        reduction: "mean" or "sum" over the B * N anchors; "none": (B * N,) in block order.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.
        precision: "auto" follows autocast, "input" computes in the features' dtype.
        dist: None, or "gather" or "ring" where processes share the loss: features are this
            process's rows, the loss is that of all, averaged gradients (DDP) are the full batch's.
        group: the process group; None: the default one.
        sizes: rows of every process; None: equally many.

    Returns:
        The loss, 0-d or (B * N,), float32 (float64 for float64 features).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, e.g. blocks of different shapes.

    Examples:
        >>> import torch
        >>> from fastclip.functional import mp_nce_loss
        >>> view1 = view2 = texts = torch.eye(3)
        >>> mp_nce_loss([view1, view2, texts], [0, 0, 1], 2.0, reduction="none").shape
        torch.Size([9])
    """
    check_reduction(reduction)
    features, domains = list(features), [int(d) for d in domains]
    request = dense.Request(
        reduction, backend, chunk_bytes, keep_bytes, precision, dist, group, sizes
    )
    small = dense.blocks_loss(
        features, domains, logit_scale, logit_offset, pair_weight, request, metrics
    )
    if small is not None:
        return small
    checks.check_blocks(features, domains)
    like, count = features[0], max(domains) + 1
    scale = checks.as_table("logit_scale", logit_scale, count, like)
    offset = None
    if logit_offset is not None:
        offset = checks.as_table("logit_offset", logit_offset, count, like)
        # tables may hold more domains than the blocks have
        size = min(len(scale), len(offset))
        scale, offset = scale[:size, :size], offset[:size, :size]
    weight = pair_weight
    if isinstance(weight, Tensor):
        weight = checks.as_table("pair_weight", weight, count, like)
    elif weight is not None and min(len(weight), *map(len, weight)) < count:
        raise ValueError(f"pair_weight is {weight}; give (P, P) for P = {count} domains")
    ranks = ranks_sharing(dist, group, sizes, like)
    lse, top, positive = block_statistics(
        concatenate(features),
        domains,
        scale,
        offset,
        maxima=metrics is not None,
        ranks=ranks,
        backend=backend,
        chunk_bytes=chunk_bytes,
        keep_bytes=keep_bytes,
        precision=precision,
    )
    blocks = len(domains)
    lse_of = lse.reshape(blocks, -1)
    losses: list[list[Tensor]] = [[] for _ in domains]
    hits = []
    for index, couple in enumerate(couples(len(domains))):
        for block in couple:
            pair = softplus(lse_of[block] - positive[index])
            if weight is not None:
                low, high = sorted(domains[b] for b in couple)
                pair = pair * weight[low][high]
            losses[block].append(pair)
            if metrics is not None:
                hits.append(share_above(positive[index], top.reshape(blocks, -1)[block], ranks))
    if metrics is not None:
        metrics["accuracy"] = torch.stack(hits).mean()
    loss = torch.cat([torch.stack(terms).mean(dim=0) for terms in losses])
    return reduce(loss, reduction, ranks, blocks)


def nt_xent_loss(
    view1: Tensor,
    view2: Tensor,
    temperature: Tensor | float,
    *,
    metrics: dict[str, Tensor] | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
    precision: str = "auto",
    dist: Exchange | None = None,
    group: ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Normalized-temperature cross-entropy among 2N views (SimCLR, Chen et al. 2020, eq. 1).

    Args:
        view1, view2: (N, D), normalized, of any floating-point dtype: two views of the samples.
        temperature: 0-d or (1,) tensor, or a number, > 0.
        metrics: a dictionary for the top-1 "accuracy", 0-d, without gradient.
        reduction: "mean" or "sum" over the 2N anchors; "none": (2N,), view1's before view2's.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.
        precision: "auto" follows autocast, "input" computes in the features' dtype.
        dist: None, or "gather" or "ring" where processes share the loss: features are this
            process's rows, the loss is that of all, averaged gradients (DDP) are the full batch's.
        group: the process group; None: the default one.
        sizes: rows of every process; None: equally many.

    Returns:
        The loss, 0-d or (2N,), float32 (float64 for float64 features).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, e.g. a temperature of 0.

    Examples:
        >>> import torch
        >>> from fastclip.functional import nt_xent_loss
        >>> view1 = view2 = torch.eye(3)
        >>> round(nt_xent_loss(view1, view2, temperature=0.5).item(), 4)
        0.4327
    """
    return mp_nce_loss(
        [view1, view2],
        [0, 0],
        checks.inverse(temperature, view1),
        metrics=metrics,
        reduction=reduction,
        backend=backend,
        chunk_bytes=chunk_bytes,
        keep_bytes=keep_bytes,
        precision=precision,
        dist=dist,
        group=group,
        sizes=sizes,
    )


def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    temperature: Tensor | float,
    *,
    reduction: str = "mean",
    backend: str = "auto",
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
    precision: str = "auto",
    dist: Exchange | None = None,
    group: ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Supervised contrastive loss, positives averaged outside the log (Khosla et al. 2020, eq. 2).

    loss_i = logsumexp_{j != i} s_ij - mean over the others p of i's label of s_ip.

    Args:
        features: (M, D), normalized, of any floating-point dtype.
        labels: (M,) integers of any values.
        temperature: 0-d or (1,) tensor, or a number, > 0.
        reduction: "mean" or "sum" over the anchors that have a positive, 0 if none has; "none":
            (M,), 0 where there is no positive.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.
        precision: "auto" follows autocast, "input" computes in the features' dtype.
        dist: None, or "gather" or "ring" where processes share the loss: features are this
            process's rows, the loss is that of all, averaged gradients (DDP) are the full batch's.
        group: the process group; None: the default one.
        sizes: rows of every process; None: equally many.

    Returns:
        The loss, 0-d or (M,), float32 (float64 for float64 features).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, e.g. a temperature of 0.

    Examples:
        >>> import torch
        >>> from fastclip.functional import sup_con_loss
        >>> features, labels = torch.eye(3), torch.tensor([7, 7, 2])
        >>> sup_con_loss(features, labels, temperature=0.5, reduction="none")
        tensor([0.6931, 0.6931, 0.0000])
    """
    check_reduction(reduction)
    scale = checks.inverse(temperature, features)
    request = dense.Request(
        reduction, backend, chunk_bytes, keep_bytes, precision, dist, group, sizes
    )
    small = dense.labels_loss(features, labels, scale, request)
    if small is not None:
        return small
    ranks = ranks_sharing(dist, group, sizes, features)
    statistics = label_statistics(
        features,
        labels,
        scale,
        ranks=ranks,
        backend=backend,
        chunk_bytes=chunk_bytes,
        keep_bytes=keep_bytes,
        precision=precision,
    )
    has_positive = statistics.positives > 0
    loss = torch.where(has_positive, statistics.lse - statistics.positive_mean, 0.0)
    if reduction == "none":
        return loss
    sums = global_sum(torch.stack((loss.sum(), has_positive.sum().to(loss))), ranks)
    total, anchors = sums.unbind()
    return total / anchors.detach().clamp(min=1) if reduction == "mean" else total
