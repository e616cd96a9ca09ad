"""Metrics against cases worked by hand and slow oracles; ties count against the model."""

import json
from itertools import permutations
from pathlib import Path

import pytest
import torch

from fastclip.data.templates import read_lines
from fastclip.evaluate.results import write_result
from fastclip.evaluate.retrieval import chance_of_retrieval, retrieval_metrics
from fastclip.evaluate.zeroshot import (
    class_embeddings,
    classification_metrics,
    fill_template,
    require_same_classes,
    zeroshot_metrics,
)
from tests.evaluate.planned import planned_model


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


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
def test_chance_is_the_mean_over_all_rankings(k: int) -> None:
    pairs = torch.tensor([[0, 0], [0, 1], [1, 2], [2, 2], [2, 3]])
    belong = torch.zeros(3, 4, dtype=torch.bool).index_put(tuple(pairs.T), torch.tensor(True))
    found = chance_of_retrieval(pairs, (k,))
    for name, queries in (("text", belong), ("image", belong.T)):
        hits = [
            any(row[key] for key in ranking[:k])
            for row in queries.tolist()
            for ranking in permutations(range(len(row)))
        ]
        assert found[f"{name}_retrieval_recall@{k}"] == pytest.approx(sum(hits) / len(hits))


def test_nan_features_score_nothing() -> None:
    nan = torch.full((3, 4), torch.nan)
    pairs = torch.arange(3)[:, None].repeat(1, 2)
    # not even where k, or acc5, takes in all that there is
    assert set(retrieval_metrics(nan, torch.eye(3, 4), pairs, k=(1, 2, 3, 10)).values()) == {0.0}
    for classes in (3, 8):
        metrics = zeroshot_metrics(nan, torch.eye(classes, 4), torch.arange(3))
        assert set(metrics.values()) == {0.0}


def test_nan_of_others_counts_against_the_model() -> None:
    logits = torch.tensor([[3.0, torch.nan, 1, 0, 0, 0], [5, 4, torch.nan, torch.nan, 3, 6]])
    metrics = classification_metrics(logits, torch.tensor([0, 4]))
    # behind one NaN: second; behind 5, 4, two NaN and 6: sixth
    assert metrics["acc1"] == 0 and metrics["acc5"] == 0.5
    # scores: image 0 -> texts (3, NaN, 1), image 1 -> texts (9, NaN, 5)
    texts = torch.eye(3)
    texts[1] = torch.nan
    images = torch.tensor([[3.0, 2, 1], [9, 1, 5]])
    found = retrieval_metrics(images, texts, torch.tensor([[0, 0], [0, 1], [1, 2]]), k=(1, 3))
    # a match of image 0 is NaN; image 1 has NaN and text 0 before its text
    assert found["text_retrieval_recall@1"] == 0 and found["text_retrieval_recall@3"] == 0.5
    # text 0 prefers image 1, text 1 is NaN, text 2 is right
    assert found["image_retrieval_recall@1"] == pytest.approx(1 / 3)
    assert found["image_retrieval_recall@3"] == pytest.approx(2 / 3)


def test_acc5_of_fewer_than_five_classes_misses_what_is_never_right() -> None:
    logits = torch.tensor([[1.0, 2, 3], [1, 2, 3], [1, 2, -torch.inf]])
    metrics = classification_metrics(logits, torch.tensor([2, 0, 2]))
    assert metrics["acc1"] == pytest.approx(1 / 3)
    assert metrics["acc5"] == pytest.approx(2 / 3)
    # class 2: one of two; class 0: none; class 1 has no image
    assert metrics["mean_per_class_recall"] == 0.25


@pytest.mark.parametrize(("classes", "width"), [(2, 64), (9, 512), (17, 515), (257, 64)])
def test_classes_of_equal_features_tie(classes: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # one image: the product of a vector and a matrix adds in another order at its edges
    image = torch.randn(1, width, generator=generator)
    same = torch.randn(1, width, generator=generator).expand(classes, -1).clone()
    for label in range(classes):
        assert zeroshot_metrics(image, same, torch.tensor([label]))["acc1"] == 0


def test_of_classes_of_one_name_the_lowest_comes_first() -> None:
    """They always tie; as wrong, neither would ever be right."""
    names = ["owl", "missile", "cat", "missile", "dog", "fox", "missile"]
    logits = torch.tensor([[0.0, 9, 5, 9, 3, 2, 9]]).repeat(4, 1)
    labels = torch.tensor([1, 3, 2, 6])
    metrics = classification_metrics(logits, labels, names)
    # 3 and 6 come after 1, the cat after all three
    assert metrics["acc1"] == 0.25 and metrics["acc5"] == 1
    assert classification_metrics(logits, labels)["acc1"] == 0
    # others that tie are still wrong
    tied = torch.tensor([[0.0, 9, 9, 9, 3, 2, 9]])
    assert classification_metrics(tied, torch.tensor([1]), names)["acc1"] == 0


def test_equal_names_have_equal_features() -> None:
    model = planned_model(
        {"a cat.": (1, 2), "a dog.": (2, -1), "the cat.": (3, 1), "the dog.": (0, 1)}
    )
    found = class_embeddings(model, ["cat", "dog", "cat"], ["a {}.", "the {}."])
    assert found[0].equal(found[2]) and not found[0].equal(found[1])
    assert model.model.texts == 4


def test_ties_of_retrieval_by_hand() -> None:
    # images 0 and 1 are the same to all texts; text 2 belongs to both
    images = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    texts = torch.tensor([[1.0, 0], [1, 0], [2, 0], [0, 1]])
    pairs = torch.tensor([[0, 0], [1, 1], [0, 2], [1, 2], [2, 3]])
    found = retrieval_metrics(images, texts, pairs, k=(1, 2))
    # the best texts of images 0 and 1 are right: text 2 scores 2
    assert found["text_retrieval_recall@1"] == 1
    # texts 0 and 1 tie between images 0 and 1, which is wrong; text 2 ties between two right ones
    assert found["image_retrieval_recall@1"] == 0.5
    assert found["image_retrieval_recall@2"] == 1


@pytest.mark.parametrize("k", [0, -1])
def test_ranks_begin_at_one(k: int) -> None:
    with pytest.raises(ValueError, match=f"recall at {k}: the best has rank 1"):
        retrieval_metrics(torch.eye(2), torch.eye(2), torch.tensor([[0, 0], [1, 1]]), k=(1, k))


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


def test_classes_of_two_data_are_compared_in_their_order() -> None:
    require_same_classes("a", ["cat", "dog"], "b", ["cat", "dog"])
    # unknown of one of them
    require_same_classes("a", ["cat"], "b", None)
    require_same_classes("a", [], "b", ["cat"])
    with pytest.raises(ValueError, match="class 1 is 'dog' in a, 'cow' in b; give"):
        require_same_classes("a", ["cat", "dog"], "b", ["cat", "cow"])
    with pytest.raises(ValueError, match="a has 1 class, b has 2 classes; give"):
        require_same_classes("a", ["cat"], "b", ["cat", "cow"])
