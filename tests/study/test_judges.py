"""What scores the runs of studies, on little data and with models whose features are known."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastclip.evaluate.features import embed_images, embed_texts
from fastclip.models.clip import Model, create
from fastclip.models.simclr import SimCLR
from fastclip.study import captions, cifar10, collages, robustness
from fastclip.study.question import Settings
from tests.conftest import jpeg, write_tar
from tests.evaluate.planned import Color, planned_model
from tests.train.conftest import TINY_MODEL

RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)
COLORS = {"red": RED, "green": GREEN, "blue": BLUE}
TEXTS = {f"a photo of a {name}.": color for name, color in COLORS.items()}
# sees red and blue as one another
EXCHANGED = {
    f"a photo of a {name}.": COLORS[other]
    for name, other in zip(COLORS, ("blue", "green", "red"), strict=True)
}


def shard(path: Path, *images: tuple[Color, str]) -> None:
    """Of images of a color, each with its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = []
    for number, (color, name) in enumerate(images):
        members.append((f"{number:04d}.jpg", jpeg(color)))
        members.append((f"{number:04d}.cls", str(list(COLORS).index(name)).encode()))
        members.append((f"{number:04d}.txt", f"a photo of a {name}.".encode()))
    write_tar(path, members)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a study of robustness with two shifts, one of which makes half of the images green."""
    monkeypatch.setattr(cifar10, "HELD_OUT", 2)
    monkeypatch.setattr(robustness, "SHIFTS", ("fog", "snow"))
    data, shifted = tmp_path / "cifar10", tmp_path / "out" / "data" / "test"
    # the first two are not scored: they are none of what they are called
    wrong = ((RED, "blue"), (GREEN, "blue"))
    shard(data / cifar10.TEST, *wrong, (RED, "red"), (RED, "red"), (GREEN, "green"), (BLUE, "blue"))
    (data / "classes.txt").write_text("\n".join(COLORS) + "\n")
    shard(shifted / "fog-3.tar", (RED, "red"), (GREEN, "green"))
    shard(shifted / "snow-3.tar", *((GREEN, name) for name in ("red", "green", "blue", "green")))
    return Settings(tmp_path / "out", data)


def use(monkeypatch: pytest.MonkeyPatch, models: dict[str, Model]) -> None:
    """Make these what a run's checkpoints hold, by name."""
    monkeypatch.setattr(robustness, "load", lambda path: models[path.name])


FIRST = {"accuracy": 1.0, "fog": 1.0, "snow": 0.5, "shifted": 0.75}
SECOND = {"accuracy": 0.25, "fog": 0.5, "snow": 0.5, "shifted": 0.5}


def test_robustness_is_the_mean_over_the_shifts(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, {"run": planned_model(TEXTS)})
    scores, chance = robustness._judge(settings)(Path("run"))
    assert scores == FIRST and chance == {"accuracy": 0.1, "shifted": 0.1}


def test_the_lines_runs_are_scored_at_each_epoch(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"epoch_1.pt": planned_model(EXCHANGED), "epoch_4.pt": planned_model(TEXTS)}
    use(monkeypatch, models)
    scores, _ = robustness._judge_epochs(settings, (1, 4))(Path("run"))
    # without a number those of the last
    by_epoch = {
        f"{epoch}/{name}": score
        for epoch, own in ((1, SECOND), (4, FIRST))
        for name, score in own.items()
    }
    assert scores == {**FIRST, **by_epoch}


def test_a_model_without_classes_has_no_scores(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    simclr = SimCLR.__new__(SimCLR)
    nn.Module.__init__(simclr)
    use(monkeypatch, {"run": planned_model(TEXTS)._replace(model=simclr)})
    assert robustness._judge(settings)(Path("run")) == ({}, {})


def test_what_is_corrupted_already_is_kept(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(robustness, "corrupt_shards", lambda *given: asked.append(given))
    data, folder = settings.data, settings.folder / "data"
    assert data is not None
    robustness._prepare(settings)
    train = [(f"train-{2 + i:05d}", kind) for i, kind in enumerate(robustness.TRAINED_KINDS)]
    # both shifts are there
    assert asked == [
        (str(data / f"{name}.tar"), folder / "train", [kind], 3, None) for name, kind in train
    ]
    asked.clear()
    (folder / "test" / "fog-3.tar").unlink()
    for _, kind in train:
        shard(folder / "train" / f"{kind}-3.tar", (RED, "red"))
    robustness._prepare(settings)
    photos = robustness.PHOTOS
    assert asked == [(str(data / cifar10.TEST), folder / "test", ["fog"], 3, photos)]


def recall_at_1(images: Tensor, texts: Tensor, captions: Sequence[str]) -> float:
    """The share of the distinct captions whose best image is one of theirs, ties against them."""
    distinct, hits = dict.fromkeys(captions), 0
    for text in distinct:
        scores = images @ texts[captions.index(text)]
        own = torch.tensor([caption == text for caption in captions])
        hits += bool(scores[own].max() > scores[~own].max())
    return hits / len(distinct)


def test_captions_are_judged_by_composition_and_recall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions, "COLLAGES", 12)
    for module in (captions, collages):
        monkeypatch.setattr(module, "COMPOSED", 40)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    torch.manual_seed(0)
    model = create(str(tmp_path / "tiny.json"))
    monkeypatch.setattr(captions, "load", lambda path: model)
    scores, chance = captions._judge(Settings(tmp_path))(tmp_path)

    for split, name in (("val", "composition"), ("compositional", "held_out")):
        images = embed_images(model, collages.open_collages(None, split, 40)).features
        texts, cases = collages.composition_cases(None, split)
        features = embed_texts(model, texts)
        right: dict[str, list[bool]] = {}
        for image, false, kind in cases:
            true, other = (float(images[image] @ features[row]) for row in (image, false))
            right.setdefault(kind, []).append(true > other)
        assert right.keys() == {"noun", "place", "order"}
        for kind, own in right.items():
            assert scores[f"{name}_{kind}"] == pytest.approx(fmean(own))
        # a noun takes no composition
        mean = fmean(fmean(right[kind]) for kind in ("place", "order"))
        assert scores[name] == pytest.approx(mean)

    for quality in ("short", "dense"):
        source = collages.open_collages(None, "val", 12, (quality,))
        own = [source.read(0, index).texts[0] for index in range(12)]
        images = embed_images(model, source).features
        found = recall_at_1(images, embed_texts(model, own), own)
        assert scores[f"{quality}_recall"] == pytest.approx(found)
        assert chance[f"{quality}_recall"] == pytest.approx(1 / 12, rel=0.5)
    others = [name for name in scores if not name.endswith("_recall")]
    assert {chance[name] for name in others} == {0.5} and chance.keys() == scores.keys()
    assert set(captions.COLUMNS) <= set(scores)
