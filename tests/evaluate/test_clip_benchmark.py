"""CLIP_benchmark's own functions on random features: the same values."""

import math
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from clip_benchmark.metrics.zeroshot_classification import accuracy, zero_shot_classifier
from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn

from fastclip.data.faults import FaultLog
from fastclip.evaluate.features import ImageFeatures
from fastclip.evaluate.retrieval import evaluate_retrieval, retrieval_metrics
from fastclip.evaluate.zeroshot import class_embeddings, classification_metrics, evaluate_zeroshot
from fastclip.models.clip import Model

# of a text in characters
LENGTH = 24


@pytest.fixture(autouse=True)
def arrays_of_one_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its float(array of one element) is what NumPy from 2.4 on refuses."""

    def to_float(value: Any) -> float:
        return float(value.item() if hasattr(value, "item") else value)

    monkeypatch.setattr(zeroshot_classification, "float", to_float, raising=False)


@pytest.mark.parametrize("count, classes", [(200, 12), (37, 3), (1500, 100)])
def test_classification(count: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(count, classes, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    ours = classification_metrics(logits, labels)
    top = [1, 5] if classes >= 5 else [1]
    theirs = dict(zip(top, accuracy(logits, labels, topk=tuple(top)), strict=True))
    assert ours["acc1"] == pytest.approx(theirs[1], abs=1e-7)
    if classes >= 5:
        assert ours["acc5"] == pytest.approx(theirs[5], abs=1e-7)
    else:
        assert ours["acc5"] == 1
    recall = balanced_accuracy_score(labels, logits.argmax(1))
    assert ours["mean_per_class_recall"] == pytest.approx(recall, abs=1e-12)


@pytest.mark.parametrize("images, captions, width", [(60, 5, 16), (300, 1, 8), (7, 3, 4)])
def test_retrieval(images: int, captions: int, width: int) -> None:
    generator = torch.Generator().manual_seed(images)
    image = F.normalize(torch.randn(images, width, generator=generator), dim=1)
    text = F.normalize(torch.randn(images * captions, width, generator=generator), dim=1)
    owner = torch.arange(images).repeat_interleave(captions)
    # texts in any order
    order = list(range(len(text)))
    random.Random(0).shuffle(order)
    text, owner = text[order], owner[order]
    pairs = torch.stack((owner, torch.arange(len(text))), dim=1)
    ours = retrieval_metrics(image, text, pairs, (1, 5))
    scores = text @ image.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), owner] = True
    for k in (1, 5):
        # any of the positives counts, as in its `evaluate`
        by_text = (recall_at_k(scores, positive, k) > 0).double().mean().item()
        by_image = (recall_at_k(scores.T, positive.T, k) > 0).double().mean().item()
        assert ours[f"image_retrieval_recall@{k}"] == pytest.approx(by_text, abs=1e-12)
        assert ours[f"text_retrieval_recall@{k}"] == pytest.approx(by_image, abs=1e-12)


def test_ties_count_against_the_model_here_and_by_chance_there() -> None:
    logits, labels = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
    assert classification_metrics(logits, labels)["acc1"] == 0
    # a model that cannot separate classes scores as the sort happens to leave them
    assert accuracy(logits, labels, topk=(1,))[0] > 0


class Towers(nn.Module):
    """Texts as sums of random vectors, one a token and place; images are their features."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128 * LENGTH, 9)

    def encode_text(self, tokens: Tensor) -> Tensor:
        # without places texts of the same letters would tie
        return self.table(128 * torch.arange(LENGTH) + tokens).sum(1)

    def encode_image(self, images: Tensor) -> Tensor:
        return images


class Batches(list):
    """A loader's batches with the classes that CLIP_benchmark asks its data set for."""

    def __init__(self, batches: list[tuple[Tensor, Any]], classes: Sequence[str] = ()) -> None:
        super().__init__(batches)
        self.dataset = SimpleNamespace(classes=list(classes))


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[ord(c) for c in text.ljust(LENGTH)] for text in texts])


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(Towers(), lambda image: image, tokenize)


def embedded(
    pixels: Tensor, texts: Sequence[tuple[str, ...]] = (), labels: Sequence[int] = ()
) -> ImageFeatures:
    count = len(pixels)
    return ImageFeatures(
        F.normalize(pixels, dim=1),
        list(texts) or [()] * count,
        list(labels) or [None] * count,
        [str(i) for i in range(count)],
        FaultLog(),
    )


def test_prompt_ensembles(model: Model) -> None:
    classes, templates = ["cat", "dog", "owl"], ["a {c}", "one {c}.", "photo of {c}"]
    theirs = zero_shot_classifier(model.model, tokenize, classes, templates, "cpu", amp=False)
    ours = class_embeddings(model, classes, templates)
    assert torch.allclose(ours.T, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [3, 11])
def test_zeroshot_from_images_to_metrics(count: int, model: Model) -> None:
    classes = [f"class {number}" for number in range(count)]
    templates = ["a {c}", "photo of {c}"]
    pixels, labels = torch.randn(90, 9), torch.randint(count, (90,))
    batches = Batches([(pixels[i : i + 32], labels[i : i + 32]) for i in (0, 32, 64)], classes)
    theirs = zeroshot_classification.evaluate(
        model.model, batches, tokenize, classes, templates, "cpu", amp=False
    )
    images = embedded(pixels, labels=labels.tolist())
    ours = evaluate_zeroshot(model, images, classes, templates)
    if count < 5:
        # it gives none, where ours counts what is among all classes there are
        assert math.isnan(theirs.pop("acc5")) and ours.pop("acc5") == 1
    assert 0 < ours["acc1"] < 1
    # a number is a mean of at most 90 hits
    assert ours == pytest.approx(theirs, abs=1e-7)


def captions_of(images: int, each: int) -> list[tuple[str, ...]]:
    return [tuple(f"{i} and {i * j % 7} {j}" for j in range(each)) for i in range(images)]


def retrieval_there(model: Model, pixels: Tensor, texts: list[tuple[str, ...]]) -> dict[str, float]:
    starts = range(0, len(pixels), 16)
    batches = Batches([(pixels[i : i + 16], texts[i : i + 16]) for i in starts])
    found = zeroshot_retrieval.evaluate(
        model.model, batches, tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    return dict(found)


@pytest.mark.parametrize("each", [1, 5])
def test_retrieval_from_captions_to_metrics(each: int, model: Model) -> None:
    pixels, texts = torch.randn(40, 9), captions_of(40, each)
    # near to the first caption's features, so that some are found
    pixels += 0.2 * model.model.encode_text(tokenize([own[0] for own in texts])).detach()
    ours = evaluate_retrieval(model, embedded(pixels, texts))
    assert ours.pop("images") == 40 and ours.pop("texts") == 40 * each
    assert all(0 < value < 1 for value in ours.values())
    # it takes means in float32
    assert ours == pytest.approx(retrieval_there(model, pixels, texts), abs=1e-6)


def test_a_caption_of_two_images_belongs_to_both_here_and_to_one_there(model: Model) -> None:
    texts = captions_of(20, 2)
    pixels = model.model.encode_text(tokenize([own[0] for own in texts])).detach()
    # two images of one caption, the second's features unlike it: the text finds the first
    pixels[1], texts[1] = -pixels[1], (texts[0][0], texts[1][1])
    ours = evaluate_retrieval(model, embedded(pixels, texts), k=(1,))
    theirs = retrieval_there(model, pixels, texts)
    assert ours["texts"] == 39
    # there the same text is asked for again, on behalf of the other image, and wrong
    hits = theirs["image_retrieval_recall@1"] * 40
    assert ours["image_retrieval_recall@1"] * 39 == pytest.approx(hits, abs=1e-4)
    assert ours["image_retrieval_recall@1"] > theirs["image_retrieval_recall@1"]
