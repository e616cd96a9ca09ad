"""Queries among documents: several directions in one softmax, hard negatives weighted up.

With s = scale * cosine, and per query i its own documents: a positive and K hard negatives,

    query_to_doc    s(q_i, d) over all documents d
    query_to_query  s(q_i, q_j) over the other queries
    doc_to_query    s(q_j, p_i) over all queries, p_i being i's positive
    doc_to_doc      s(p_i, d) over the documents of other queries

"joint" is one softmax over all directions that are asked for: with L the log-sum-exp of the
negatives of all, loss_i = log(c + exp(L - s_ii)), where c is 2 if the positive stands in two of
them. "per_direction" is the mean of one softmax each.

Hardness adds alpha * cosine, without gradient, to the logits of some negatives of query_to_doc.
Statistics at scale + alpha have the right values, but gradients that are too large by
(scale + alpha) / scale; the upstream gradient of each row is multiplied by the inverse.

Shape suffixes: N queries, M documents of one, D width.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce as fold
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from fastclip.ops import dense
from fastclip.ops.checks import check_features, widened
from fastclip.ops.collectives import Exchange, Ranks
from fastclip.ops.info_nce import info_nce_sum
from fastclip.ops.labels import label_statistics
from fastclip.ops.numerics import softplus
from fastclip.ops.reductions import (
    check_reduction,
    concatenate,
    ranks_sharing,
    reduce,
    reduce_sum,
)
from fastclip.ops.similarity import similarity_statistics

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")
NOTHING = -1e30
"""Stands for the log-sum-exp of no entries, whose gradient would be inf - inf."""


def ranking_loss(
    query: Tensor,
    documents: Sequence[Tensor],
    logit_scale: Tensor | float,
    *,
    directions: Iterable[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
    precision: str = "auto",
    dist: Exchange | None = None,
    group: ProcessGroup | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Multiple negatives ranking, with the directions and the hardness of sentence-transformers.

    Args:
        query: (N, D), normalized, of any floating-point dtype.
        documents: blocks of (N, D), normalized: row i of the first is query i's positive, row i of
            each further one a hard negative of query i, compared with all queries.
        logit_scale: 0-d or (1,) tensor, or a number, > 0: the inverse temperature.
        directions: of "query_to_doc" (always), "query_to_query", "doc_to_query", "doc_to_doc":
            what a query, or its positive, is compared with.
        partition_mode: "joint": one softmax over all directions; "per_direction": one each, and
            their mean, only for "query_to_doc" and "doc_to_query".
        hardness_mode: which documents are weighted up by their similarity to the query:
            "all_negatives": all but the own positive; "in_batch_negatives": those of other queries
            (Lan et al. 2025, eq. 5); "hard_negatives": the own hard negatives (Schechter Vera et
            al. 2025); None: none.
        hardness_strength: alpha >= 0; alpha times the cosine, without gradient, is added to these
            documents' logits.
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
        ValueError: an unknown direction, mode or reduction, a negative strength, or shapes, dtypes,
            devices or options that do not fit.

    Examples:
        >>> import torch
        >>> from fastclip.functional import ranking_loss
        >>> query = positive = torch.eye(3)
        >>> round(ranking_loss(query, [positive, positive.roll(1, 0)], 2.0).item(), 4)
        0.9327
        >>> hard = {"hardness_mode": "all_negatives", "hardness_strength": 5.0}
        >>> round(ranking_loss(query, [positive, positive.roll(1, 0)], 2.0, **hard).item(), 4)
        5.0103
    """
    check_reduction(reduction)
    choice = RankingOptions.checked(directions, partition_mode, hardness_mode, hardness_strength)
    request = dense.Request(
        reduction, backend, chunk_bytes, keep_bytes, precision, dist, group, sizes
    )
    return _ranking_loss(query, documents, logit_scale, choice, request)


def mean_of_own_rows(
    query: Tensor,
    documents: Sequence[Tensor],
    logit_scale: float,
    choice: "RankingOptions",
    dist: str | None,
) -> Tensor:
    """`ranking_loss`, of which each process returns its own queries' mean, as libraries do.

    Averaged over the processes, its gradient is that of the full batch as well, if all of them
    multiply it by the same number.
    """
    request = dense.Request("mean", "auto", None, None, "auto", dist, None, None)
    return _ranking_loss(query, documents, logit_scale, choice, request, own_mean=True)


@dataclass(frozen=True)
class RankingOptions:
    """What is compared with what, and how it is weighted."""

    directions: frozenset[str]
    partition_mode: str
    hardness_mode: str | None
    strength: float

    @staticmethod
    def checked(
        directions: Iterable[str], partition_mode: str, hardness_mode: str | None, strength: float
    ) -> "RankingOptions":
        """Made from arguments; refuses what cannot be."""
        asked = tuple(directions)
        for direction in asked:
            if direction not in DIRECTIONS:
                raise ValueError(
                    f"directions have {direction!r}; use any of {', '.join(DIRECTIONS)}"
                )
        if "query_to_doc" not in asked:
            raise ValueError(
                f"directions are {asked}; the positive needs 'query_to_doc' among them"
            )
        if partition_mode not in ("joint", "per_direction"):
            raise ValueError(f"partition_mode is {partition_mode!r}; use joint or per_direction")
        if partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & {*asked}:
            raise ValueError(
                f"directions are {asked}: without a positive among them query_to_query and "
                "doc_to_doc have no softmax of their own; use partition_mode='joint'"
            )
        if hardness_mode is not None and hardness_mode not in HARDNESS:
            raise ValueError(
                f"hardness_mode is {hardness_mode!r}; use None or one of {', '.join(HARDNESS)}"
            )
        if not 0 <= strength < math.inf:
            raise ValueError(f"hardness_strength is {strength}; give a finite number of at least 0")
        if strength > 0 and hardness_mode is None:
            raise ValueError(
                f"hardness_strength is {strength} without hardness_mode; use one of "
                f"{', '.join(HARDNESS)}"
            )
        if strength == 0:
            hardness_mode = None
        return RankingOptions(frozenset(asked), partition_mode, hardness_mode, float(strength))

    @property
    def has_doc_to_query(self) -> bool:
        return "doc_to_query" in self.directions

    def effective_hardness(self, blocks: int) -> str | None:
        """The hardness mode, if these blocks of documents have what it weights."""
        return (
            None if self.hardness_mode == "hard_negatives" and blocks == 1 else self.hardness_mode
        )

    def is_one_direction(self, blocks: int) -> bool:
        """Whether the loss is InfoNCE's."""
        return len(self.directions) == 1 and self.effective_hardness(blocks) is None

    def is_plain(self, blocks: int) -> bool:
        """Whether the loss is InfoNCE's or CLIP's."""
        return (
            len(self.directions) == 1 or self.partition_mode == "per_direction"
        ) and self.effective_hardness(blocks) is None


def _ranking_loss(
    query: Tensor,
    documents: Sequence[Tensor],
    logit_scale: Tensor | float,
    choice: RankingOptions,
    request: dense.Request,
    own_mean: bool = False,
) -> Tensor:
    """The loss as the request has it, or the mean of this process's queries."""
    columns = _all_documents(query, documents)
    if choice.is_plain(len(documents)):
        small = dense.pairs_loss(query, columns, logit_scale, request, both=choice.has_doc_to_query)
        if small is not None:
            return small
    reduction = request.reduction
    ranks = ranks_sharing(request.dist, request.group, request.sizes, query)
    options: dict[str, Any] = {
        "ranks": ranks,
        "backend": request.backend,
        "chunk_bytes": request.chunk_bytes,
        "keep_bytes": request.keep_bytes,
        "precision": request.precision,
    }
    if choice.is_one_direction(len(documents)) and reduction != "none":
        total, _ = info_nce_sum(query, columns, logit_scale, maxima=False, **options)
        return total / len(query) if own_mean else reduce_sum(total, reduction, ranks, len(query))
    each = _loss_per_query(query, documents, columns, logit_scale, choice, options)
    return each.mean() if own_mean else reduce(each, reduction, ranks)


def _all_documents(query: Tensor, documents: Sequence[Tensor]) -> Tensor:
    """(M, D): the positives, then each block of hard negatives."""
    if not documents:
        raise ValueError("documents are empty; give the positives, (N, D), and any hard negatives")
    check_features("query", query)
    for block in documents:
        check_features("documents", block)
        if block.shape != query.shape or block.device != query.device:
            raise ValueError(
                f"a block of documents is {tuple(block.shape)} on {block.device}, the queries are "
                f"{tuple(query.shape)} on {query.device}; both need one shape and device"
            )
    return documents[0] if len(documents) == 1 else concatenate(list(documents))


def _loss_per_query(
    query: Tensor,
    documents: Sequence[Tensor],
    columns: Tensor,
    scale: Tensor | float,
    choice: RankingOptions,
    options: dict[str, Any],
) -> Tensor:
    """Each query's loss, (N,)."""
    ranks, blocks = options["ranks"], len(documents)
    mode = choice.effective_hardness(blocks)
    strength = choice.strength if mode in ("in_batch_negatives", "all_negatives") else 0.0
    ids = _global_query_ids(query, ranks)
    of_own: dict[str, Any] = {"row_group": ids, "column_group": ids.repeat(blocks)}
    # hard negatives of another weight than the other documents stand apart
    apart = blocks > 1 and mode in ("in_batch_negatives", "hard_negatives")
    together = choice.has_doc_to_query and strength == 0
    found = _weighted(
        query,
        columns,
        scale,
        strength,
        column_statistics=together,
        **(of_own if apart else {}),
        **options,
    )
    row, positive, column = found
    negatives = [row]
    if apart:
        cosine = _row_dots(query, documents[1:])
        own = cosine * scale
        if mode == "hard_negatives":
            own = own + choice.strength * cosine.detach()
        negatives.append(own.logsumexp(dim=0).to(row.dtype))
    if choice.has_doc_to_query and not together:
        column = similarity_statistics(
            documents[0], query, scale, column_statistics=False, **options
        ).row_lse
    if choice.partition_mode == "per_direction" and choice.has_doc_to_query:
        return (softplus(_logaddexp_all(negatives) - positive) + softplus(column - positive)) / 2
    if choice.has_doc_to_query:
        negatives.append(column)
    if "query_to_query" in choice.directions:
        negatives.append(_among_themselves(query, scale, options))
    if "doc_to_doc" in choice.directions and blocks == 1:
        negatives.append(_among_themselves(columns, scale, options))
    elif "doc_to_doc" in choice.directions:
        negatives.append(
            similarity_statistics(
                documents[0], columns, scale, column_statistics=False, **of_own, **options
            ).row_lse
        )
    margin = _logaddexp_all(negatives) - positive
    if not choice.has_doc_to_query:
        return softplus(margin)
    # the positive stands in both directions
    return softplus(margin - math.log(2)) + math.log(2)


def _logaddexp_all(lses: list[Tensor]) -> Tensor:
    """Their log-sum-exp."""
    if len(lses) == 1:
        return lses[0]
    return fold(torch.logaddexp, (lse.clamp(min=NOTHING) for lse in lses))


def _among_themselves(rows: Tensor, scale: Tensor | float, options: dict[str, Any]) -> Tensor:
    """Each row's log-sum-exp over all others: a symmetric matrix, half of which is visited."""
    one_class = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
    return label_statistics(rows, one_class, scale, **options).lse


def _global_query_ids(query: Tensor, ranks: Ranks | None) -> Tensor:
    """Of this process's queries, among those of all."""
    first = 0 if ranks is None else ranks.first
    return torch.arange(first, first + len(query), device=query.device)


def _row_dots(query: Tensor, documents: Sequence[Tensor]) -> Tensor:
    """Of each query with its own document of each block, (K, N)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    wide = query.to(dtype)
    return torch.stack([(wide * block.to(dtype)).sum(dim=1) for block in documents])


def _weighted(
    query: Tensor, columns: Tensor, scale: Tensor | float, strength: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows' log-sum-exp with `strength` times the cosine added, positives and columns without."""
    if strength == 0:
        found = similarity_statistics(query, columns, scale, **options)
        return found.row_lse, found.positive, found.column_lse
    if isinstance(scale, Tensor):
        # a sum with it in 16 bits would be off by more than the strength's share
        scale = widened(scale, query)
    constant = scale.detach() if isinstance(scale, Tensor) else scale
    sum_of_both = scale + strength
    share = constant / (constant + strength)
    if isinstance(sum_of_both, Tensor):
        # the factor below is not for the scale, whose gradient is the sum of G * cosine
        sum_of_both = _ScaleGradientOnce.apply(sum_of_both, 1 / share)
    found = similarity_statistics(query, columns, sum_of_both, **options)
    row, positive = (
        _ScaleGradientOnce.apply(one, share) for one in (found.row_lse, found.positive)
    )
    surplus = positive.detach() * (1 - share)
    return row, positive - surplus, found.column_lse


class _ScaleGradientOnce(torch.autograd.Function):
    """The tensor itself, whose gradient is multiplied by a factor; a second derivative is refused.

    It would lack the derivative of the factor's part. Not a subclass of what `scale_gradient` uses:
    torch.compile does not follow one.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Tensor | float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
