"""Losses of two sides, where row i belongs to column i: CLIP, SigLIP, InfoNCE."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastclip.ops import checks, dense, similarity
from fastclip.ops.candidates import candidate_mean, own_minus_group_mean
from fastclip.ops.checks import GroupRole
from fastclip.ops.collectives import Exchange, Ranks
from fastclip.ops.info_nce import info_nce_sum
from fastclip.ops.numerics import softplus
from fastclip.ops.reductions import (
    check_reduction,
    concatenate,
    ranks_sharing,
    reduce,
    reduce_sum,
    reduce_weighted,
    reduce_weighted_sum,
    top1_accuracy,
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
        row_group, column_group: (N,) and (M,) integer ids, of all processes, both or neither; what
            group_role says of an image and a text of one group, e.g. duplicates.
        group_role: "excluded": texts of an image's group other than its own are no negatives, and
            the reverse; "positive": they are positives, weighted alike (class means).
        weights: (N,) floating point >= 0, the pairs'; the mean is then sum(w * loss) / sum(w), 0
            where all are 0. They may have a gradient.
        metrics: a dictionary for the top-1 "image_to_text_accuracy" and "text_to_image_accuracy",
            where a group of positives counts as negatives.
        reduction: "mean" over the N pairs of the mean of both directions; "sum": N times that;
            "none": each pair's, (N,), with its weight.
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
    sides = image_features, text_features
    positives = _positives(group_role, *sides, row_group, column_group)
    if positives is not None:
        row_group = column_group = None
    weights = checks.anchor_weights(weights, image_features)
    of_pairs = reduction if weights is None else "none"
    request = dense.Request(
        of_pairs, backend, chunk_bytes, keep_bytes, precision, dist, group, sizes
    )
    loss = dense.pairs_loss(
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
    if loss is not None and positives is None and weights is None:
        return with_bias(loss, logit_bias)
    ranks = ranks_sharing(dist, group, sizes, image_features)
    if loss is None:
        statistics = similarity.similarity_statistics(
            image_features,
            text_features,
            logit_scale,
            row_group=row_group,
            column_group=column_group,
            maxima=metrics is not None,
            means=label_smoothing > 0 and row_group is None,
            ranks=ranks,
            backend=backend,
            chunk_bytes=chunk_bytes,
            keep_bytes=keep_bytes,
            precision=precision,
        )
        positive = statistics.positive
        lses = statistics.row_lse, statistics.column_lse
        row, column = (softplus(lse - positive) for lse in lses)
        loss = (row + column) / 2
        if label_smoothing > 0:
            if row_group is not None and column_group is not None:
                mean = (
                    _of_both(candidate_mean, *sides, row_group, column_group, ranks) * logit_scale
                )
                mean = mean.to(positive.dtype)
            else:
                mean = (statistics.row_mean + statistics.column_mean) / 2
            loss = loss + label_smoothing * (positive - mean)
        if metrics is not None:
            metrics["image_to_text_accuracy"] = top1_accuracy(positive, statistics.row_max, ranks)
            metrics["text_to_image_accuracy"] = top1_accuracy(
                positive, statistics.column_max, ranks
            )
        loss = reduce(loss, of_pairs, ranks)
    if positives is not None:
        above = _of_both(own_minus_group_mean, *sides, *positives, ranks)
        # the number first: a scale in 16 bits would round it
        above = logit_scale * ((1 - label_smoothing) * above)
        loss = loss + reduce(above.to(loss.dtype), of_pairs, ranks)
    loss = with_bias(loss, logit_bias)
    return loss if weights is None else reduce_weighted(loss, weights, reduction, ranks)


def _positives(
    role: str, x: Tensor, y: Tensor, row_group: Tensor | None, column_group: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Groups that are positives; all are checked here."""
    if role == "excluded" and row_group is None and column_group is None:
        return None
    checks.check_features("features of the rows", x)
    checks.check_features("features of the columns", y)
    ids = {"row_group": (row_group, x.shape[0]), "column_group": (column_group, y.shape[0])}
    if checks.check_groups(role, ids, x) and row_group is not None and column_group is not None:
        return row_group, column_group
    return None


def _of_both(
    term: Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    row_group: Tensor,
    column_group: Tensor,
    ranks: Ranks | None,
) -> Tensor:
    """The mean of what rows are among columns and, the first of them, columns among rows."""
    n = x.shape[0]
    of_rows = term(x, y, row_group, column_group, ranks)
    return (of_rows + term(y[:n], x, column_group[:n], row_group, ranks)) / 2


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
    group_role: GroupRole = "excluded",
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
    """Sigmoid loss over all pairs (Zhai et al. 2023), with the values of the open_clip loss.

    Args:
        image_features, text_features: (N, D), normalized, of any floating-point dtype; text i
            belongs to image i.
        logit_scale: 0-d or (1,) tensor, or a number: the inverse temperature.
        logit_bias: 0-d or (1,) tensor, a number or None, added to every logit.
        row_group, column_group: (N,) integer ids each, of all processes, both or neither; what
            group_role says of an image and a text of one group, e.g. duplicates.
        group_role: "excluded": texts of an image's group other than its own are no negatives;
            "positive": they are positives.
        weights: (N,) floating point >= 0, the images'; the mean is then the sum over rows of w
            times the row's sum, divided by sum(w); 0 where all are 0. They may have a gradient.
        reduction: "sum" over all N * N pairs; "mean": that divided by N; "none": each row's sum,
            (N,), with its weight.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes that a small batch may keep; larger ones keep nothing.
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
    positives = _positives(group_role, image_features, text_features, row_group, column_group)
    weights = checks.anchor_weights(weights, image_features)
    of_rows = "none" if weights is not None else reduction
    loss = None
    if row_group is None:
        request = dense.Request(
            of_rows, backend, chunk_bytes, keep_bytes, precision, dist, group, sizes
        )
        loss = dense.sigmoid_loss(image_features, text_features, logit_scale, logit_bias, request)
        if loss is not None and weights is None:
            return loss
    ranks = ranks_sharing(dist, group, sizes, image_features)
    if loss is None:
        loss = sigmoid_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            row_group=row_group,
            column_group=column_group,
            positive_groups=positives is not None,
            per_row=reduction == "none",
            weights=None if reduction == "none" else weights,
            ranks=ranks,
            backend=backend,
            chunk_bytes=chunk_bytes,
            precision=precision,
        )
        if weights is not None and reduction != "none":
            return reduce_weighted_sum(loss, weights, reduction, ranks)
    if weights is not None:
        return reduce_weighted(loss, weights, reduction, ranks)
    return reduce_sum(loss, reduction, ranks, image_features.shape[0])


def info_nce_loss(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    positive_index: Tensor | None = None,
    *,
    bank: Tensor | None = None,
    in_batch: bool = True,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
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
    """One-direction softmax cross-entropy (van den Oord et al. 2018): each query among the keys.

    Args:
        query: (N, D), normalized, of any floating-point dtype.
        keys: (M, D), normalized; further keys are extra negatives.
        logit_scale: 0-d or (1,) tensor, or a number: the inverse temperature.
        positive_index: (N,) integers in [0, M), the queries' positives; may repeat. None: query
            i's is key i. On a GPU, values out of range are not found out, and what they give is
            undefined. Over several processes they count this process's keys.
        bank: (K, D), further negatives without gradient (a memory bank).
        in_batch: whether other queries' keys are negatives; False only with a bank.
        row_group, column_group: (N,) and (M,) integer ids, with a bank (M + K,), of all processes,
            both or neither; without positive_index. What group_role says of a query and a key of
            one group, e.g. duplicates.
        group_role: "excluded": keys of a query's group other than its own are no negatives;
            "positive": they are positives, weighted alike (class means).
        weights: (N,) floating point >= 0, the queries'; the mean is then sum(w * loss) / sum(w), 0
            where all are 0. They may have a gradient.
        metrics: a dictionary for the top-1 "accuracy", 0-d, without gradient; a group of positives
            counts as negatives.
        reduction: "mean" or "sum" over the N queries; "none": each query's, (N,), with its weight.
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
    if positive_index is not None and row_group is not None:
        raise ValueError("positive_index and groups are not for one call; leave out one of them")
    all_keys = keys if bank is None else _with_bank(keys, bank, dist)
    positives = _positives(group_role, query, all_keys, row_group, column_group)
    if positives is not None:
        row_group = column_group = None
        if not in_batch:
            raise ValueError(
                "group_role 'positive' needs the keys of its batch; leave out in_batch"
            )
    weights = checks.anchor_weights(weights, query)
    of_rows = reduction if weights is None else "none"
    request = dense.Request(
        of_rows, backend, chunk_bytes, keep_bytes, precision, dist, group, sizes
    )
    loss = dense.pairs_loss(
        query,
        keys,
        logit_scale,
        request,
        both=False,
        positive_index=positive_index,
        groups=(row_group, column_group),
        bank=bank,
        in_batch=in_batch,
        accuracies=("accuracy",),
        metrics=metrics,
    )
    if loss is not None and positives is None and weights is None:
        return loss
    ranks = ranks_sharing(dist, group, sizes, query)
    own = keys.shape[0]
    if bank is not None and positive_index is not None and loss is None:
        # the operator takes the bank's rows for columns too, and they are negatives
        checks.check_ids("positive_index", positive_index, query.shape[0], query.device)
        checks.check_index("positive_index", positive_index, own)
    if positive_index is None and query.shape[0] > own:
        raise ValueError(f"{query.shape[0]} queries but only {own} keys; give positive_index")
    above = None
    if positives is not None:
        above = logit_scale * own_minus_group_mean(query, all_keys, *positives, ranks)
    if loss is None:
        options: dict[str, Any] = {
            "positive_index": positive_index,
            "row_group": row_group,
            "column_group": column_group,
            "first_negative": 0 if in_batch else own,
            "columns_with_gradient": own,
            "maxima": metrics is not None,
            "ranks": ranks,
            "backend": backend,
            "chunk_bytes": chunk_bytes,
            "keep_bytes": keep_bytes,
            "precision": precision,
        }
        # one sum has its gradient in the forward, with weights or without
        if reduction == "none":
            statistics = similarity.similarity_statistics(
                query, all_keys, logit_scale, column_statistics=False, **options
            )
            loss = softplus(statistics.row_lse - statistics.positive)
            if metrics is not None:
                margin = statistics.positive.detach() - statistics.row_max
        else:
            loss, margin = info_nce_sum(query, all_keys, logit_scale, weights=weights, **options)
        if metrics is not None:
            metrics["accuracy"] = top1_accuracy(margin, torch.zeros_like(margin), ranks)
        if weights is not None and reduction != "none":
            if above is not None:
                loss = loss + (above.to(loss.dtype) * weights).sum()
            return reduce_weighted_sum(loss, weights, reduction, ranks)
        loss = reduce_sum(loss, reduction, ranks, query.shape[0])
    if above is not None:
        loss = loss + reduce(above.to(loss.dtype), of_rows, ranks)
    return loss if weights is None else reduce_weighted(loss, weights, reduction, ranks)


def _with_bank(keys: Tensor, bank: Tensor, dist: str | None) -> Tensor:
    """The keys, and behind them a bank's, which have no gradient."""
    if dist is not None:
        raise ValueError("a bank is a process's own; leave out dist, or the bank")
    checks.check_features("bank", bank)
    checks.check_features("keys", keys)
    if bank.shape[1] != keys.shape[1] or bank.device != keys.device:
        raise ValueError(
            f"the bank is {tuple(bank.shape)} on {bank.device}, the keys "
            f"{tuple(keys.shape)} on {keys.device}; both need one width and device"
        )
    return concatenate([keys, bank.detach().to(keys.dtype)])
