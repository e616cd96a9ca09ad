"""Global contrastive losses: each pair against the whole data, by an estimate a sample.

With ℓ the log-sum-exp of a row's negatives, S_ii its positive and B the rows of all processes,

    log g_i = ℓ_i - S_ii - log(B - 1)      how large the batch's negatives are beside the positive
    log u_i <- log((1 - gamma) u_i + gamma g_i)      the same over all data (`estimators.py`)

of images and texts apart. The gradient is that of the mean of log g with g / (eps + u) in place of
1 = g / g: a batch that happens to be easy or hard for a pair counts as the whole data do.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastclip.ops import checks
from fastclip.ops.collectives import Exchange
from fastclip.ops.estimators import move_estimates
from fastclip.ops.reductions import check_reduction, ranks_sharing, reduce
from fastclip.ops.similarity import similarity_statistics

# by variant, the gamma that it has by default
GAMMAS = {"sogclr": 0.8, "v1": 0.2, "v3": 0.2}
RHO = 6.5


def global_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    index: Tensor,
    log_u: Tensor,
    gamma: float,
    *,
    rho: float | None = None,
    eps: float = 1e-14,
    update: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
    precision: str = "auto",
    dist: Exchange | None = None,
    group: ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Contrastive loss over the whole data by moving averages (SogCLR; FastCLIP v1 and v3).

    With g_i the mean of exp(S_ij - S_ii) over the batch's negatives j of image i, likewise of text
    i, and u_i its moving average over the steps that i was in, (1 - gamma) u_i + gamma g_i, the
    loss is the mean over the pairs of

        (log u_i of the image + log u_i of the text) / 2                     rho=None: SogCLR, v1
        temperature * ((log u_i of the image + that of the text) / 2 + rho)  with rho: v3

    and its gradient that of log g_i times g_i / (eps + u_i), a constant. The temperature is 1 /
    logit_scale. A pair's u is its g on the first visit; an index that comes several times in a
    batch moves once, by the mean of its g. Sources: Yuan et al. 2022 (SogCLR), arXiv:2202.12387;
    Wei et al. 2024 (FastCLIP), arXiv:2407.01445.

    Args:
        image_features: (N, D), normalized, of any floating-point dtype.
        text_features: (N, D), normalized; text i belongs to image i.
        logit_scale: 0-d or (1,) tensor, or a number: the inverse temperature. Pass a number, or
            detach it, where the temperature is constant (SogCLR, v1).
        index: (N,) integers in [0, K), the pairs' places in the data; may repeat. On the CPU, as a
            loader gives it, it is checked; on a GPU values out of range are undefined.
        log_u: (2, K) float32 or float64 on the features' device: log u of K images and texts, at
            first -inf. Changed in place; over several processes equal on all, and stays equal.
        gamma: in (0, 1]: how much of u is replaced by g.
        rho: None, or at least 0: how strongly a low temperature is resisted.
        eps: positive; bounds g / (eps + u).
        update: whether `log_u` is changed; without, the loss is computed as if it had been.
        reduction: "mean" or "sum" over the pairs; "none": each pair's, (N,).
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
        ValueError: shapes, dtypes, devices or options do not fit, an index is K or more, or the
            batch is a single pair.

    Examples:
        >>> import torch
        >>> from fastclip.functional import global_contrastive_loss
        >>> log_u = torch.full((2, 100), -torch.inf)  # of 100 pairs
        >>> images, texts, index = torch.eye(3), torch.eye(3), torch.tensor([4, 99, 7])
        >>> loss = global_contrastive_loss(images, texts, 2.0, index, log_u, gamma=0.2, rho=6.5)
        >>> loss  # (-2 + 6.5) / 2
        tensor(2.2500)
        >>> log_u[:, 99]
        tensor([-2., -2.])
    """
    check_reduction(reduction)
    ranks = ranks_sharing(dist, group, sizes, image_features)
    rows = image_features.shape[0]
    _check(rows, text_features, index, log_u, image_features.device)
    check_options(gamma, rho, eps)
    pairs = rows if ranks is None else ranks.rows
    if pairs < 2:
        raise ValueError("a batch of 1 pair has no negatives; use at least 2")
    scale = checks.as_scalar("logit_scale", logit_scale, image_features)
    found = similarity_statistics(
        image_features,
        text_features,
        scale,
        ranks=ranks,
        backend=backend,
        chunk_bytes=chunk_bytes,
        keep_bytes=keep_bytes,
        precision=precision,
    )
    log_g = torch.stack((found.row_lse, found.column_lse)) - found.positive - math.log(pairs - 1)
    fixed = log_g.detach()
    estimate = move_estimates(log_u, index, fixed, gamma, ranks, store=update).to(fixed.dtype)
    weight = (fixed - torch.logaddexp(estimate, torch.full_like(estimate, math.log(eps)))).exp()
    # a difference of 0 carries the gradient
    loss = (estimate + weight * (log_g - fixed)).mean(dim=0)
    if rho is not None:
        loss = (loss + rho) / scale.reshape(()).to(loss.dtype)
    return reduce(loss, reduction, ranks)


def check_variant(variant: str) -> None:
    """Refuse an unknown one.

    Raises:
        ValueError: it is none of sogclr, v1 and v3.
    """
    if variant == "v2":
        raise ValueError(
            "variant 'v2', a temperature for each sample, is not supported; use 'v3', which learns "
            "one for all"
        )
    if variant not in GAMMAS:
        raise ValueError(f"variant is {variant!r}; use one of {', '.join(GAMMAS)}")


def check_options(gamma: float, rho: float | None, eps: float) -> None:
    """Refuse numbers that make no estimate.

    Raises:
        ValueError: gamma is not in (0, 1], rho below 0, or eps not positive.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma}; give a number in (0, 1]")
    if rho is not None and not 0 <= rho < math.inf:
        raise ValueError(f"rho is {rho}; give a number of at least 0, or None")
    checks.check_positive("eps", eps)


def _check(rows: int, texts: Tensor, index: Tensor, log_u: Tensor, device: torch.device) -> None:
    if texts.shape[:1] != (rows,):
        raise ValueError(
            f"{rows} images and {len(texts)} texts; a global loss needs one text an image"
        )
    if log_u.ndim != 2 or log_u.shape[0] != 2 or log_u.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"log_u is {tuple(log_u.shape)} in {log_u.dtype}; give (2, K) in float32 or float64"
        )
    if log_u.device != device or log_u.requires_grad:
        raise ValueError(
            f"log_u is on {log_u.device}, with requires_grad={log_u.requires_grad}; give it on "
            f"the features' device, {device}, without gradient"
        )
    if index.shape != (rows,) or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"index is {tuple(index.shape)} in {index.dtype}; give ({rows},) integers (int64), one "
            "a pair"
        )
    # what is on a GPU cannot be looked at without waiting for it
    wrong = checks.outside(index, log_u.shape[1])
    if wrong is not None:
        raise ValueError(
            f"index {wrong} is outside the estimates of {log_u.shape[1]} samples; count from 0, "
            "and give as many estimates as the data have samples"
        )
    if index.device not in (device, torch.device("cpu")):
        raise ValueError(f"index is on {index.device}; give it on the CPU or on {device}")
