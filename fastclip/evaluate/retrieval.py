"""Image-text retrieval: recall at k, chunked and exact."""

import math
import operator
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from fastclip.evaluate.features import ImageFeatures, embed_texts
from fastclip.models.clip import Model

# queries compared at a time, with as many keys as a tile has
CHUNK_ROWS = 512
# Products are of this many queries and keys, filled up with zeros. For other shapes a library takes
# other kernels, which add in another order: equal features would get unequal scores, and a rank
# would depend on how many queries there are.
TILE_ROWS, TILE_KEYS = 256, 2048


def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, text_of_image: Tensor, k: tuple[int, ...]
) -> dict[str, float]:
    """image_retrieval_recall@k and text_retrieval_recall@k, as CLIP_benchmark names them.

    A query counts if any of its true matches is among the k best. A wrong key that ties with the
    best match, or whose score is NaN, comes before it; where a match's score is NaN, or there is no
    match, the query is never right.

    Args:
        image_features: (N, D). text_features: (T, D), one row a distinct text.
        text_of_image: (P, 2) int64 pairs (image, text) that belong together; every image and
            text occurs at least once.
        k: the ranks asked for, from 1.

    Raises:
        ValueError: a rank is below 1.
    """
    require_ranks(k)
    images, texts = text_of_image[:, 0], text_of_image[:, 1]
    best_text = _best_rank(image_features, text_features, images, texts)
    best_image = _best_rank(text_features, image_features, texts, images)
    metrics = {}
    for rank in k:
        metrics[f"image_retrieval_recall@{rank}"] = (best_image < rank).double().mean().item()
        metrics[f"text_retrieval_recall@{rank}"] = (best_text < rank).double().mean().item()
    return metrics


def require_ranks(k: Sequence[int]) -> None:
    """Refuse ranks that there are not.

    Raises:
        ValueError: a rank is below 1.
    """
    if min(k, default=1) < 1:
        raise ValueError(f"recall at {min(k)}: the best has rank 1; give ranks of 1 or more")


def _best_rank(queries: Tensor, keys: Tensor, query_of: Tensor, key_of: Tensor) -> Tensor:
    """Rank (from 0) of each query's best true match among the keys that are not a match of it.

    Other true matches never push a match down: only wrong keys scored as high or higher count.
    """
    order = torch.argsort(query_of, stable=True)
    query_of, key_of = query_of[order], key_of[order]
    best = queries.new_full((queries.shape[0],), -torch.inf)
    matches = _paired_scores(queries, keys, query_of, key_of)
    best.scatter_reduce_(0, query_of, matches, "amax")
    behind = torch.zeros(queries.shape[0], dtype=torch.int64)
    for start in range(0, queries.shape[0], CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        inside = slice(*torch.searchsorted(query_of, torch.tensor([start, chunk.stop])).tolist())
        row, column = query_of[inside] - start, key_of[inside]
        for first in range(0, keys.shape[0], TILE_KEYS):
            # few enough to be compared while they are in the cache
            scores = scores_of(queries[chunk], keys[first : first + TILE_KEYS])
            here = column // TILE_KEYS == first // TILE_KEYS
            scores[row[here], column[here] - first] = -torch.inf
            # NaN is below nothing: a broken model must not look perfect
            behind[chunk] += (scores < best[chunk, None]).sum(dim=1)
    ranks = keys.shape[0] - behind
    # NaN, or no match: beyond any k, even one above the number of keys
    ranks[~(best > -torch.inf)] = torch.iinfo(ranks.dtype).max
    return ranks


def _paired_scores(queries: Tensor, keys: Tensor, query_of: Tensor, key_of: Tensor) -> Tensor:
    """Score of each pair (P,), bitwise equal to its score among all."""
    scores = [
        scores_of(queries[own_queries], keys[own_keys]).diagonal()
        for own_queries, own_keys in zip(
            query_of.split(TILE_ROWS), key_of.split(TILE_ROWS), strict=True
        )
    ]
    return torch.cat(scores)


def scores_of(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products (N, M) of (N, D) and (M, D), each bitwise independent of the others."""
    scores = queries.new_empty(queries.shape[0], keys.shape[0])
    for a in range(0, queries.shape[0], TILE_ROWS):
        rows = _filled(queries[a : a + TILE_ROWS], TILE_ROWS)
        for b in range(0, keys.shape[0], TILE_KEYS):
            part = scores[a : a + TILE_ROWS, b : b + TILE_KEYS]
            product = rows @ _filled(keys[b : b + TILE_KEYS], TILE_KEYS).T
            part.copy_(product[: part.shape[0], : part.shape[1]])
    return scores


def _filled(rows: Tensor, count: int) -> Tensor:
    """So many rows, zeros after those given."""
    missing = count - rows.shape[0]
    return rows if missing == 0 else torch.cat((rows, rows.new_zeros(missing, rows.shape[1])))


def evaluate_retrieval(
    model: Model,
    images: ImageFeatures,
    *,
    k: tuple[int, ...] = (1, 5, 10),
    precision: str = "fp32",
) -> dict[str, float]:
    """Retrieval between embedded images and all of their captions.

    Raises:
        ValueError: an image has no caption.
    """
    texts, pairs = caption_pairs(images.texts)
    text_features = embed_texts(model, texts, precision=precision)
    metrics = retrieval_metrics(images.features, text_features, pairs, k)
    return {**metrics, "images": len(images.texts), "texts": len(texts)}


def caption_pairs(captions: list[tuple[str, ...]]) -> tuple[list[str], Tensor]:
    """The distinct captions and the (image, text) pairs that belong together, (P, 2) int64.

    Captions with the same words are one text that belongs to all of its images: otherwise a
    right answer could count as wrong.
    """
    if not all(captions):
        raise ValueError("an image has no caption; retrieval needs one for every image")
    index = {text: i for i, text in enumerate(dict.fromkeys(chain.from_iterable(captions)))}
    pairs = [[image, index[text]] for image, own in enumerate(captions) for text in set(own)]
    return list(index), torch.tensor(sorted(pairs))


def chance_of_retrieval(text_of_image: Tensor, k: tuple[int, ...]) -> dict[str, float]:
    """What random rankings score on average in `retrieval_metrics`, by the same names.

    Args:
        text_of_image: (P, 2) int64 pairs (image, text) that belong together.
        k: the ranks asked for, from 1.
    """
    texts_of_image, images_of_text = (column.bincount() for column in text_of_image.T)
    images, texts = len(texts_of_image), len(images_of_text)
    chance = {}
    for rank in k:
        chance[f"image_retrieval_recall@{rank}"] = _chance(images_of_text, images, rank)
        chance[f"text_retrieval_recall@{rank}"] = _chance(texts_of_image, texts, rank)
    return chance


def _chance(matches: Tensor, keys: int, k: int) -> float:
    """Expected recall@k of a random ranking of `keys`, given each query's number of matches."""
    if k >= keys:
        return 1.0
    of_all = math.comb(keys, k)
    counts, queries = (column.tolist() for column in matches.unique(return_counts=True))
    misses = [math.comb(keys - count, k) / of_all for count in counts]
    return 1 - sum(map(operator.mul, misses, queries)) / len(matches)
