"""The linear probe: hand cases, scikit-learn's own fit, and what it refuses."""

from collections import Counter

import numpy as np
import pytest
import sklearn.model_selection
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from fastclip.data.faults import FaultLog
from fastclip.data.sources import SceneSource
from fastclip.evaluate.features import ImageFeatures, embed_images
from fastclip.evaluate.linear_probe import linear_probe
from fastclip.models.classifier import Classifier
from fastclip.models.clip import Model


def images(features: Tensor, labels: list[int | None]) -> ImageFeatures:
    count = len(labels)
    return ImageFeatures(
        F.normalize(features, dim=1),
        [()] * count,
        labels,
        [str(i) for i in range(count)],
        FaultLog(),
    )


def mean_color(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).mean(dim=(0, 1)) / 255


def blobs(count: int, seed: int, classes: int = 3) -> tuple[Tensor, list[int | None]]:
    generator = torch.Generator().manual_seed(seed)
    labels = [i % classes for i in range(count)]
    centers = torch.eye(classes, 6)
    return centers[labels] + 0.6 * torch.randn(count, 6, generator=generator), list(labels)


def test_separable_classes_are_separated() -> None:
    train = images(torch.eye(2).repeat(10, 1), [0, 1] * 10)
    found = linear_probe(train, images(torch.eye(2), [0, 1]))
    assert found["lp_acc1"] == found["lp_mean_per_class_recall"] == found["validation_acc1"] == 1
    assert found["unseen_labels"] == 0


def test_it_is_scikit_learns_fit() -> None:
    train, test = images(*blobs(120, 0)), images(*blobs(90, 1))
    found = linear_probe(train, test, regularization=(0.5,))
    plain = LogisticRegression(C=0.5, max_iter=1000).fit(train.features, train.labels)
    right = plain.predict(test.features) == torch.tensor(test.labels).numpy()
    assert 0.4 < found["lp_acc1"] < 1
    assert found["lp_acc1"] == pytest.approx(right.mean(), abs=1e-12)


def test_the_strength_is_chosen_on_the_training_images() -> None:
    train, test = images(*blobs(150, 2)), images(*blobs(60, 3))
    found = linear_probe(train, test, regularization=(1e-9, 1.0))
    alone = linear_probe(train, test, regularization=(found["regularization"],))
    assert found["lp_acc1"] == alone["lp_acc1"]
    # labels of the test do not matter to it
    other = images(test.features, [0] * 60)
    assert linear_probe(train, other, regularization=(1e-9, 1.0))["regularization"] == 1.0
    assert found == linear_probe(train, test, regularization=(1e-9, 1.0))


@pytest.fixture
def held_out(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The labels that are held out, each time that a strength is chosen."""
    original = sklearn.model_selection.train_test_split
    found: list[list[int]] = []

    def noting(*arrays: np.ndarray, **options: object) -> list[np.ndarray]:
        parts = original(*arrays, **options)
        found.append(parts[3].tolist())
        return parts

    monkeypatch.setattr(sklearn.model_selection, "train_test_split", noting)
    return found


def test_every_class_is_held_out_alike(held_out: list[list[int]]) -> None:
    """Of 40, 20 and 5 images a fifth each."""
    features, labels = blobs(120, 0)
    rows = [row for label, count in enumerate((40, 20, 5)) for row in range(label, 3 * count, 3)]
    data = images(features[rows], [labels[row] for row in rows])
    for seed in range(3):
        linear_probe(data, data, seed=seed)
    assert [Counter(own) for own in held_out] == [{0: 8, 1: 4, 2: 1}] * 3


@pytest.mark.parametrize(
    "labels",
    [
        # two images of each of six classes: a fifth are three
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
        # one class has a single image
        [0] * 10 + [1] * 9 + [2],
    ],
)
def test_classes_too_small_for_that_are_held_out_by_chance(
    labels: list[int | None], held_out: list[list[int]]
) -> None:
    generator = torch.Generator().manual_seed(0)
    data = images(torch.randn(len(labels), 4, generator=generator), labels)
    found = linear_probe(data, data)
    assert 0 <= found["validation_acc1"] <= 1
    assert [len(own) for own in held_out] == [-(-len(labels) // 5)]


def test_the_seed_chooses_what_is_held_out() -> None:
    """Labels say nothing of the features, so that each fifth scores by chance."""
    generator = torch.Generator().manual_seed(0)
    labels: list[int | None] = torch.randint(0, 3, (60,), generator=generator).tolist()
    data = images(torch.randn(60, 4, generator=generator), labels)
    found = [linear_probe(data, data, seed=seed) for seed in (0, 1, 2, 3, 0)]
    assert found[0] == found[4]
    assert len({probe["validation_acc1"] for probe in found}) > 1


def test_labels_with_gaps_and_classes_never_seen() -> None:
    train = images(torch.eye(2).repeat(10, 1), [2, 5] * 10)
    test = images(torch.tensor([[1.0, 0], [0, 1], [1, 0]]), [2, 5, 7])
    found = linear_probe(train, test)
    assert found["lp_acc1"] == pytest.approx(2 / 3) and found["unseen_labels"] == 1
    # by class: right, right, never
    assert found["lp_mean_per_class_recall"] == pytest.approx(2 / 3)


def test_a_class_never_seen_is_wrong_among_few_too() -> None:
    train = images(torch.eye(2).repeat(10, 1), [0, 1] * 10)
    test = images(torch.tensor([[1.0, 0], [0, 1], [1, 0]]), [0, 1, 2])
    found = linear_probe(train, test)
    # acc5 counts everything else of three classes
    assert found["lp_acc5"] == found["lp_acc1"] == pytest.approx(2 / 3)


def test_of_equally_good_strengths_the_smallest() -> None:
    train = images(torch.eye(2).repeat(10, 1), [0, 1] * 10)
    found = linear_probe(train, train, regularization=(10.0, 0.1, 1.0))
    assert found["validation_acc1"] == 1 and found["regularization"] == 0.1


def test_of_a_classifier_its_towers_features() -> None:
    torch.manual_seed(0)
    tower = nn.Linear(3, 5)
    model = Model(Classifier(tower, width=5, classes=2), mean_color, lambda texts: torch.zeros(0))
    source = SceneSource("val", 6, objects=1)
    colors = torch.stack([mean_color(source.read(0, i).image) for i in range(6)])
    probed = embed_images(model, source, classify=False)
    # one linear layer, in batches of another size: float32's rounding alone
    assert torch.allclose(probed.features, F.normalize(tower(colors), dim=1), atol=1e-6)
    assert embed_images(model, source).features.shape == (6, 2)


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


@pytest.mark.parametrize("broken", ["training", "test"])
def test_broken_features_are_refused(broken: str) -> None:
    data = {name: images(torch.eye(2).repeat(10, 1), [0, 1] * 10) for name in ("training", "test")}
    data[broken].features[3, 0] = torch.nan
    with pytest.raises(ValueError, match=f"1 of 20 {broken} images are NaN or infinite"):
        linear_probe(data["training"], data["test"])


@pytest.mark.parametrize("strengths", [(), (0.0, 1.0), (-1.0,), (1.0, float("nan"))])
def test_strengths_that_are_none(strengths: tuple[float, ...]) -> None:
    train = images(torch.eye(2).repeat(10, 1), [0, 1] * 10)
    with pytest.raises(ValueError, match="give positive numbers"):
        linear_probe(train, train, regularization=strengths)
