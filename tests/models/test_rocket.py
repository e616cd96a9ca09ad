"""CLIP-Rocket and its kin against the papers' formulas, written out slowly in float64."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastclip.models.options import SystemOptions
from fastclip.models.rocket import Rocket
from fastclip.models.system import Features, Outputs
from fastclip.train.accumulate import accumulate
from tests.models.harness import (
    WIDTH,
    Batch,
    all_on_ranks,
    draw_batch,
    loss_and_gradients,
    rows_of,
    tiny_towers,
    views_of,
)

SIZES = {2: (5, 4), 3: (2, 4, 3)}
ROWS = 9
BATCH = draw_batch(ROWS, images=3, texts=3)
SMALL = {"head_width": 8, "head_hidden": 10, "projector_hidden": 9, "projector_width": 7}
CASES: dict[str, dict[str, Any]] = {
    "rocket": {"label_smoothing": 0.1},
    "slip": {"term": "slip"},
    "siamlip": {"term": "siamlip", "label_smoothing": 0.1},
    "byolip": {"term": "byolip"},
    "barlip": {"term": "barlip"},
    "swalip": {"term": "swalip"},
    "one strong view": {"strong_views": 1, "label_smoothing": 0.2},
    "no strong view": {"term": "siamlip", "strong_views": 0, "separate_projectors": True},
    "plain clip": {"strong_views": 0},
    "one head": {"term": "swalip", "separate_heads": False},
    "prototypes": {"term": "swalip", "strong_views": 0, "prototypes": 5},
    "own projectors": {"term": "byolip", "separate_projectors": True},
    "own projectors, weighed": {"term": "barlip", "separate_projectors": True, "term_weight": 0.3},
}
PAPERS = ("rocket", "slip", "siamlip", "byolip", "barlip", "swalip")


def make(folder: Path, seed: int = 2, **options: Any) -> Rocket:
    """The case's system, whose heads are moved from where they begin."""
    system = Rocket(tiny_towers(folder), WIDTH, **SMALL, **options).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in system.criterion.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        if seed != 2:
            for parameter in system.towers.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    return system


def build(case: str, folder: Path) -> tuple[Rocket, Rocket | None]:
    system = make(folder, **CASES[case])
    teacher = make(folder, seed=3, **CASES[case]) if system.needs_teacher else None
    return system, teacher


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def slow_mlp(
    p: dict[str, Tensor], name: str, x: Tensor, hidden: int, last_norm: str | None = None
) -> Tensor:
    """Hidden layers of a product, batch normalization and ReLU; and what follows the last one."""

    def norm(x: Tensor, layer: int) -> Tensor:
        weight, bias = p.get(f"{name}.{layer}.weight"), p.get(f"{name}.{layer}.bias")
        return F.batch_norm(x, None, None, weight, bias, training=True)

    for layer in range(0, 3 * hidden, 3):
        x = norm(x @ p[f"{name}.{layer}.weight"].T, layer + 1).clamp(min=0)
    last = 3 * hidden
    x = x @ p[f"{name}.{last}.weight"].T
    if last_norm is None:
        return x + p[f"{name}.{last}.bias"]
    assert (f"{name}.{last + 1}.weight" in p) == (last_norm == "affine")
    return norm(x, last + 1)


def slow_clip(x: Tensor, y: Tensor, log_scale: Tensor, smoothing: float = 0.0) -> Tensor:
    logits = log_scale.exp() * x @ y.T
    terms = []
    for matrix in (logits, logits.T):
        for i, row in enumerate(matrix):
            target = torch.full((len(row),), smoothing / len(row), dtype=row.dtype)
            target[i] += 1 - smoothing
            terms.append(-(target * torch.log(row.exp() / row.exp().sum())).sum())
    return sum(terms) / len(terms)


def slow_nt_xent(x: Tensor, y: Tensor) -> Tensor:
    rows, terms = torch.cat([x, y]), []
    for i in range(len(rows)):
        weights = {j: torch.exp(rows[i] @ rows[j] / 0.1) for j in range(len(rows)) if j != i}
        positive = (i + len(x)) % len(rows)
        terms.append(-torch.log(weights[positive] / sum(weights.values())))
    return sum(terms) / len(terms)


def slow_barlow(x: Tensor, y: Tensor) -> Tensor:
    total = 0.0
    for i in range(x.shape[1]):
        for j in range(y.shape[1]):
            c = (x[:, i] * y[:, j]).sum() / len(x)
            total = total + ((c - 1) ** 2 if i == j else 0.005 * c**2)
    return 0.025 * total


def slow_assignment(cosines: Tensor) -> Tensor:
    """As published: prototypes by samples, marginals 1/K and 1/B."""
    shares = torch.exp(cosines.detach() / 0.05).T
    shares = shares / shares.sum()
    prototypes, samples = shares.shape
    for _ in range(3):
        shares = shares / shares.sum(1, keepdim=True) / prototypes
        shares = shares / shares.sum(0, keepdim=True) / samples
    return (shares * samples).T


def slow_swapped(images: list[Tensor], texts: list[Tensor], log_scale: Tensor) -> Tensor:
    terms = []
    for a in range(2):
        for b in range(2):
            cosines, other = images[a] @ texts[b].T, images[1 - a] @ texts[1 - b].T
            for matrix, swapped in ((cosines, other), (cosines.T, other.T)):
                for row, target in zip(matrix, slow_assignment(swapped), strict=True):
                    weights = torch.exp(log_scale.exp() * row)
                    terms.append(-(target * torch.log(weights / weights.sum())).sum())
    return sum(terms) / len(terms)


def slow_prototypes(image: Tensor, text: Tensor, prototypes: Tensor) -> Tensor:
    """Of rows and prototypes, all normalized; temperature 0.1."""
    terms = []
    for rows, others in ((image, text), (text, image)):
        targets = slow_assignment(others @ prototypes.T)
        for row, target in zip(rows @ prototypes.T, targets, strict=True):
            weights = torch.exp(row / 0.1)
            terms.append(-(target * torch.log(weights / weights.sum())).sum())
    return sum(terms) / len(terms)


def slow_loss(system: Rocket, batch: Batch, teacher: Rocket | None, options: dict) -> Tensor:
    """The formulas of CLIP-Rocket's and SLIP's losses."""
    term, count = options.get("term"), options.get("strong_views", 2)
    p = dict(system.criterion.named_parameters())
    x = {f"image{i}": system.towers.encode_image(v) for i, v in enumerate(batch["images"])}
    x |= {f"text{i}": system.towers.encode_text(v) for i, v in enumerate(batch["texts"])}

    weak = {m: unit(x[f"{m}0"] @ p[f"heads.{m}.weight"].T) for m in ("image", "text")}
    loss = slow_clip(weak["image"], weak["text"], p["weak_logit_scale"])
    if term == "slip":
        views = [unit(slow_mlp(p, "projector", x[f"image{i}"], 2)) for i in (1, 2)]
        return loss + options.get("term_weight", 1.0) * slow_nt_xent(*views)

    strong: dict[str, list[Tensor]] = {"image": [], "text": []}
    one_head = not options.get("separate_heads", True)
    scale = p["weak_logit_scale"] if one_head else p.get("strong_logit_scale")
    for m, views in strong.items():
        for i in range(1, count + 1):
            rows = x[f"{m}{i}"]
            if one_head:
                views.append(unit(rows @ p[f"heads.{m}.weight"].T))
            else:
                views.append(unit(slow_mlp(p, f"heads.strong_{m}", rows, 2)))
    if count:
        smoothing = options.get("label_smoothing", 0.0)
        local = [slow_clip(a, b, scale, smoothing) for a in strong["image"] for b in strong["text"]]
        loss = (loss + count * sum(local) / count**2) / (1 + count)
    if term is None:
        return loss
    if "prototypes" in options:
        rows = [unit(slow_mlp(p, f"projectors.{m}", x[f"{m}0"], 1)) for m in ("image", "text")]
        return loss + options.get("term_weight", 0.2) * slow_prototypes(
            *rows, unit(p["prototypes.weight"])
        )
    if term == "swalip":
        swapped = slow_swapped(strong["image"], strong["text"], scale)
        return loss + options.get("term_weight", 0.2) * swapped

    own = options.get("separate_projectors", False)
    pairs = [(0, 0)] + [(a, b) for a in range(1, count + 1) for b in range(1, count + 1)]

    def through(p: dict[str, Tensor], heads: str, rows: dict[str, Tensor], *shape: Any) -> dict:
        key = {n: ("strong_" if own and n[-1] != "0" else "") + n[:-1] for n in rows}
        return {n: slow_mlp(p, f"{heads}.{key[n]}", r, *shape) for n, r in rows.items()}

    if term == "barlip":
        z = through(p, "projectors", x, 2, "affine")
        terms = [slow_barlow(z[f"image{a}"], z[f"text{b}"]) for a, b in pairs]
        return loss + options.get("term_weight", 1.0) * sum(terms) / len(terms)
    z = through(p, "projectors", x, 1, "plain")
    predicted = through(p, "predictors", z, 1)
    if teacher is not None:
        q = dict(teacher.criterion.named_parameters())
        x = {f"image{i}": teacher.towers.encode_image(v) for i, v in enumerate(batch["images"])}
        x |= {f"text{i}": teacher.towers.encode_text(v) for i, v in enumerate(batch["texts"])}
        z = through(q, "projectors", x, 1, "plain")
    terms = []
    weight = options.get("term_weight", 1.0)
    for a, b in pairs:
        for one, other in ((f"image{a}", f"text{b}"), (f"text{b}", f"image{a}")):
            cosines = (unit(predicted[one]) * unit(z[other].detach())).sum(1)
            terms.append((2 - 2 * cosines).mean())
    return loss + weight * sum(terms) / len(terms)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The oracle's loss, and its gradient of every parameter that is trained, by case."""
    folder, results = tmp_path_factory.mktemp("oracle"), {}
    for case, options in CASES.items():
        system, teacher = build(case, folder)
        loss = slow_loss(system, views_of(BATCH, system), teacher, options)
        trained = {n: p for n, p in system.named_parameters() if p.requires_grad}
        # none is unused, or this raises
        grads = torch.autograd.grad(loss, list(trained.values()))
        results[case] = {"loss": loss.detach(), **dict(zip(trained, grads, strict=True))}
    return results


def assert_equal(found: Any, expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance, name
    # a loss that nothing depends on would pass
    assert max(v.abs().max() for n, v in expected.items() if n.startswith("criterion.")) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_formulas(
    case: str, expected: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    system, teacher = build(case, tmp_path)
    batch = views_of(BATCH, system)
    assert_equal(loss_and_gradients(system, batch, teacher, backend="reference"), expected[case])


@pytest.mark.dist
@pytest.mark.parametrize("world", SIZES)
def test_several_ranks_give_the_gradients_of_all_rows(
    world: int, expected: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    builds = {case: functools.partial(build, case) for case in (*PAPERS, "prototypes")}
    for case, found in all_on_ranks(tmp_path, SIZES[world], builds, BATCH).items():
        assert_equal(found, expected[case])


@pytest.mark.parametrize("case", ["rocket", "byolip"])
def test_micro_batches_give_the_gradients_of_the_whole_batch(case: str, tmp_path: Path) -> None:
    system, teacher = build(case, tmp_path)
    whole = loss_and_gradients(system, BATCH, teacher)

    def taught(batch: Batch) -> dict[str, Tensor]:
        features = Features() if teacher is None else teacher.features(batch)
        return Outputs(Features(), {}, features).flat()

    system, teacher = build(case, tmp_path)
    loss = accumulate(
        system,
        [rows_of(BATCH, 0, 4), rows_of(BATCH, 4, 5), rows_of(BATCH, 5, ROWS)],
        lambda output: system.loss(output, teacher),
        shared={f"criterion.{name}" for name, _ in system.criterion.named_parameters()},
        constant=taught,
    )
    grads = {n: p.grad for n, p in system.named_parameters() if p.grad is not None}
    assert_equal({"loss": loss, **grads}, whole, tolerance=1e-12)


def evaluated(folder: Path) -> Rocket:
    """In evaluation mode, after running statistics have moved."""
    system = make(folder)
    system.loss(system(BATCH))
    return system.eval()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_encodings_interpolate_the_cosines_of_both_heads(weight: float, tmp_path: Path) -> None:
    system = evaluated(tmp_path)
    heads = system.criterion.heads
    # two strong views went through
    assert heads["strong_image"][1].num_batches_tracked == 2
    system.head_weight.fill_(weight)
    images, texts = BATCH["images"][0], BATCH["texts"][1]
    x, y = system.towers.encode_image(images), system.towers.encode_text(texts)
    weak = unit(heads["image"](x)) @ unit(heads["text"](y)).T
    strong = unit(heads["strong_image"](x)) @ unit(heads["strong_text"](y)).T
    for normalize in (False, True):
        encoded = system.encode_image(images, normalize), system.encode_text(texts, normalize)
        found = encoded[0] @ encoded[1].T
        torch.testing.assert_close(found, weight * weak + (1 - weight) * strong)
        torch.testing.assert_close(system.renormalize(encoded[0]), encoded[0])


@torch.no_grad()
def test_parts_serve_every_weight(tmp_path: Path) -> None:
    system = evaluated(tmp_path)
    image = BATCH["images"][0]
    parts = system.weak_and_strong(system.encode_image(image))
    for weight in (0.0, 0.2, 1.0):
        system.head_weight.fill_(weight)
        torch.testing.assert_close(system.weigh(*parts), system.encode_image(image))


@torch.no_grad()
def test_averages_of_prompts_are_normalized_by_parts(tmp_path: Path) -> None:
    system = evaluated(tmp_path)
    system.head_weight.fill_(0.3)
    prompts = system.encode_text(torch.cat(BATCH["texts"]))
    weak, strong = system.weak_and_strong(prompts)
    mean = system.renormalize(prompts.mean(0, keepdim=True))
    weak, strong = (unit(part.mean(0, keepdim=True)) for part in (weak, strong))
    expected = torch.cat([math.sqrt(0.3) * weak, math.sqrt(0.7) * strong], dim=1)
    torch.testing.assert_close(mean, expected)
    # a plain normalization would weigh the parts by how much the prompts agree
    assert not torch.allclose(mean, unit(prompts.mean(0, keepdim=True)), rtol=1e-3)


@pytest.mark.parametrize("case", ["slip", "plain clip", "one head"])
@torch.no_grad()
def test_without_strong_heads_encodings_are_the_weak_part(case: str, tmp_path: Path) -> None:
    system = make(tmp_path, **CASES[case])
    text = BATCH["texts"][0]
    expected = unit(system.criterion.heads["text"](system.towers.encode_text(text)))
    torch.testing.assert_close(system.encode_text(text), expected)
    torch.testing.assert_close(system.renormalize(3 * expected), expected)
    with pytest.raises(ValueError, match="one part"):
        system.weak_and_strong(expected)


@pytest.mark.parametrize("case", PAPERS)
def test_it_is_saved_whole(case: str, tmp_path: Path) -> None:
    system = make(tmp_path, **CASES[case])
    # running statistics move
    system.train().criterion.heads(system.features(BATCH).views())
    system.head_weight.fill_(0.3)
    torch.save(system.state_dict(), tmp_path / "weights.pt")
    again = make(tmp_path, seed=5, **CASES[case])
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    with torch.no_grad():
        encoded = [s.eval().encode_image(BATCH["images"][0]) for s in (system, again)]
    assert torch.equal(*encoded)
    assert again.head_weight == system.head_weight


def shapes(module: nn.Module) -> list[list[int]]:
    return [list(p.shape) for p in module.parameters()]


def test_sizes_are_the_papers() -> None:
    def at_width(term: str | None) -> Any:
        with torch.device("meta"):
            return Rocket(nn.Module(), 512, head_width=256, term=term).criterion

    rocket = at_width(None)
    assert shapes(rocket.heads["text"]) == [[256, 512]]
    hidden = [[4096, 512], [4096], [4096], [4096, 4096], [4096], [4096]]
    assert shapes(rocket.heads["strong_text"]) == [*hidden, [256, 4096], [256]]
    assert shapes(at_width("slip").projector) == [*hidden, [256, 4096], [256]]
    barlip = [[3000, 512], [3000], [3000], [3000, 3000], [3000], [3000], [8192, 3000]]
    assert shapes(at_width("barlip").projectors["image"]) == [*barlip, [8192], [8192]]
    for term in ("siamlip", "byolip"):
        criterion = at_width(term)
        projector = [[2048, 512], [2048], [2048], [128, 2048]]
        assert shapes(criterion.projectors["image"]) == projector
        predictor = [[2048, 128], [2048], [2048], [128, 2048], [128]]
        assert shapes(criterion.predictors["text"]) == predictor


def test_scales_begin_as_the_papers_and_are_bounded(tmp_path: Path) -> None:
    system = Rocket(tiny_towers(tmp_path), WIDTH, **SMALL)
    names = ("criterion.weak_logit_scale", "criterion.strong_logit_scale")
    for name, temperature in zip(names, (0.07, 0.1), strict=True):
        assert math.isclose(system.get_parameter(name).item(), -math.log(temperature), rel_tol=1e-6)
    assert system.bounds == dict.fromkeys(names, (0, math.log(100)))
    assert math.isclose(system.logit_scale(system.get_parameter), 1 / 0.07, rel_tol=1e-6)
    assert Rocket(tiny_towers(tmp_path), WIDTH, strong_views=0).bounds.keys() == {names[0]}


@pytest.mark.parametrize("objective", PAPERS)
def test_flags_make_the_same_system(objective: str, tmp_path: Path) -> None:
    smoothing = 0.0 if objective in ("swalip", "slip") else 0.1
    # each objective refuses flags that it has no use for
    named = {**SMALL, "label_smoothing": smoothing, "extra_weight": 0.5}
    if objective in ("siamlip", "byolip", "barlip"):
        named["separate_projectors"] = True
    elif objective != "slip":
        named = {name: v for name, v in named.items() if not name.startswith("projector_")}
    if objective == "rocket":
        del named["extra_weight"]
    if objective == "slip":
        del named["head_hidden"]
    options = SystemOptions(objective=objective, **named)
    system = Rocket.of(tiny_towers(tmp_path), WIDTH, options)
    assert (system.image_views, system.text_views) == options.views
    assert system.criterion.label_smoothing == smoothing
    assert system.needs_teacher == (objective == "byolip")
    if objective != "rocket":
        assert system.criterion.term_weight == 0.5
    if objective == "barlip":
        assert shapes(system.criterion.projectors["strong_text"])[0] == [9, WIDTH]
    with pytest.raises(ValueError, match="views of each sample; the batch has 3 and 2"):
        system({"images": BATCH["images"], "texts": BATCH["texts"][:2]})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"term": "moco"}, "term is 'moco'; give None or one of slip, siamlip"),
        ({"strong_views": -1}, "strong_views is -1; give 0 or more"),
        ({"term": "slip", "strong_views": 3}, "strong_views is 3; slip compares 2"),
        ({"term": "swalip", "strong_views": 1}, "strong_views is 1; swalip compares 2"),
        ({"term": "swalip", "prototypes": 4}, "prototypes is 4; .* strong_views=0"),
        ({"term": "barlip", "strong_views": 0, "prototypes": 4}, "prototypes is 4; .* term="),
        ({"term": "swalip", "label_smoothing": 0.1}, "swalip has soft targets"),
        ({"term": "slip", "label_smoothing": 0.1}, "there are none"),
        ({"strong_views": 0, "label_smoothing": 0.1}, "there are none"),
        ({"term": "barlip", "term_weight": 0.0}, "term_weight is 0.0; give a positive"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rocket(nn.Module(), WIDTH, **SMALL, **options)


def test_features_are_weighed_where_they_are(tmp_path: Path) -> None:
    """Of a model on a GPU, evaluation averages features on the CPU; fake tensors have devices."""
    system = make(tmp_path)
    with FakeTensorMode():
        system._buffers["head_weight"] = torch.empty((), device="cuda")
        found = system.renormalize(torch.empty(2, 8))
    assert found.device.type == "cpu" and found.shape == (2, 8)
