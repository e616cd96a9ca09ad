"""Losses among the rows of one side, views and texts: MP-NCE, MIL-NCE, NT-Xent, SupCon."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastclip.ops import checks, dense
from fastclip.ops.checks import GroupRole
from fastclip.ops.collectives import Exchange, all_reduce_loss
from fastclip.ops.labels import label_statistics
from fastclip.ops.numerics import softplus
from fastclip.ops.problem import couples
from fastclip.ops.reductions import (
    check_reduction,
    concatenate,
    ranks_sharing,
    reduce,
    reduce_weighted,
    top1_accuracy,
)
from fastclip.ops.symmetric import BlockStatistics, block_statistics

_PAIRS_WEIGHTS = (
    "MP-NCE has a weight for each pair of an anchor and a positive, and a group has none"
)


def mp_nce_loss(
    features: Sequence[Tensor],
    domains: Sequence[int],
    logit_scale: Tensor | float,
    logit_offset: Tensor | float | None = None,
    *,
    pair_weight: Tensor | Sequence[Sequence[float]] | None = None,
    row_group: Tensor | None = None,
    group_role: GroupRole = "excluded",
    weights: Tensor | None = None,
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
        row_group: (N,) integer ids of the pairs, of all processes; rows of other pairs of a row's
            group are no negatives, e.g. duplicates.
        group_role: "excluded"; positives are a pair's own here, as weights are a pair's.
        weights: (B * N,) floating point >= 0, the anchors' in block order; the mean is then
            sum(w * loss) / sum(w), 0 where all are 0. They may have a gradient.
        metrics: a dictionary for the "accuracy", 0-d, without gradient: the share of anchors and
            positives where the positive lies above every negative.
        reduction: "mean" or "sum" over the B * N anchors; "none": (B * N,) in block order,
            with their weights.
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
    blocks, of_anchors = len(domains), reduction if weights is None else "none"
    if row_group is not None or weights is not None or group_role != "excluded":
        checks.check_blocks(features, domains)
        ids = {"row_group": (row_group, features[0].shape[0])}
        checks.check_groups(group_role, ids, features[0], _PAIRS_WEIGHTS)
        weights = checks.anchor_weights(weights, features[0], blocks)
    loss = None
    if row_group is None:
        request = dense.Request(
            of_anchors, backend, chunk_bytes, keep_bytes, precision, dist, group, sizes
        )
        loss = dense.blocks_loss(
            features, domains, logit_scale, logit_offset, pair_weight, request, metrics
        )
        if loss is not None and weights is None:
            return loss
    checks.check_blocks(features, domains)
    like, count = features[0], max(domains) + 1
    ranks = ranks_sharing(dist, group, sizes, like)
    if loss is None:
        weight = pair_weight
        if isinstance(weight, Tensor):
            weight = checks.as_table("pair_weight", weight, count, like)
        elif weight is not None and min(len(weight), *map(len, weight)) < count:
            raise ValueError(f"pair_weight is {weight}; give (P, P) for P = {count} domains")
        lse, top, positive = _statistics(
            features,
            domains,
            logit_scale,
            logit_offset,
            pair_group=row_group,
            maxima=metrics is not None,
            ranks=ranks,
            backend=backend,
            chunk_bytes=chunk_bytes,
            keep_bytes=keep_bytes,
            precision=precision,
        )
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
                    hits.append(
                        top1_accuracy(positive[index], top.reshape(blocks, -1)[block], ranks)
                    )
        if metrics is not None:
            metrics["accuracy"] = torch.stack(hits).mean()
        loss = torch.cat([torch.stack(terms).mean(dim=0) for terms in losses])
        loss = reduce(loss, of_anchors, ranks, blocks)
    return loss if weights is None else reduce_weighted(loss, weights, reduction, ranks)


def mil_nce_loss(
    features: Sequence[Tensor],
    domains: Sequence[int],
    logit_scale: Tensor | float,
    logit_offset: Tensor | float | None = None,
    *,
    row_group: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
    precision: str = "auto",
    dist: Exchange | None = None,
    group: ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """MIL-NCE over several views and texts (Miech et al. 2020, eq. 1, for each anchor).

    With s_ij, P(i) and N(i) as of `mp_nce_loss`, an anchor's loss is

        -log(sum_{p in P(i)} exp(s_ip) / (sum_{p in P(i)} exp(s_ip) + sum_{n in N(i)} exp(s_in))):

    the positives count together, so that one good one is enough, and are in each other's
    denominators. With one positive it is MP-NCE.

    Args:
        features: B >= 2 blocks, each (N, D), normalized, of any one floating-point dtype, in the
            same pair order.
        domains: the domain of each block, e.g. [0, 0, 0, 1] for three views and a text.
        logit_scale, logit_offset: (P, P) tensors for P domains, the entry (a, b) read with
            a <= b; a number, and None for offset 0, stand for a full table.
        row_group: (N,) integer ids of the pairs, of all processes; rows of other pairs of a row's
            group are no negatives, e.g. duplicates.
        weights: (B * N,) floating point >= 0, the anchors' in block order; the mean is then
            sum(w * loss) / sum(w), 0 where all are 0. They may have a gradient.
        reduction: "mean" or "sum" over the B * N anchors; "none": (B * N,) in block order,
            with their weights.
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
        >>> from fastclip.functional import mil_nce_loss, mp_nce_loss
        >>> good, poor = torch.eye(3), torch.eye(3).roll(1, 0)
        >>> blocks = [good, good, poor]  # to an anchor of the first, one positive is good
        >>> for loss in (mil_nce_loss, mp_nce_loss):
        ...     print(loss(blocks, [0, 0, 1], 9.0, reduction="none")[0])
        tensor(0.6934)
        tensor(4.8471)
    """
    check_reduction(reduction)
    features, domains = list(features), [int(d) for d in domains]
    checks.check_blocks(features, domains)
    weights = checks.anchor_weights(weights, features[0], len(domains))
    ranks = ranks_sharing(dist, group, sizes, features[0])
    lse, _, positive = _statistics(
        features,
        domains,
        logit_scale,
        logit_offset,
        pair_group=row_group,
        ranks=ranks,
        backend=backend,
        chunk_bytes=chunk_bytes,
        keep_bytes=keep_bytes,
        precision=precision,
    )
    positives: list[list[Tensor]] = [[] for _ in domains]
    for index, couple in enumerate(couples(len(domains))):
        for block in couple:
            positives[block].append(positive[index])
    together = torch.cat([torch.stack(each).logsumexp(dim=0) for each in positives])
    loss = softplus(lse - together)
    if weights is not None:
        return reduce_weighted(loss, weights, reduction, ranks)
    return reduce(loss, reduction, ranks, len(domains))


def nt_xent_loss(
    view1: Tensor,
    view2: Tensor,
    temperature: Tensor | float,
    *,
    row_group: Tensor | None = None,
    group_role: GroupRole = "excluded",
    weights: Tensor | None = None,
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
        row_group: (N,) integer ids of the samples, of all processes; what group_role says of views
            of different samples of one group, e.g. duplicates.
        group_role: "excluded": they are no negatives; "positive": all views of a sample's group
            are positives, as of a label in the supervised contrastive loss.
        weights: (2N,) floating point >= 0, the anchors'; the mean is then sum(w * loss) / sum(w),
            0 where all are 0. They may have a gradient.
        metrics: a dictionary for the top-1 "accuracy", 0-d, without gradient; not with groups of
            positives.
        reduction: "mean" or "sum" over the 2N anchors; "none": (2N,), view1's before view2's, with
            their weights.
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
    options: dict[str, Any] = {
        "weights": weights,
        "reduction": reduction,
        "backend": backend,
        "chunk_bytes": chunk_bytes,
        "keep_bytes": keep_bytes,
        "precision": precision,
        "dist": dist,
        "group": group,
    }
    if group_role != "excluded":
        checks.check_blocks([view1, view2], [0, 0])
        checks.check_groups(group_role, {"row_group": (row_group, view1.shape[0])}, view1)
        if metrics is not None:
            raise ValueError("metrics know one positive an anchor; leave out metrics, or groups")
        assert row_group is not None
        if sizes is not None:
            options["sizes"] = tuple(2 * rows for rows in sizes)
        return sup_con_loss(
            concatenate([view1, view2]), row_group.repeat(2), temperature, **options
        )
    return mp_nce_loss(
        [view1, view2],
        [0, 0],
        checks.inverse(temperature, view1),
        row_group=row_group,
        metrics=metrics,
        sizes=sizes,
        **options,
    )


def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    temperature: Tensor | float,
    *,
    weights: Tensor | None = None,
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
        weights: (M,) floating point >= 0, the anchors'; the mean is then sum(w * loss) / sum(w)
            over the anchors that have a positive. They may have a gradient.
        reduction: "mean" or "sum" over the anchors that have a positive, 0 if none has; "none":
            (M,), 0 where there is no positive, with their weights.
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
    weights = checks.anchor_weights(weights, features)
    if weights is None:
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
    if weights is not None:
        # anchors without a positive count in neither sum
        weights = torch.where(has_positive, weights, 0.0)
        return reduce_weighted(loss, weights, reduction, ranks)
    if reduction == "none":
        return loss
    sums = all_reduce_loss(torch.stack((loss.sum(), has_positive.sum().to(loss))), ranks)
    total, anchors = sums.unbind()
    return total / anchors.detach().clamp(min=1) if reduction == "mean" else total


def _statistics(
    features: list[Tensor],
    domains: list[int],
    logit_scale: Tensor | float,
    logit_offset: Tensor | float | None,
    **options: Any,
) -> BlockStatistics:
    """`block_statistics` of blocks, with tables as the losses take them."""
    like, count = features[0], max(domains) + 1
    scale = checks.as_table("logit_scale", logit_scale, count, like)
    offset = None
    if logit_offset is not None:
        offset = checks.as_table("logit_offset", logit_offset, count, like)
        # tables may hold more domains than the blocks have
        size = min(len(scale), len(offset))
        scale, offset = scale[:size, :size], offset[:size, :size]
    return block_statistics(concatenate(features), domains, scale, offset, **options)
