"""Recall at any size: chunks and tiles do not show in the ranks, and memory does not grow."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.evaluate import retrieval
from fastclip.evaluate.retrieval import retrieval_metrics

K = (1, 2, 5, 10)


def whole_numbers(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Features whose products are exact in float32, so that any order of adding ties alike."""
    return torch.randint(-2, 3, (count, width), generator=generator).float()


def slow_recall(queries: Tensor, keys: Tensor, pairs: list[tuple[int, int]], k: int) -> float:
    """By the definition, a query at a time: fewer than k wrong keys are as good as a match."""
    hits = 0
    for query in range(len(queries)):
        score = [float(sum(queries[query] * key)) for key in keys]
        own = {key for of, key in pairs if of == query}
        best = max(score[key] for key in own)
        hits += sum(s >= best for key, s in enumerate(score) if key not in own) < k
    return hits / len(queries)


@pytest.mark.parametrize(
    ("images", "texts", "width"),
    [(1, 1, 3), (1, 30, 2), (30, 1, 2), (16, 16, 3), (17, 33, 4), (45, 70, 5)],
)
def test_loops_say_the_same_across_chunks_and_tiles(
    images: int, texts: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "CHUNK_ROWS", 16)
    monkeypatch.setattr(retrieval, "TILE_ROWS", 4)
    monkeypatch.setattr(retrieval, "TILE_KEYS", 8)
    generator = torch.Generator().manual_seed(100 * images + texts)
    image, text = (whole_numbers(n, width, generator) for n in (images, texts))
    # the same features once more, at the other end
    image[-(images // 3) :] = image[: images // 3 or images].clone()
    # everyone has a match, some have many, of which some are the same text twice
    matches = torch.rand(images, texts, generator=generator) < 0.05
    matches[torch.arange(texts) % images, torch.arange(texts)] = True
    matches[torch.arange(images), torch.arange(images) % texts] = True
    pairs = matches.nonzero()
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    found = retrieval_metrics(image, text, pairs, K)
    by_image = [(int(i), int(t)) for i, t in pairs]
    by_text = [(t, i) for i, t in by_image]
    for k in K:
        assert found[f"text_retrieval_recall@{k}"] == slow_recall(image, text, by_image, k)
        assert found[f"image_retrieval_recall@{k}"] == slow_recall(text, image, by_text, k)


@pytest.mark.parametrize("duplicates", [False, True])
def test_ranks_are_the_same_in_chunks_of_any_size(
    duplicates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(150, 24, generator=generator), dim=1)
    # near to their images, over an edge between tiles of keys
    text = F.normalize(image.repeat(14, 1) + torch.randn(2100, 24, generator=generator), dim=1)
    if duplicates:
        image[75:] = image[:75].clone()
        text[1::3] = text[::3].clone()
    owner = torch.arange(2100) % 150
    ranks = []
    for rows in (1, 7, 1024):
        monkeypatch.setattr(retrieval, "CHUNK_ROWS", rows)
        of_images = retrieval._best_rank(image, text, owner, torch.arange(2100))
        # a product a query would take long for all of the texts
        some = slice(2000, 2100)
        of_texts = retrieval._best_rank(text[some], image, torch.arange(100), owner[some])
        ranks.append(torch.cat((of_images, of_texts)))
    assert len(ranks[0].unique()) > 10
    assert torch.equal(ranks[0], ranks[1]) and torch.equal(ranks[0], ranks[2])


def test_no_more_scores_are_held_than_a_chunks_with_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    original = retrieval.scores_of

    def counted(queries: Tensor, keys: Tensor) -> Tensor:
        held.append(len(queries) * len(keys))
        return original(queries, keys)

    monkeypatch.setattr(retrieval, "scores_of", counted)
    pairs = torch.arange(5000)[:, None].repeat(1, 2)
    # of one column, all ones: everything ties
    features = torch.ones(5000, 1)
    assert set(retrieval_metrics(features, features, pairs, K).values()) == {0.0}
    assert max(held) == retrieval.CHUNK_ROWS * retrieval.TILE_KEYS
    # all pairs in both directions, and the tiles of the matches
    assert sum(held) == 2 * (5000**2 + sum(len(part) ** 2 for part in pairs.split(256)))
