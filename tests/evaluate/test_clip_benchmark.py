"""CLIP_benchmark's own functions on random features: the same values."""

import random

import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_classification
from clip_benchmark.metrics.zeroshot_classification import accuracy, zero_shot_classifier
from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn

from fastclip.evaluate.retrieval import retrieval_metrics
from fastclip.evaluate.zeroshot import class_embeddings, classification_metrics
from fastclip.models.clip import Model


@pytest.fixture(autouse=True)
def arrays_of_one_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its float(array of one element) is what NumPy from 2.4 on refuses."""
    monkeypatch.setattr(zeroshot_classification, "float", lambda one: one.item(), raising=False)


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
    # a model that cannot tell classes apart scores as the sort happens to leave them
    assert accuracy(logits, labels, topk=(1,))[0] > 0


class Words(nn.Module):
    """Texts as sums of random vectors, one a token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, 9)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.table(tokens).sum(1)


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[ord(c) for c in text.ljust(24)] for text in texts])


def test_prompt_ensembles() -> None:
    torch.manual_seed(0)
    model = Words()
    classes, templates = ["cat", "dog", "owl"], ["a {c}", "one {c}.", "photo of {c}"]
    theirs = zero_shot_classifier(model, tokenize, classes, templates, "cpu", amp=False)
    ours = class_embeddings(Model(model, lambda image: image, tokenize), classes, templates)
    assert torch.allclose(ours.T, theirs, rtol=1e-5, atol=1e-6)
