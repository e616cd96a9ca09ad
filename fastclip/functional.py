"""Contrastive losses as functions: exact, in memory linear in the batch.

Features are normalized by the caller and scales already exponentiated, as in open_clip. Results
are float32 (float64 for float64 features); gradients come in each input's dtype.

Over several processes the features are one process's rows, the anchors those of all: every process
returns the loss of the global batch ("none": of its own anchors). "gather" brings all columns at
once, "ring" one process's after the other, in memory linear in a process's own rows. A feature's
gradient is the number of processes times the global loss's, and those of scalars average to it, so
that the averaging of data-parallel training gives exactly the full batch's gradient. With "none"
gradients are those of the sum of upstream times loss over all processes: sum those of scalars over
the processes, do not average them. All processes call alike; the upstream gradient of a mean or sum
is the same on all.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastclip.ops import checks, dense, similarity
from fastclip.ops.attention import attention as attention
from fastclip.ops.attention import packed_attention as packed_attention
from fastclip.ops.candidates import mean_left
from fastclip.ops.collectives import global_sum
from fastclip.ops.info_nce import info_nce_sum
from fastclip.ops.labels import label_statistics
from fastclip.ops.numerics import softplus
from fastclip.ops.problem import couples
from fastclip.ops.ranking import ranking_loss as ranking_loss
from fastclip.ops.reductions import (
    check_reduction,
    concatenate,
    ranks_sharing,
    reduce,
    reduce_sum,
    share_above,
    with_bias,
)
from fastclip.ops.sigmoid import sigmoid_loss
from fastclip.ops.similarity import Statistics
from fastclip.ops.symmetric import block_statistics

Exchange = Literal["gather", "ring"]


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    label_smoothing: float = 0.0,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
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
    """Symmetric image-text cross-entropy (Radford et al. 2021, figure 3).

    Args:
        image_features: (N, D), normalized, of any floating-point dtype.
        text_features: (M, D), normalized, M >= N; text i belongs to image i, texts beyond the
            N-th are hard negatives (NegCLIP), compared with the images of all processes.
        logit_scale: 0-d or (1,) tensor, or a number: the inverse temperature.
        logit_bias: accepted for compatibility with open_clip; a constant cancels in a softmax, so
            it changes neither the loss nor any gradient (its own is 0).
        label_smoothing: in [0, 1); mass spread evenly over the candidates of each direction, with
            groups over the ones that are left.
        row_group, column_group: (N,) and (M,) integer ids; texts of an image's group other than
            its own are left out, so that duplicate captions are not negatives.
        metrics: a dictionary for the top-1 "image_to_text_accuracy" and "text_to_image_accuracy".
        reduction: "mean" over the N pairs of the mean of both directions; "sum": N times that;
            "none": each pair's, (N,).
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.
        precision: "auto" follows autocast, "input" computes in the features' dtype.
        dist: None, or "gather" or "ring" where processes share the loss: features are this
            process's rows, the loss is that of all, averaged gradients (DDP) are the full batch's.
        group: the process group; None: the default one.
        sizes: rows of every process; None: equally many.

    Returns:
        The loss, 0-d or (N,), float32 (float64 for float64 features).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, e.g. fewer texts than images.

    Examples:
        >>> import torch
        >>> from fastclip.functional import clip_loss
        >>> images = torch.eye(3, requires_grad=True)
        >>> loss = clip_loss(images, torch.eye(3), logit_scale=2.0)
        >>> loss.backward()
        >>> round(loss.item(), 4), images.grad.shape
        (0.2395, torch.Size([3, 3]))
    """
    check_reduction(reduction)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; give a number in [0, 1)")
    request = dense.Request(
        reduction, backend, chunk_bytes, keep_bytes, precision, dist, group, sizes
    )
    small = dense.pairs_loss(
        image_features,
        text_features,
        logit_scale,
        request,
        both=True,
        smoothing=label_smoothing,
        groups=(row_group, column_group),
        accuracies=("image_to_text_accuracy", "text_to_image_accuracy"),
        metrics=metrics,
    )
    if small is not None:
        return with_bias(small, logit_bias)
    ranks = ranks_sharing(dist, group, sizes, image_features)
    grouped = row_group is not None and column_group is not None
    statistics = similarity.similarity_statistics(
        image_features,
        text_features,
        logit_scale,
        row_group=row_group,
        column_group=column_group,
        maxima=metrics is not None,
        means=label_smoothing > 0 and not grouped,
        ranks=ranks,
        backend=backend,
        chunk_bytes=chunk_bytes,
        keep_bytes=keep_bytes,
        precision=precision,
    )
    positive = statistics.positive
    row, column = (softplus(lse - positive) for lse in (statistics.row_lse, statistics.column_lse))
    loss = (row + column) / 2
    if label_smoothing > 0:
        if row_group is not None and column_group is not None:
            n = image_features.shape[0]
            cosine = mean_left(image_features, text_features, row_group, column_group, ranks)
            cosine = cosine + mean_left(
                text_features[:n], image_features, column_group[:n], row_group, ranks
            )
            mean = (cosine * logit_scale / 2).to(positive.dtype)
        else:
            mean = (statistics.row_mean + statistics.column_mean) / 2
        loss = loss + label_smoothing * (positive - mean)
    loss = with_bias(loss, logit_bias)
    if metrics is not None:
        metrics["image_to_text_accuracy"] = share_above(positive, statistics.row_max, ranks)
        metrics["text_to_image_accuracy"] = share_above(positive, statistics.column_max, ranks)
    return reduce(loss, reduction, ranks)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
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
    """Sigmoid loss over all pairs (Zhai et al. 2023), with the values of the open_clip loss.

    Args:
        image_features, text_features: (N, D), normalized, of any floating-point dtype; text i
            belongs to image i.
        logit_scale: 0-d or (1,) tensor, or a number: the inverse temperature.
        logit_bias: 0-d or (1,) tensor, a number or None, added to every logit.
        reduction: "sum" over all N * N pairs; "mean": that divided by N; "none": each row's sum,
            (N,).
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: as other losses have it; this one keeps nothing.
        precision: "auto" follows autocast, "input" computes in the features' dtype.
        dist: None, or "gather" or "ring" where processes share the loss: features are this
            process's rows, the loss is that of all, averaged gradients (DDP) are the full batch's.
        group: the process group; None: the default one.
        sizes: rows of every process; None: equally many.

    Returns:
        The loss, 0-d or (N,), float32 (float64 for float64 features).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, e.g. fewer texts than images.

    Examples:
        >>> import torch
        >>> from fastclip.functional import siglip_loss
        >>> images = texts = torch.eye(3)
        >>> loss = siglip_loss(images, texts, logit_scale=10.0, logit_bias=-10.0)
        >>> round(loss.item(), 4)
        0.6932
    """
    check_reduction(reduction)
    checks.check_keep_bytes(keep_bytes)
    if image_features.shape[:1] != text_features.shape[:1]:
        raise ValueError(
            f"{image_features.shape[0]} images and {text_features.shape[0]} texts; the sigmoid "
            "loss needs one text an image"
        )
    request = dense.Request(
        reduction, backend, chunk_bytes, keep_bytes, precision, dist, group, sizes
    )
    small = dense.sigmoid_loss(image_features, text_features, logit_scale, logit_bias, request)
    if small is not None:
        return small
    ranks = ranks_sharing(dist, group, sizes, image_features)
    loss = sigmoid_loss(
        image_features,
        text_features,
        logit_scale,
        logit_bias,
        per_row=reduction == "none",
        ranks=ranks,
        backend=backend,
        chunk_bytes=chunk_bytes,
        precision=precision,
    )
    return reduce_sum(loss, reduction, ranks, image_features.shape[0])


def info_nce_loss(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    positive_index: Tensor | None = None,
    *,
    bank: Tensor | None = None,
    in_batch: bool = True,
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
    """One-direction softmax cross-entropy (van den Oord et al. 2018): each query among the keys.

    Args:
        query: (N, D), normalized, of any floating-point dtype.
        keys: (M, D), normalized; further keys are extra negatives.
        logit_scale: 0-d or (1,) tensor, or a number: the inverse temperature.
        positive_index: (N,) integers in [0, M), the queries' positives; may repeat. None: query
            i's is key i. Values are not checked on the host; out of range is undefined. Over
            several processes they count this process's keys.
        bank: (K, D), further negatives without gradient (a memory bank).
        in_batch: whether other queries' keys are negatives; False only with a bank.
        metrics: a dictionary for the top-1 "accuracy", 0-d, without gradient.
        reduction: "mean" or "sum" over the N queries; "none": each query's, (N,).
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.
        precision: "auto" follows autocast, "input" computes in the features' dtype.
        dist: None, or "gather" or "ring" where processes share the loss: features are this
            process's rows, the loss is that of all, averaged gradients (DDP) are the full batch's.
        group: the process group; None: the default one.
        sizes: rows of every process; None: equally many.

    Returns:
        The loss, 0-d or (N,), float32 (float64 for float64 features).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, e.g. a bank with `dist`.

    Examples:
        >>> import torch
        >>> from fastclip.functional import info_nce_loss
        >>> queries, keys, found = torch.eye(4)[:2], torch.eye(4), {}
        >>> info_nce_loss(queries, keys, 2.0, torch.tensor([0, 3]), metrics=found).shape
        torch.Size([])
        >>> found["accuracy"]  # the second query is nearer to key 1 than to its positive, key 3
        tensor(0.5000)
    """
    check_reduction(reduction)
    if bank is None and not in_batch:
        raise ValueError("in_batch=False leaves no negatives; give a bank")
    checks.check_keep_bytes(keep_bytes)
    request = dense.Request(
        reduction, backend, chunk_bytes, keep_bytes, precision, dist, group, sizes
    )
    small = dense.pairs_loss(
        query,
        keys,
        logit_scale,
        request,
        both=False,
        positive_index=positive_index,
        bank=bank,
        in_batch=in_batch,
        accuracies=("accuracy",),
        metrics=metrics,
    )
    if small is not None:
        return small
    ranks = ranks_sharing(dist, group, sizes, query)
    if bank is not None and ranks is not None:
        raise ValueError("a bank is a process's own; leave out dist, or the bank")
    own = keys.shape[0]
    if bank is not None:
        checks.check_features("bank", bank)
        checks.check_features("keys", keys)
        if bank.shape[1] != keys.shape[1] or bank.device != keys.device:
            raise ValueError(
                f"the bank is {tuple(bank.shape)} on {bank.device}, the keys "
                f"{tuple(keys.shape)} on {keys.device}; both need one width and device"
            )
        keys = concatenate([keys, bank.detach().to(keys.dtype)])
    if positive_index is None and query.shape[0] > own:
        raise ValueError(f"{query.shape[0]} queries but only {own} keys; give positive_index")
    positives: dict[str, Any] = {
        "positive_index": positive_index,
        "first_negative": 0 if in_batch else own,
        "columns_with_gradient": own,
        "ranks": ranks,
    }
    options: dict[str, Any] = {
        "backend": backend,
        "chunk_bytes": chunk_bytes,
        "keep_bytes": keep_bytes,
        "precision": precision,
        "maxima": metrics is not None,
    }
    if reduction == "none":
        statistics = similarity.similarity_statistics(
            query, keys, logit_scale, column_statistics=False, **positives, **options
        )
        loss = softplus(statistics.row_lse - statistics.positive)
        if metrics is not None:
            margin = statistics.positive.detach() - statistics.row_max
    else:
        loss, margin = info_nce_sum(query, keys, logit_scale, **positives, **options)
    if metrics is not None:
        metrics["accuracy"] = share_above(margin, torch.zeros_like(margin), ranks)
    return reduce_sum(loss, reduction, ranks, query.shape[0])


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


def similarity_statistics(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor | float,
    *,
    column_statistics: bool = True,
    positive_index: Tensor | None = None,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
    first_negative: int = 0,
    columns_with_gradient: int | None = None,
    maxima: bool = False,
    means: bool = False,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
    precision: str = "auto",
    dist: Exchange | None = None,
    group: ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Statistics:
    """What softmax losses are made of, differentiable, for a loss of your own.

    Of S = logit_scale * rows @ columns.T, which is never stored: the log-sum-exp of each row's
    and each column's negatives, the positive's logit, maxima and means on request. Row i's
    negatives are all columns but its positive and those left out by a group.

    Args:
        rows: (N, D), normalized, of any floating-point dtype.
        columns: (M, D), normalized; column i belongs to row i, further ones are negatives.
        logit_scale: 0-d or (1,) tensor, or a number: the inverse temperature.
        column_statistics: whether columns have statistics too; needs M >= N.
        positive_index: (N,) integers in [0, M), the rows' positives, not checked on the host; only
            without column_statistics and groups.
        row_group, column_group: (N,) and (M,) integer ids, both or neither; columns of a row's
            group other than its positive are left out.
        first_negative: columns before it are positives only; without column_statistics and dist.
        columns_with_gradient: columns from it on get no gradient; None: all do; without dist.
        maxima: whether row_max and column_max are wanted; then `keep_bytes` is not used.
        means: whether row_mean and column_mean are wanted, over all columns and rows; needs M >= N.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.
        precision: "auto" follows autocast, "input" computes in the features' dtype.
        dist: None, or "gather" or "ring": rows and columns are this process's, compared with all.
            A mean over own rows has, averaged over processes (DDP), the full batch's gradient.
        group: the process group; None: the default one.
        sizes: rows of every process; None: equally many.

    Returns:
        A NamedTuple of row_lse, row_max, column_lse, column_max, positive, row_mean, column_mean,
        each (N,) in float32 (float64 for float64 features), or empty where not asked for. The
        log-sum-exp of a row without negatives is -inf. Maxima have no gradient.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit together.

    Examples:
        >>> import torch
        >>> from fastclip.functional import similarity_statistics
        >>> images = texts = torch.eye(3)
        >>> found = similarity_statistics(images, texts, 2.0)
        >>> (found.row_lse - found.positive).mean()  # the positive left out of the denominator
        tensor(-1.3069)
    """
    ranks = ranks_sharing(dist, group, sizes, rows)
    if ranks is not None and (first_negative or columns_with_gradient is not None):
        raise ValueError(
            "first_negative and columns_with_gradient are a process's own; leave out dist"
        )
    return similarity.similarity_statistics(
        rows,
        columns,
        logit_scale,
        column_statistics=column_statistics,
        positive_index=positive_index,
        row_group=row_group,
        column_group=column_group,
        first_negative=first_negative,
        columns_with_gradient=columns_with_gradient,
        maxima=maxima,
        means=means,
        ranks=ranks,
        backend=backend,
        chunk_bytes=chunk_bytes,
        keep_bytes=keep_bytes,
        precision=precision,
    )
