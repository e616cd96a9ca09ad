"""Metrics against cases worked by hand and slow oracles; ties count against the model."""

import json
from pathlib import Path

import pytest
import torch

from fastclip.evaluate import retrieval
from fastclip.evaluate.results import write_result
from fastclip.evaluate.retrieval import retrieval_metrics
from fastclip.evaluate.zeroshot import fill_template, read_lines, zeroshot_metrics


def test_zeroshot_by_hand() -> None:
    # class features are the axes, so a feature's entries are its logits
    classes = torch.eye(3)
    features = torch.tensor([[3.0, 1, 0], [1, 2, 3], [0, 5, 5], [1, 0, 9]])
    labels = torch.tensor([0, 2, 1, 0])
    metrics = zeroshot_metrics(features, classes, labels)
    # right, right, a tie (counts as wrong), wrong
    assert metrics["acc1"] == 0.5
    assert metrics["mean_per_class_recall"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert metrics["acc5"] == 1.0


def test_zeroshot_top5_by_hand() -> None:
    logits = torch.arange(10.0).flip(0)[None].repeat(10, 1)
    metrics = zeroshot_metrics(logits, torch.eye(10), torch.arange(10))
    assert metrics["acc1"] == pytest.approx(0.1) and metrics["acc5"] == pytest.approx(0.5)


def test_labels_outside_the_classes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"0\.\.2"):
        zeroshot_metrics(torch.ones(2, 3), torch.eye(3), torch.tensor([0, 3]))


def test_retrieval_by_hand() -> None:
    # scores: image 0 -> texts (3, 2, 1), image 1 -> texts (9, 1, 5)
    texts = torch.eye(3)
    images = torch.tensor([[3.0, 2, 1], [9, 1, 5]])
    pairs = torch.tensor([[0, 0], [0, 1], [1, 2]])
    metrics = retrieval_metrics(images, texts, pairs, k=(1, 2))
    # image 0 finds text 0 at once; image 1 finds text 2 behind text 0
    assert metrics["text_retrieval_recall@1"] == 0.5
    assert metrics["text_retrieval_recall@2"] == 1.0
    # text 0 prefers image 1 (wrong), text 1 image 0 (right), text 2 image 1 (right)
    assert metrics["image_retrieval_recall@1"] == pytest.approx(2 / 3)


def slow_recall(scores: torch.Tensor, matches: torch.Tensor, k: int) -> float:
    """Any match among the k best of a full sort in which wrong keys come first among equals."""
    hits = 0
    for row, right in zip(scores.tolist(), matches.tolist(), strict=True):
        ranking = sorted(range(len(row)), key=lambda j: (-row[j], right[j]))
        hits += any(right[j] for j in ranking[:k])
    return hits / len(scores)


@pytest.mark.parametrize("seed", range(5))
def test_retrieval_equals_a_full_sort(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    # small integers give many ties
    images = torch.randint(-2, 3, (37, 3), generator=generator).float()
    texts = torch.randint(-2, 3, (61, 3), generator=generator).float()
    matches = torch.zeros(37, 61, dtype=torch.bool)
    matches[torch.arange(61) % 37, torch.arange(61)] = True
    matches[3, 17] = True
    pairs = matches.nonzero()[torch.randperm(62, generator=generator)]
    monkeypatch.setattr(retrieval, "CHUNK_ROWS", 8)
    metrics = retrieval_metrics(images, texts, pairs, k=(1, 5, 10))
    scores = images @ texts.T
    for k in (1, 5, 10):
        assert metrics[f"text_retrieval_recall@{k}"] == slow_recall(scores, matches, k)
        assert metrics[f"image_retrieval_recall@{k}"] == slow_recall(scores.T, matches.T, k)


def test_nan_features_score_nothing() -> None:
    nan = torch.full((3, 4), torch.nan)
    pairs = torch.arange(3)[:, None].repeat(1, 2)
    assert set(retrieval_metrics(nan, torch.eye(3, 4), pairs, k=(1, 2)).values()) == {0.0}
    metrics = zeroshot_metrics(nan, torch.eye(8, 4), torch.arange(3))
    assert metrics["acc1"] == metrics["acc5"] == 0


def test_templates(tmp_path: Path) -> None:
    assert fill_template("a {} and a {}", "cat") == "a cat and a cat"
    assert fill_template("a photo of {c}.", "dog") == "a photo of dog."
    with pytest.raises(ValueError, match="has no"):
        fill_template("a photo", "dog")
    (tmp_path / "t.txt").write_text("one\n\n two \n")
    assert read_lines(tmp_path / "t.txt") == ["one", "two"]


def test_result_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    values = {"dataset": "d", "model": "m", "pretrained": "p", "task": "zeroshot_classification"}
    write_result(path, **values, metrics={"acc1": 0.5})
    assert json.loads(path.read_text()) == {**values, "metrics": {"acc1": 0.5}, "language": "en"}
