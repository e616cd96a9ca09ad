"""The nearest rows of many features: exact, in memory that does not grow with their number."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# rows of features, and queries, that are compared at a time
CHUNK_ROWS = 8192
CHUNK_QUERIES = 256

_Array = NDArray[Any]


def search(
    features: Tensor | _Array, queries: Tensor | _Array, k: int = 10
) -> tuple[Tensor, Tensor]:
    """The k rows of `features` with the largest inner product with each query.

    Of normalized features, as `fastclip embed` writes them, the products are cosines. The result is
    that of a stable sort of all products in float64: of equal ones the first row is first. Only
    chunks of 8,192 rows are in memory, so a file of millions may be opened with
    `np.load(path, mmap_mode="r")`.

    Args:
        features: (N, D), a tensor or NumPy array, float16, bfloat16, float32 or float64. Rows that
            are not finite, such as `fastclip embed` writes for unreadable images, are never found.
        queries: (Q, D), as above.
        k: rows wanted for each query, from 1.

    Returns:
        scores: (Q, k) float32, decreasing along each row. rows: (Q, k) int64, their places in
        `features`.

    Raises:
        ValueError: the shapes do not fit, there is no query, a query is not finite, or fewer than k
            rows are finite.

    Examples:
        >>> import torch
        >>> from fastclip.evaluate.search import search
        >>> images = torch.eye(4)[[0, 1, 2, 1]]
        >>> scores, rows = search(images, torch.tensor([[0.6, 0.8, 0.0, 0.0]]), k=3)
        >>> rows.tolist()  # rows 1 and 3 are equal: the first comes first
        [[1, 3, 0]]
    """
    keys, asked = _array(features), _array(queries).astype(np.float64)
    if keys.ndim != 2 or asked.ndim != 2 or keys.shape[1] != asked.shape[1] or not len(asked):
        raise ValueError(
            f"features have shape {keys.shape} and queries {asked.shape}; give (N, D) and (Q, D) "
            "with the same D and at least one query"
        )
    if bad := np.flatnonzero(~np.isfinite(asked).all(axis=1)).tolist():
        raise ValueError(f"query {bad[0]} is not finite: its encoder gave NaN or infinity")
    if not 1 <= k <= len(keys):
        raise ValueError(f"k is {k}; give one from 1 to the number of rows, {len(keys)}")
    parts = [
        _best(keys, asked[i : i + CHUNK_QUERIES], k) for i in range(0, len(asked), CHUNK_QUERIES)
    ]
    scores, rows = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    return scores.float(), rows


def _best(keys: _Array, asked: _Array, k: int) -> tuple[_Array, _Array]:
    """Scores (Q, k) float64 and rows (Q, k) int64 of the best for a few queries."""
    scores = [np.empty(0)] * len(asked)
    rows = [np.empty(0, dtype=np.int64)] * len(asked)
    lengths = np.linalg.norm(asked, axis=1)
    for start in range(0, len(keys), CHUNK_ROWS):
        chunk = np.asarray(keys[start : start + CHUNK_ROWS], dtype=np.float64)
        usable = np.flatnonzero(np.isfinite(chunk.sum(axis=1)))
        if len(usable) < len(chunk):
            chunk = chunk[usable]
        # in a library's product the order of a sum depends on the row's place, and so do the last
        # bits: it only rules out rows that are further away than all of its rounding
        products = asked @ chunk.T
        longest = math.sqrt(np.einsum("nd,nd->n", chunk, chunk).max(initial=0))
        margins = 2 * keys.shape[1] * np.finfo(np.float64).eps * longest * lengths
        for query, (product, margin) in enumerate(zip(products, margins, strict=True)):
            least = -np.inf
            if len(scores[query]) == k:
                least = scores[query][-1] - margin
            elif len(product) > k:
                least = np.partition(product, -k)[-k] - 2 * margin
            near = np.flatnonzero(product >= least)
            # a sum along a row depends on the row alone: equal rows have equal scores
            exact = (chunk[near] * asked[query]).sum(axis=1)
            found = np.concatenate((scores[query], exact))
            best = np.argsort(-found, kind="stable")[:k]
            scores[query] = found[best]
            rows[query] = np.concatenate((rows[query], usable[near] + start))[best]
    if len(rows[0]) < k:
        raise ValueError(
            f"k is {k}, and only {len(rows[0])} of {len(keys)} rows are finite; give a smaller k"
        )
    return np.stack(scores), np.stack(rows)


def _array(values: Tensor | _Array) -> _Array:
    """The values in NumPy, a memory map as it is; bfloat16, which NumPy lacks, as float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return values
