"""Ranks do not depend on how the work is cut, and equal features tie."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.evaluate import retrieval
from fastclip.evaluate.retrieval import retrieval_metrics, scores_of


def random_rows(count: int, width: int, seed: int) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=1)


def ranks(images: Tensor, texts: Tensor, pairs: Tensor) -> Tensor:
    by_image, by_text = pairs.T
    return torch.cat(
        (
            retrieval._best_rank(images, texts, by_image, by_text),
            retrieval._best_rank(texts, images, by_text, by_image),
        )
    )


@pytest.mark.parametrize("width", [3, 64, 512])
def test_a_score_has_the_same_bits_whatever_stands_beside_it(width: int) -> None:
    queries, keys = random_rows(300, width, 0), random_rows(2500, width, 1)
    # the same features at both ends, in the middle of tiles, and across their edges
    keys[[0, 17, 2047, 2048, 2499]] = keys[5].clone()
    queries[[0, 255, 256, 299]] = queries[9].clone()
    scores = scores_of(queries, keys)
    assert torch.equal(scores[9].expand(4, -1), scores[[0, 255, 256, 299]])
    assert torch.equal(scores[:, [5] * 5], scores[:, [0, 17, 2047, 2048, 2499]])
    for row in (0, 100, 299):
        assert torch.equal(scores_of(queries[row : row + 1], keys), scores[row : row + 1])
    assert torch.equal(scores_of(queries, keys[2400:]), scores[:, 2400:])
    exact = queries.double() @ keys.double().T
    # a sum of `width` products below 1 in float32
    assert (scores - exact).abs().max() <= width * 2**-24


@pytest.mark.parametrize("kind", ["random", "duplicates", "all alike"])
def test_chunked_is_unchunked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = random_rows(700, 16, 2), random_rows(1400, 16, 3)
    if kind == "duplicates":
        images[350:] = images[:350].clone()
        texts[::7] = texts[3].clone()
    if kind == "all alike":
        images[:], texts[:] = images[0].clone(), texts[0].clone()
    pairs = torch.stack((torch.arange(1400) % 700, torch.arange(1400)), dim=1)
    found = {}
    for rows in (7, 100, 512, 5000):
        monkeypatch.setattr(retrieval, "CHUNK_ROWS", rows)
        found[rows] = ranks(images, texts, pairs)
    assert all(torch.equal(found[7], other) for other in found.values())
    if kind == "all alike":
        # every wrong one ties, and counts
        assert found[7].tolist() == [1398] * 700 + [699] * 1400


def test_loops_say_the_same() -> None:
    # small whole numbers: products are exact, ties many
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(-2, 3, (40, 4), generator=generator).float()
    texts = torch.randint(-2, 3, (90, 4), generator=generator).float()
    owners = [
        [int(i) for i in torch.randperm(40, generator=generator)[: 1 + t % 3]] for t in range(90)
    ]
    for image in range(40):
        owners[image].append(image)
    pairs = torch.tensor([[i, t] for t, own in enumerate(owners) for i in sorted(set(own))])
    metrics = retrieval_metrics(images, texts, pairs, (1, 5, 10))
    for k in (1, 5, 10):
        right = 0
        for text, own in enumerate(owners):
            score = [float(texts[text] @ images[i]) for i in range(40)]
            best = max(score[i] for i in own)
            right += sum(score[i] >= best for i in range(40) if i not in own) < k
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(right / 90)
        right = 0
        for image in range(40):
            own_texts = [t for t in range(90) if image in owners[t]]
            score = [float(texts[t] @ images[image]) for t in range(90)]
            best = max(score[t] for t in own_texts)
            right += sum(score[t] >= best for t in range(90) if t not in own_texts) < k
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(right / 40)
