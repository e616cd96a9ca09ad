"""Losses of two sides, where row i belongs to column i: CLIP, SigLIP, InfoNCE."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastclip.ops import checks, dense, similarity
from fastclip.ops.candidates import mean_left
from fastclip.ops.collectives import Exchange
from fastclip.ops.info_nce import info_nce_sum
from fastclip.ops.numerics import softplus
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
