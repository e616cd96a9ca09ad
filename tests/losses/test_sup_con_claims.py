"""What the pages say of SupConLoss beside other libraries' classes of that name.

SupContrast's is written here from its definition, pytorch-metric-learning's is the library's own.
"""

from typing import Any

import pytest
import pytorch_metric_learning.distances as distances
import pytorch_metric_learning.losses as pml
import pytorch_metric_learning.reducers as reducers
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import SupConLoss
from fastclip.ops.dense import switched_off

LIMIT = 1e-6
"""Of an error in float32, beside the largest entry or 1."""


def supcontrast(
    features: Tensor, mask: Tensor, mode: str, temperature: float, base_temperature: float
) -> Tensor:
    """Anchor by anchor: the mean of -log shares over its positives, weighted by the mask."""
    samples, views = features.shape[:2]
    vectors = features.reshape(samples, views, -1)
    terms = []
    for view in range(views if mode == "all" else 1):
        for i in range(samples):
            logits = vectors @ vectors[i, view] / temperature
            others = torch.ones(samples, views, dtype=torch.bool)
            others[i, view] = False
            weight = mask[i][:, None] * others
            total = weight.sum()
            shares = logits - logits[others].logsumexp(0)
            mean = (weight * shares).sum() / (total if total >= 1e-6 else 1.0)
            terms.append(-temperature / base_temperature * mean)
    return torch.stack(terms).mean()


def features_of(samples: int, views: int, shape: tuple[int, ...]) -> Tensor:
    """Normalized, in float32's numbers."""
    generator = torch.Generator().manual_seed(views)
    raw = torch.randn(samples, views, *shape, generator=generator)
    return F.normalize(raw.flatten(2), dim=-1).reshape(raw.shape)


def with_gradient(loss: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    leaf = features.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def check_close(ours: Any, definition: Any, features: Tensor, limit: float = LIMIT) -> None:
    truth = with_gradient(definition, features.double())
    for got, want in zip(with_gradient(ours, features), truth, strict=True):
        assert got.dtype == features.dtype
        error = (got - want).abs().max() / want.abs().max().clamp(min=1)
        assert error <= limit, error


GENERATOR = torch.Generator().manual_seed(5)
MASKS = {
    "weights": torch.rand(7, 7, generator=GENERATOR),
    "one row empty": torch.eye(7) * torch.tensor([1, 1, 0, 1, 1, 1, 1])[:, None],
    "not symmetric": (torch.rand(7, 7, generator=GENERATOR) > 0.4).float(),
}
LABELS = {
    "labels": torch.tensor([0, 1, 1, 4, 0, 0, 9]),
    "column": torch.tensor([[0], [1], [1], [4], [0], [0], [9]]),
    "numbers": torch.tensor([0.0, 0.5, 0.5, 2.0, -0.0, 0.0, 7.0]),
}


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("positives", [None, *LABELS, *MASKS])
@pytest.mark.parametrize("small", [True, False])
def test_supcontrast(positives: str | None, views: int, mode: str, small: bool) -> None:
    features = features_of(7, views, (2, 3) if views == 3 else (6,))
    given: dict[str, Tensor] = {}
    mask = torch.eye(7)
    if positives in LABELS:
        given["labels"] = LABELS[positives]
        ids = given["labels"].flatten()
        mask = (ids[:, None] == ids).float()
    elif positives is not None:
        given["mask"] = mask = MASKS[positives]
    temperatures = (0.07, 0.07) if small else (0.2, 0.1)
    loss = SupConLoss.supcontrast(temperatures[0], mode, temperatures[1])

    def ours(z: Tensor) -> Tensor:
        if small:
            return loss(z, **given)
        with switched_off():
            return loss(z, **given)

    def definition(z: Tensor) -> Tensor:
        return supcontrast(z, mask.double(), mode, *temperatures)

    check_close(ours, definition, features)
    check_close(ours, definition, features.double(), 1e-12)


def test_supcontrasts_arguments_and_refusals() -> None:
    loss = SupConLoss.supcontrast()
    assert (loss.temperature, loss.contrast_mode, loss.base_temperature) == (0.07, "all", 0.07)
    views, labels = features_of(4, 2, (5,)), torch.arange(4)
    for given, message in (
        ((views[:, 0],), r"\(N, V, \.\.\.\)"),
        ((views, labels, torch.eye(4)), "give one of them"),
        ((views, labels[:3]), r"give \(4,\)"),
        ((views, None, torch.eye(3)), r"give \(4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(*given)
    for options, message in (
        ({"contrast_mode": "any"}, "use one of all, one"),
        ({"base_temperature": 0.0}, "base_temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            SupConLoss.supcontrast(**options)


PML_LABELS = {
    "some": torch.tensor([3, 1, 1, 4, 3, 3, 9, 1, 2]),
    "none twice": torch.arange(9),
    "all alike": torch.ones(9, dtype=torch.int64),
}


@pytest.mark.parametrize("temperature", [0.07, 0.1, 0.5])
@pytest.mark.parametrize("labels", PML_LABELS)
@pytest.mark.parametrize("distance", [None, "CosineSimilarity", "DotProductSimilarity", "raw"])
def test_metric_learning(distance: str | None, labels: str, temperature: float) -> None:
    """Cosines whatever the length, dot products of vectors as they are."""
    features = features_of(9, 1, (5,))[:, 0]
    given: dict[str, Any] = {}
    if distance == "raw":
        given["distance"] = distances.DotProductSimilarity(normalize_embeddings=False)
    elif distance is not None:
        given["distance"] = getattr(distances, distance)()
    if distance != "raw":
        features = 3 * features
    theirs = pml.SupConLoss(temperature, **given)
    ours = SupConLoss.metric_learning(temperature, **given)
    ids = PML_LABELS[labels]
    if labels != "some":
        value, gradient = with_gradient(lambda z: ours(z, ids), features)
        assert value == 0 and not gradient.any() and theirs(features, ids) == 0
        return
    # theirs adds 1e-7 to the number of positives in float32
    check_close(lambda z: ours(z, ids), lambda z: theirs(z, ids), features)
    check_close(lambda z: ours(z, ids), lambda z: theirs(z, ids), features.double(), 1e-9)


def test_metric_learnings_arguments_and_refusals() -> None:
    assert SupConLoss.metric_learning().temperature == pml.SupConLoss().temperature == 0.1
    assert SupConLoss.metric_learning(reducer=reducers.AvgNonZeroReducer()).normalize_embeddings
    for options, message in (
        ({"distance": distances.LpDistance()}, "use None, a CosineSimilarity"),
        ({"distance": distances.CosineSimilarity(power=2)}, "power 1"),
        ({"distance": distances.DotProductSimilarity(p=1)}, "use p=2"),
        ({"reducer": reducers.MeanReducer()}, "AvgNonZeroReducer"),
        ({"temperature": -1.0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            SupConLoss.metric_learning(**options)
    loss, rows, ids = SupConLoss.metric_learning(), torch.eye(3), torch.tensor([0, 0, 1])
    for options, message in (
        ({}, "labels are None"),
        ({"labels": ids, "ref_emb": rows}, "ref_emb is given"),
        ({"labels": ids, "indices_tuple": (ids, ids, ids)}, "indices_tuple is given"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(rows, **options)


def test_a_mask_under_autocast_is_as_exact_as_labels() -> None:
    """The sum of an anchor's positives is not rounded to autocast's dtype."""
    views = F.normalize(torch.randn(64, 2, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    # features that lose nothing in it, so that their products are exact
    views = views.bfloat16().float()
    labels = torch.arange(64) % 4
    mask = (labels[:, None] == labels).float()
    loss = SupConLoss.supcontrast()
    exact = loss(views.double(), mask=mask.double())
    with torch.autocast("cpu", torch.bfloat16):
        for value in (loss(views, labels), loss(views, mask=mask)):
            assert (value - exact).abs() <= 1e-5 * exact.abs()
