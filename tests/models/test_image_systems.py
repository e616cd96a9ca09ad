"""Models without language against loss formulas written out, alone and on several processes."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastclip.models.classifier import Classifier
from fastclip.models.clip import create
from fastclip.models.image_tower import load_image_tower
from fastclip.models.options import SystemOptions
from fastclip.models.simclr import SimCLR
from fastclip.models.system import PREFIX, System, TwoTowers
from fastclip.train.accumulate import accumulate
from tests.models.harness import (
    WIDTH,
    Batch,
    draw_batch,
    loss_and_gradients,
    on_ranks,
    rows_of,
    tiny_towers,
)
from tests.train.conftest import TINY_MODEL

CLASSES = 5
# float64 sums of a few hundred terms in another order
TOLERANCE = 1e-10

Built = tuple[System, System | None]


def build_classifier(folder: Path) -> Built:
    options = SystemOptions(objective="classify", label_smoothing=0.1)
    return Classifier.of(tiny_towers(folder), WIDTH, options, CLASSES).double(), None


def build_prototypes(folder: Path) -> Built:
    visual = tiny_towers(folder).visual
    return Classifier(visual, WIDTH, CLASSES, prototype=True).double(), None


def build_simclr(folder: Path) -> Built:
    options = SystemOptions(objective="simclr", projector_hidden=12, projector_width=8)
    return SimCLR.of(tiny_towers(folder), WIDTH, options).double(), None


def labeled(rows: int = 7) -> Batch:
    """The first row, and so the first of several processes, has no label."""
    label = torch.tensor([-1, 3, 0, 4, -1, 3, 1])[:rows]
    return {**draw_batch(rows, 1, 0), "label": label}


def classifier_loss(system: Classifier, batch: Batch) -> Tensor:
    """Row by row, with smoothing of 0.1."""
    weight, bias = system.criterion.weight, system.criterion.bias
    losses = []
    for image, label in zip(batch["images"][0], batch["label"].tolist(), strict=True):
        if label >= 0:
            feature = system.visual(image[None])[0]
            logits = (weight * feature).sum(1) + bias
            surprise = logits.exp().sum().log() - logits
            losses.append(0.9 * surprise[label] + 0.1 * surprise.sum() / CLASSES)
    return torch.stack(losses).sum() / len(losses)


def prototype_loss(system: Classifier, batch: Batch) -> Tensor:
    """Row by row."""
    losses = []
    for image, label in zip(batch["images"][0], batch["label"].tolist(), strict=True):
        if label >= 0:
            feature = system.visual(image[None])[0]
            cosines = torch.stack(
                [(w * feature).sum() / (w.norm() * feature.norm()) for w in system.criterion.weight]
            )
            logits = system.criterion.logit_scale.exp() * cosines
            losses.append(logits.exp().sum().log() - logits[label])
    return torch.stack(losses).sum() / len(losses)


def simclr_loss(system: SimCLR, batch: Batch) -> Tensor:
    """Anchor by anchor: the other view against all views but the anchor itself."""
    first, norm1, _, second, norm2, _, last = system.criterion.projector

    def project(rows: Tensor) -> Tensor:
        for layer, norm in ((first, norm1), (second, norm2)):
            rows = rows @ layer.weight.T
            mean = rows.sum(0) / len(rows)
            variance = (rows - mean).square().sum(0) / len(rows)
            rows = (rows - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
            rows = rows * (rows > 0)
        rows = rows @ last.weight.T + last.bias
        return rows / rows.norm(dim=1, keepdim=True)

    views = torch.cat([project(system.visual(view)) for view in batch["images"]])
    count = len(views) // 2
    logits = views @ views.T / 0.1
    losses = []
    for i in range(2 * count):
        others = torch.stack([logits[i, j] for j in range(2 * count) if j != i])
        losses.append(others.exp().sum().log() - logits[i, (i + count) % (2 * count)])
    return torch.stack(losses).sum() / len(losses)


CASES = {
    "classifier": (build_classifier, classifier_loss, labeled),
    "prototypes": (build_prototypes, prototype_loss, labeled),
    "simclr": (build_simclr, simclr_loss, lambda: draw_batch(7, 2, 0)),
}
case = pytest.mark.parametrize(("build", "oracle", "draw"), CASES.values(), ids=CASES)
Build, Oracle, Draw = Callable[[Path], Built], Callable[..., Tensor], Callable[[], Batch]


def expected(build: Build, oracle: Oracle, batch: Batch, folder: Path) -> dict[str, Tensor]:
    system, _ = build(folder)
    loss = oracle(system, batch)
    loss.backward()
    grads = {n: p.grad for n, p in system.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_equal(
    found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    """Relative to the largest entry of all: where normalization follows, some are truly 0."""
    assert found.keys() == wanted.keys()
    largest = max(value.abs().max() for value in wanted.values())
    for name, value in wanted.items():
        error = (found[name] - value).abs().max() / largest
        assert error <= tolerance, (name, error)


@case
def test_loss_and_gradients(build: Build, oracle: Oracle, draw: Draw, tmp_path: Path) -> None:
    system, _ = build(tmp_path)
    found = loss_and_gradients(system, draw())
    assert_equal(found, expected(build, oracle, draw(), tmp_path))
    # every parameter is trained, as data-parallel training wants it
    assert len(found) == 1 + len(list(system.parameters()))


@pytest.mark.dist
@pytest.mark.parametrize("sizes", [(2, 5), (1, 4, 2)], ids=["2 ranks", "3 ranks"])
@pytest.mark.parametrize("name", ["classifier", "simclr"])
def test_ranks_share_a_batch(name: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    build, oracle, draw = CASES[name]
    found = on_ranks(tmp_path, sizes, build, draw())
    assert_equal(dict(found), expected(build, oracle, draw(), tmp_path))


@case
def test_micro_batches(build: Build, oracle: Oracle, draw: Draw, tmp_path: Path) -> None:
    batch, (system, _), (alone, _) = draw(), build(tmp_path), build(tmp_path)
    shared = {PREFIX + name for name, _ in system.criterion.named_parameters()}
    parts = [rows_of(batch, start, stop) for start, stop in ((0, 1), (1, 5), (5, 7))]
    loss = accumulate(system, parts, system.loss, shared=shared)
    grads = {name: p.grad for name, p in system.named_parameters()}
    assert_equal({"loss": loss, **grads}, loss_and_gradients(alone, batch), 1e-12)
    for name, buffer in system.criterion.named_buffers():
        torch.testing.assert_close(buffer, alone.criterion.get_buffer(name), rtol=1e-12, atol=0)


def test_a_batch_without_labels_teaches_nothing(tmp_path: Path) -> None:
    system, _ = build_classifier(tmp_path)
    batch = {**draw_batch(3, 1, 0), "label": torch.full((3,), -1)}
    for name, value in loss_and_gradients(system, batch).items():
        assert torch.equal(value, torch.zeros_like(value)), name


def test_a_frozen_tower_leaves_a_linear_probe(tmp_path: Path) -> None:
    system, _ = build_classifier(tmp_path)
    system.visual.lock()
    whole = loss_and_gradients(system, labeled())
    assert whole.keys() == {"loss", "criterion.weight", "criterion.bias"}
    system.zero_grad()
    parts = [rows_of(labeled(), 0, 3), rows_of(labeled(), 3, 7)]
    loss = accumulate(system, parts, system.loss, shared=whole.keys() - {"loss"})
    grads = {n: p.grad for n, p in system.named_parameters() if p.grad is not None}
    assert_equal({"loss": loss, **grads}, whole, 1e-12)


def test_classifiers_begin_alike_or_with_given_weights(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 16, 16)
    visual = tiny_towers(tmp_path).visual.float()
    even = torch.full((4, CLASSES), 1 / CLASSES)
    # small random weights
    begun = Classifier(visual, WIDTH, CLASSES).classify(images).softmax(1)
    torch.testing.assert_close(begun, even, rtol=0.5, atol=0)
    names = torch.randn(CLASSES, WIDTH)
    system = Classifier(visual, WIDTH, CLASSES, weight=names)
    torch.testing.assert_close(system.classify(images), system.encode_image(images) @ names.T)
    with pytest.raises(ValueError, match=r"\(5, 3\); 5 classes and features of width 16 need"):
        Classifier(visual, WIDTH, CLASSES, weight=torch.zeros(CLASSES, 3))
    with pytest.raises(ValueError, match="0 classes"):
        Classifier(visual, WIDTH, 0)


def test_logits_are_exact_under_autocast(tmp_path: Path) -> None:
    system = Classifier(tiny_towers(tmp_path).visual, WIDTH, CLASSES, prototype=True)
    features = torch.randn(4, WIDTH).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = system.criterion.logits(features)
    assert torch.equal(found, system.criterion.logits(features.float()))
    assert system.bounds == {"criterion.logit_scale": (0.0, pytest.approx(math.log(100)))}


def test_names_are_those_of_open_clip(tmp_path: Path) -> None:
    towers = tiny_towers(tmp_path)
    named = {name for name in towers.state_dict() if name.startswith("visual.")}
    (classifier, _), (simclr, _) = build_classifier(tmp_path), build_simclr(tmp_path)
    assert set(classifier.state_dict()) == named | {"criterion.weight", "criterion.bias"}
    assert named < set(simclr.state_dict())
    view = draw_batch(2, 1, 0)["images"][0]
    for system in (classifier, simclr):
        encoded = system.encode_image(view, normalize=True)
        torch.testing.assert_close(encoded, towers.encode_image(view, normalize=True))
        with pytest.raises(ValueError, match="trained without language and cannot encode text"):
            system.encode_text(torch.zeros(1, 12, dtype=torch.long))
    with pytest.raises(ValueError, match="SimCLR takes 2 image and 0 text views"):
        simclr(draw_batch(2, 2, 1))


@pytest.mark.parametrize("kind", ["CLIP", "two towers", "classifier"])
def test_the_image_tower_of_any_checkpoint(kind: str, tmp_path: Path) -> None:
    towers = tiny_towers(tmp_path)
    nn.init.normal_(towers.visual.proj)
    made: dict[str, nn.Module] = {
        "CLIP": towers,
        "two towers": TwoTowers(towers, nn.Module(), 1, 1),  # type: ignore[arg-type]
        "classifier": Classifier(towers.visual, WIDTH, 3),
    }
    weights = made[kind].state_dict()
    fresh = tiny_towers(tmp_path)
    receivers = (
        fresh,
        TwoTowers(tiny_towers(tmp_path), nn.Module(), 1, 1),  # type: ignore[arg-type]
        build_simclr(tmp_path)[0],
    )
    for model in receivers:
        others = {n: v.clone() for n, v in model.state_dict().items() if "visual." not in n}
        load_image_tower(model, weights)
        for name, value in towers.visual.state_dict().items():
            assert torch.equal(model.visual.state_dict()[name], value)
        for name, value in others.items():
            assert torch.equal(model.state_dict()[name], value)


def test_other_towers_are_refused(tmp_path: Path) -> None:
    system, _ = build_classifier(tmp_path)
    before = {name: value.clone() for name, value in system.state_dict().items()}
    deeper = {**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "layers": 2}}
    deeper["vision_cfg"]["patch_size"] = 4
    (tmp_path / "deeper.json").write_text(json.dumps(deeper))
    weights = create(str(tmp_path / "deeper.json")).model.state_dict()
    del weights["visual.proj"]
    with pytest.raises(ValueError) as refused:
        load_image_tower(system, weights)
    message = str(refused.value)
    assert "missing: proj;" in message
    assert "12 unexpected: transformer.resblocks.1.attn" in message
    assert "conv1.weight (16, 3, 4, 4) for (16, 3, 8, 8)" in message
    with pytest.raises(ValueError, match=r"no image tower.*the first is logit_scale"):
        load_image_tower(system, {"logit_scale": torch.zeros(())})
    for name, value in system.state_dict().items():
        assert torch.equal(value, before[name])
