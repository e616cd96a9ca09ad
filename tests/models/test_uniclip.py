"""UniCLIP against loops over anchors and positives: its loss, its ablations, ranks, micro-batches.

float64: the two sums differ in order alone, by far less than 1e-10.
"""

import functools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip.data.augment import PARAMS, Augmentation, AugmentationParams, draw_view
from fastclip.models.options import SystemOptions
from fastclip.models.uniclip import UniClip, UniClipCriterion
from fastclip.train.accumulate import accumulate
from fastclip.train.optim import clamp
from tests.models import harness

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "weighted": {"pair_weight": (0.5, 2.0, 7.0)},
    "unconditioned": {"augmentation_encoder": False},
    "shared": {"shared_similarity": True},
    "shared weighted": {"shared_similarity": True, "pair_weight": (0.5, 2.0, 7.0)},
    "info-nce": {"pair_loss": "info-nce"},
    "info-nce weighted": {"pair_loss": "info-nce", "pair_weight": (0.5, 2.0, 7.0)},
    "mil-nce": {"pair_loss": "mil-nce"},
    "mil-nce shared": {"pair_loss": "mil-nce", "shared_similarity": True},
    "sup-con": {"pair_loss": "sup-con"},
    "nothing": {
        "pair_loss": "info-nce",
        "augmentation_encoder": False,
        "shared_similarity": True,
    },
}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# sample, modality, view, feature
Point = tuple[int, str, int, Tensor]


def begin(folder: Path, views: tuple[int, int] = (3, 1), **options: Any) -> UniClip:
    towers = harness.tiny_towers(folder)
    options = {"head_width": 10, "strong_views": views[0] - 1, **options}
    system = UniClip.of(towers, harness.WIDTH, SystemOptions("uniclip", **options))
    return UniClip(towers, system.criterion, *views).double()


def build(folder: Path, views: tuple[int, int] = (3, 1), **options: Any) -> UniClip:
    """A system of which every parameter matters; at first some layers are zero."""
    system = begin(folder, views, **options)
    with torch.no_grad():
        for parameter in system.criterion.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return system


def build_with_teacher(folder: Path, **options: Any) -> tuple[UniClip, None]:
    return build(folder, **options), None


def draw(rows: int, images: int = 3, texts: int = 1) -> harness.Batch:
    """A batch with the parameters of strong views, float32 as a loader gives them."""
    strong = Augmentation.strong(16)
    drawn = [draw_view(strong, 20, 30, random.Random(i)) for i in range(rows * images)]
    params = torch.stack([view.encode(20, 30) for view in drawn]).view(rows, images, PARAMS)
    return {**harness.draw_batch(rows, images, texts), "params": params}


def image_head(p: dict[str, Tensor], feature: Tensor, params: Tensor) -> Tensor:
    condition = params
    for layer in range(3):
        condition = p[f"augmentation_encoder.layers.{layer}.weight"] @ condition
        condition = condition + p[f"augmentation_encoder.layers.{layer}.bias"]
        condition = condition.clamp_min(0) if layer < 2 else condition
    for block in range(3):
        inner = p[f"image_head.enter.{block}.weight"] @ torch.cat([feature, condition])
        inner = (inner + p[f"image_head.enter.{block}.bias"]).clamp_min(0)
        leave = f"image_head.leave.{block}"
        feature = feature + p[f"{leave}.weight"] @ inner + p[f"{leave}.bias"]
    return p["image_head.project.weight"] @ feature


def mil_nce(points: list[Point], logit: Callable[[int, int], Tensor], i: int) -> Tensor:
    """An anchor's loss: all its positives over all others."""
    others = [j for j in range(len(points)) if j != i]
    good = sum(logit(i, j).exp() for j in others if points[j][0] == points[i][0])
    return -(good / sum(logit(i, j).exp() for j in others)).log()


def slow_loss(system: UniClip, batch: harness.Batch, options: dict[str, Any]) -> Tensor:
    """A loop over all anchors and their positives."""
    p = dict(system.criterion.named_parameters())
    neutral = AugmentationParams.identity(50, 40).encode(50, 40).double()
    points: list[Point] = []
    for view, image in enumerate(batch["images"]):
        for sample, feature in enumerate(system.towers.encode_image(image)):
            conditioned = options.get("augmentation_encoder", True)
            params = batch["params"][sample, view].double() if conditioned else neutral
            z = image_head(p, feature, params)
            points.append((sample, "I", view, z / z.norm()))
    for view, text in enumerate(batch["texts"]):
        for sample, feature in enumerate(system.towers.encode_text(text)):
            z = p["text_head.weight"] @ feature
            points.append((sample, "T", view, z / z.norm()))

    kind = options.get("pair_loss", "mp-nce")
    kinds = ["II", "IT", "TT"]

    def logit(i: int, j: int) -> Tensor:
        (_, a, _, x), (_, b, _, y) = points[i], points[j]
        pair = kinds.index("".join(sorted(a + b)))
        temperature = p["log_temperature"].exp()
        temperature = temperature[pair] if len(temperature) == 3 else temperature[0]
        offset = p["offset"][pair] if "offset" in p else 0.0
        return (x @ y - offset) / temperature

    if kind == "mil-nce":
        return torch.stack([mil_nce(points, logit, i) for i in range(len(points))]).mean()
    terms: dict[str, list[Tensor]] = {k: [] for k in kinds}
    for i, (sample, a, _, _) in enumerate(points):
        for j, (other, b, view, _) in enumerate(points):
            if i == j or sample != other:
                continue
            if kind == "sup-con":
                candidates = [n for n in range(len(points)) if n != i]
            else:
                candidates = [j] + [n for n, point in enumerate(points) if point[0] != sample]
            if kind == "info-nce":
                candidates = [n for n in candidates if points[n][1:3] == (b, view)]
            total = sum(logit(i, n).exp() for n in candidates)
            terms["".join(sorted(a + b))].append(-(logit(i, j).exp() / total).log())

    weight = options.get("pair_weight")
    if weight is None and kind != "sup-con":
        return torch.stack([torch.stack(each).mean() for each in terms.values() if each]).mean()
    weights = dict(zip(kinds, weight or (1, 1, 1), strict=True))
    return torch.stack([weights[k] * term for k, each in terms.items() for term in each]).mean()


def slow(folder: Path, batch: harness.Batch, **options: Any) -> dict[str, Tensor]:
    """Loss and gradients, as the harness has them."""
    views = len(batch["images"]), len(batch["texts"])
    system = build(folder, views, **options)
    loss = slow_loss(system, batch, options)
    loss.backward()
    trained = {n: p for n, p in system.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **{n: p.grad for n, p in trained.items()}}


@pytest.mark.parametrize("views", [(3, 1), (2, 2), (1, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_the_loops(
    variant: str, views: tuple[int, int], tmp_path: Path
) -> None:
    batch, options = draw(4, *views), VARIANTS[variant]
    found = harness.loss_and_gradients(build(tmp_path, views, **options), batch)
    # a gradient of every parameter that is trained, or data-parallel training would wait
    torch.testing.assert_close(found, slow(tmp_path, batch, **options), **CLOSE)


@pytest.mark.dist
@pytest.mark.parametrize("sizes", [(3, 2), (1, 3, 2)])
def test_ranks_are_one_batch(sizes: tuple[int, ...], tmp_path: Path) -> None:
    batch = draw(sum(sizes))
    builds = {
        name: functools.partial(build_with_teacher, **options) for name, options in VARIANTS.items()
    }
    found = harness.all_on_ranks(tmp_path, sizes, builds, batch)
    for name, options in VARIANTS.items():
        torch.testing.assert_close(found[name], slow(tmp_path, batch, **options), **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_are_one_batch(variant: str, tmp_path: Path) -> None:
    batch, options = draw(7), VARIANTS[variant]
    want = harness.loss_and_gradients(build(tmp_path, **options), batch)
    system = build(tmp_path, **options)
    shared = {f"criterion.{name}" for name, _ in system.criterion.named_parameters()}
    parts = [harness.rows_of(batch, start, start + 3) for start in (0, 3, 6)]
    loss = accumulate(system, parts, system.loss, shared=shared)
    found = {n: p.grad for n, p in system.named_parameters() if p.grad is not None}
    torch.testing.assert_close({"loss": loss, **found}, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pair_loss", ["mp-nce", "info-nce", "mil-nce", "sup-con"])
def test_the_exchange_reaches_the_loss(pair_loss: str, tmp_path: Path) -> None:
    system = build(tmp_path, pair_loss=pair_loss)
    output = system(draw(4))
    for backend in ("torch", "reference"):
        torch.testing.assert_close(system.loss(output, backend=backend), system.loss(output))
    with pytest.raises(ValueError, match="backend 'other' of"):
        system.loss(output, backend="other")


@pytest.mark.parametrize("variant", ["full", "info-nce", "mil-nce", "sup-con"])
def test_in_low_precision(variant: str, tmp_path: Path) -> None:
    """Under autocast, and as ZeRO has it: rounded parameters, but for what is held in bounds."""
    batch = draw(8)
    want = harness.loss_and_gradients(build(tmp_path, **VARIANTS[variant]), batch)["loss"].float()
    batch["images"] = [image.float() for image in batch["images"]]
    mixed = build(tmp_path, **VARIANTS[variant]).float()
    with torch.autocast("cpu", torch.bfloat16):
        # cosines are off by about 2^-8, logits by 2^-8 / temperature
        torch.testing.assert_close(mixed.loss(mixed(batch)), want, rtol=0.05, atol=0)
    rounded = build(tmp_path, **VARIANTS[variant]).bfloat16()
    batch["images"] = [image.bfloat16() for image in batch["images"]]
    output = rounded(batch) | {name: mixed.get_parameter(name) for name in rounded.bounds}
    loss = rounded.loss(output)
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=0.05, atol=0)
    assert loss.dtype == torch.float32


def test_the_augmentation_counts_unless_it_is_left_out(tmp_path: Path) -> None:
    batch = draw(6)
    image, params = batch["images"][0], batch["params"]
    for conditioned in (True, False):
        system = build(tmp_path, augmentation_encoder=conditioned)
        a, b = (system.encode_image(image, params=params[:, view]) for view in (0, 1))
        assert torch.equal(a, b) != conditioned
        # evaluation knows of no augmentation
        neutral = AugmentationParams.identity(33, 44).encode(33, 44).expand(6, -1)
        plain = system.encode_image(image, normalize=True)
        torch.testing.assert_close(
            plain, system.encode_image(image, normalize=True, params=neutral)
        )
        torch.testing.assert_close(plain.norm(dim=1), torch.ones(6).double())


def test_it_begins_as_plain_projections_with_clips_scale(tmp_path: Path) -> None:
    system = begin(tmp_path)
    batch = draw(5)
    image, text = batch["images"][0], batch["texts"][0]
    projected = system.towers.encode_image(image) @ system.criterion.image_head.project.weight.T
    torch.testing.assert_close(system.encode_image(image), projected)
    torch.testing.assert_close(system.encode_image(image, params=batch["params"][:, 1]), projected)
    assert system.encode_text(text).shape == (5, 10)
    assert system.logit_scale(system.get_parameter) == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(
    "options, pairs, offsets",
    [
        ({}, 3, 3),
        ({"shared_similarity": True}, 1, 0),
        ({"pair_loss": "info-nce"}, 3, 0),
        ({"pair_loss": "mil-nce"}, 3, 3),
    ],
)
def test_temperatures_are_learned_one_a_domain_pair_and_bounded(
    options: dict[str, Any], pairs: int, offsets: int, tmp_path: Path
) -> None:
    system = build(tmp_path, **options)
    assert system.criterion.log_temperature.shape == (pairs,)
    assert offsets == (0 if system.criterion.offset is None else len(system.criterion.offset))
    with torch.no_grad():
        system.criterion.log_temperature.copy_(torch.linspace(-6.0, -1.0, pairs))
    if pairs == 3:
        assert system.logit_scale(system.get_parameter) == pytest.approx(math.exp(3.5))
    clamp(system, system.bounds)
    torch.testing.assert_close(system.criterion.logit_scale.max().item(), 100.0)


def test_sup_con_has_the_one_scale_of_a_shared_similarity(tmp_path: Path) -> None:
    """So they differ in the loss alone, and the flag changes nothing of it."""
    alone, both, shared = (
        build(tmp_path, **options)
        for options in (
            {"pair_loss": "sup-con"},
            {"pair_loss": "sup-con", "shared_similarity": True},
            {"shared_similarity": True},
        )
    )
    shapes = [{n: p.shape for n, p in each.named_parameters()} for each in (alone, both, shared)]
    assert shapes[0] == shapes[1] == shapes[2]
    batch = draw(4)
    losses = [each.loss(each(batch)).item() for each in (alone, both, shared)]
    assert losses[0] == losses[1] != losses[2]


def test_it_learns_a_batch_and_is_saved_whole(tmp_path: Path) -> None:
    system, batch = begin(tmp_path), draw(8)
    optimizer = torch.optim.AdamW(system.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = system.loss(system(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clamp(system, system.bounds)
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    torch.save(system.state_dict(), tmp_path / "weights.pt")
    again = build(tmp_path)
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(again.loss(again(batch)), system.loss(system(batch)))
    image, text = batch["images"][0], batch["texts"][0]
    encoded = system.encode_image(image, params=batch["params"][:, 0])
    found = (encoded @ system.encode_text(text, normalize=True).mT).argmax(dim=1)
    assert (found == torch.arange(8)).double().mean() == 1


def test_mistakes_are_reported(tmp_path: Path) -> None:
    batch = draw(6)
    with pytest.raises(ValueError, match=r"\(6, 2, 18\) for 3 views of 6 images"):
        build(tmp_path)({**batch, "params": batch["params"][:, :2]})
    for weight in ((1.0, 0.0, 0.0), (-1.0, 1.0, 1.0), (1.0, math.inf, 1.0)):
        with pytest.raises(ValueError, match=r"pair_weight is .*give three numbers of 0 or more"):
            UniClipCriterion(4, pair_weight=weight)
    for pair_loss in ("mil-nce", "sup-con"):
        with pytest.raises(ValueError, match=f"no part in {pair_loss}; leave it out"):
            UniClipCriterion(4, pair_weight=(1.0, 1.0, 1.0), pair_loss=pair_loss)
