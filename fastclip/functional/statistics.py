"""What softmax losses are made of, for losses of your own."""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from fastclip.ops import similarity
from fastclip.ops.collectives import Exchange
from fastclip.ops.reductions import ranks_sharing
from fastclip.ops.similarity import Statistics


def similarity_statistics(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor | float,
    *,
    column_statistics: bool = True,
    positive_index: Tensor | None = None,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
    row_bias: Tensor | None = None,
    column_bias: Tensor | None = None,
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
        positive_index: (N,) integers in [0, M), the rows' positives; on a GPU, values out of range
            are not found out. Only without column_statistics and groups.
        row_group, column_group: (N,) and (M,) integer ids, both or neither; columns of a row's
            group other than its positive are left out.
        row_bias, column_bias: (N,) and (M,) floating point, added to S_ij by column j in the rows'
            statistics, by row i in the columns'; elsewhere they cancel. -inf leaves a column, or a
            row, out. They may have a gradient.
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
        log-sum-exp of a row without negatives is -inf. Maxima have no gradient. `positive` has no
        bias, so that a term of rows is softplus(row_lse - positive - column_bias[:N]).

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
    if columns_with_gradient is not None and not 0 <= columns_with_gradient <= len(columns):
        raise ValueError(
            f"columns_with_gradient is {columns_with_gradient}; give None or a number of the "
            f"{len(columns)} columns"
        )
    return similarity.similarity_statistics(
        rows,
        columns,
        logit_scale,
        column_statistics=column_statistics,
        positive_index=positive_index,
        row_group=row_group,
        column_group=column_group,
        row_bias=row_bias,
        column_bias=column_bias,
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
