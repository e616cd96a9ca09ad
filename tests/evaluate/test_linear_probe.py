"""The linear probe: hand cases, scikit-learn's own fit, and what it refuses."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fastclip.data.faults import FaultLog
from fastclip.evaluate.features import ImageFeatures
from fastclip.evaluate.linear_probe import linear_probe


def images(features: Tensor, labels: list[int | None]) -> ImageFeatures:
    count = len(labels)
    return ImageFeatures(
        torch.nn.functional.normalize(features, dim=1),
        [()] * count,
        labels,
        [str(i) for i in range(count)],
        FaultLog(),
    )


def blobs(count: int, seed: int, classes: int = 3) -> tuple[Tensor, list[int | None]]:
    generator = torch.Generator().manual_seed(seed)
    labels = [i % classes for i in range(count)]
    centres = torch.eye(classes, 6)
    return centres[labels] + 0.6 * torch.randn(count, 6, generator=generator), list(labels)


def test_separable_classes_are_told_apart() -> None:
    train = images(torch.eye(2).repeat(10, 1), [0, 1] * 10)
    found = linear_probe(train, images(torch.eye(2), [0, 1]))
    assert found["lp_acc1"] == found["lp_mean_per_class_recall"] == found["validation_acc1"] == 1
    assert found["unseen_labels"] == 0


def test_it_is_scikit_learns_fit() -> None:
    train, test = images(*blobs(120, 0)), images(*blobs(90, 1))
    found = linear_probe(train, test, regularisation=(0.5,))
    plain = LogisticRegression(C=0.5, max_iter=1000).fit(train.features, train.labels)
    right = plain.predict(test.features) == torch.tensor(test.labels).numpy()
    assert 0.4 < found["lp_acc1"] < 1
    assert found["lp_acc1"] == pytest.approx(right.mean(), abs=1e-12)


def test_the_strength_is_chosen_on_the_training_images() -> None:
    train, test = images(*blobs(150, 2)), images(*blobs(60, 3))
    found = linear_probe(train, test, regularisation=(1e-9, 1.0))
    alone = linear_probe(train, test, regularisation=(found["regularisation"],))
    assert found["lp_acc1"] == alone["lp_acc1"]
    # labels of the test do not matter to it
    other = images(test.features, [0] * 60)
    assert linear_probe(train, other, regularisation=(1e-9, 1.0))["regularisation"] == 1.0
    assert found == linear_probe(train, test, regularisation=(1e-9, 1.0))


def test_labels_with_gaps_and_classes_never_seen() -> None:
    train = images(torch.eye(2).repeat(10, 1), [2, 5] * 10)
    test = images(torch.tensor([[1.0, 0], [0, 1], [1, 0]]), [2, 5, 7])
    found = linear_probe(train, test)
    assert found["lp_acc1"] == pytest.approx(2 / 3) and found["unseen_labels"] == 1
    # by class: right, right, never
    assert found["lp_mean_per_class_recall"] == pytest.approx(2 / 3)


def test_images_without_labels_are_left_out() -> None:
    features, labels = blobs(90, 4)
    some = images(torch.cat((features, features[:5] * 0 + 1)), [*labels, *[None] * 5])
    test = images(*blobs(30, 5))
    assert linear_probe(some, test) == linear_probe(images(features, labels), test)


@pytest.mark.parametrize(
    "labels, message",
    [([1] * 20, "all of class 1; a probe takes two"), ([None] * 20, "no sample has a class index")],
)
def test_what_cannot_be_probed(labels: list[int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_probe(images(torch.eye(20), labels), images(torch.eye(20), [0, 1] * 10))


def test_too_few_images() -> None:
    with pytest.raises(ValueError, match="too few to hold a fifth out"):
        linear_probe(images(torch.eye(2), [0, 1]), images(torch.eye(2), [0, 1]))
