"""Contrastive losses as functions: exact, in memory linear in the batch.

Features are normalised by the caller and scales already exponentiated, as in open_clip. Results
are float32 (float64 for float64 features); gradients come in each input's dtype.
"""

import torch
from torch import Tensor

from fastclip.ops.similarity import similarity_statistics

REDUCTIONS = ("mean", "sum", "none")


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    label_smoothing: float = 0.0,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    chunk_bytes: int | None = None,
    precision: str = "auto",
) -> Tensor:
    """Symmetric image-text cross-entropy (Radford et al. 2021, figure 3), N x N never stored.

    Args:
        image_features: (N, D), normalised.
        text_features: (M, D), normalised, M >= N; text i belongs to image i, texts beyond the
            N-th are hard negatives that only images are compared with (NegCLIP).
        logit_scale: 0-d or (1,) tensor, or a number: the inverse temperature.
        logit_bias: accepted for open_clip's sake; a constant cancels in a softmax, so it changes
            neither the loss nor any gradient (its own is 0).
        label_smoothing: in [0, 1); mass spread evenly over all candidates of each direction.
        row_group, column_group: (N,) and (M,) integer ids; texts of an image's group other than
            its own are left out, so that duplicate captions are not negatives.
        reduction: "mean" over the N pairs of the mean of both directions, "sum" (N times that),
            or "none": (N,).
        backend: "auto", "torch" (chunked) or "reference" (dense, twice differentiable).
        chunk_bytes: size of a chunk of the similarity matrix, of which up to three are alive at
            a time; None takes a fixed default.
        precision: "auto" follows autocast, "input" computes in the features' dtype.

    Returns:
        The loss, 0-d or (N,).

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; use one of {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; give a number in [0, 1)")
    statistics = similarity_statistics(
        image_features,
        text_features,
        logit_scale,
        row_group=row_group,
        column_group=column_group,
        means=label_smoothing > 0,
        backend=backend,
        chunk_bytes=chunk_bytes,
        precision=precision,
    )
    positive = statistics.positive
    loss = (
        _softplus(statistics.row_lse - positive) + _softplus(statistics.column_lse - positive)
    ) / 2
    if label_smoothing > 0:
        mean = (statistics.row_mean + statistics.column_mean) / 2
        loss = loss + label_smoothing * (positive - mean)
    if logit_bias is not None:
        # a non-finite bias still shows
        loss = loss + 0 * logit_bias
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _softplus(x: Tensor) -> Tensor:
    # torch's softplus is the identity above 20, an error of 2e-9 that float64 shows
    return torch.logaddexp(x, torch.zeros_like(x))
