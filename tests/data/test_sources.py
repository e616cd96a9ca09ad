"""What the text of `--train-data` means."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastclip.data.options import DataOptions
from fastclip.data.order import Order, hash64
from fastclip.data.samples import Source
from fastclip.data.scenes import caption, class_index, render, sample_scene
from fastclip.data.scenes.source import SCENE_PIXELS
from fastclip.data.sources import guess_type, open_source, shard_weights
from tests.conftest import jpeg

MakeShard = Callable[..., Path]


def opened(data: str, **options: int) -> Source:
    return open_source(data, split="train", **options)


@pytest.mark.parametrize(
    "data, kind",
    [
        ("scenes", "scenes"),
        ("scenes:caption=alt", "scenes"),
        ("synthetic", "synthetic"),
        ("/d/{000..041}.tar", "webdataset"),
        ("/d/0.tar::s3://b/{0..9}", "webdataset"),
        ("/d/0.tar.gz", "webdataset"),
        ("a.CSV::b.tsv::c.txt", "csv"),
        ("captions.json", "coco"),
        ("/nowhere/at/all", None),
    ],
)
def test_the_name_decides_the_type(data: str, kind: str | None) -> None:
    assert guess_type(data) == kind


def test_what_cannot_be_recognized_or_mixed(tmp_path: Path, make_shard: MakeShard) -> None:
    shard = make_shard()
    with pytest.raises(
        ValueError, match=r"cannot recognize '/nowhere/x' as data: .*--dataset-type"
    ):
        opened("/nowhere/x")
    with pytest.raises(ValueError, match=r"folder without CLASS/.*name them, e.g. .*00009"):
        opened(str(tmp_path))
    with pytest.raises(ValueError, match=r"one type, but .*tar' is webdataset, 'b.csv' is csv"):
        opened(f"{shard}::b.csv")
    with pytest.raises(ValueError, match=r"folder without CLASS/"):
        open_source(str(tmp_path), DataOptions("webdataset"), split="train")
    # the type wins over the text
    (tmp_path / "c" / "d").mkdir(parents=True)
    (tmp_path / "c" / "d" / "0.jpg").write_bytes(jpeg())
    (tmp_path / "table").write_text("filepath\ttitle\nc/d/0.jpg\tt\n")
    source = open_source(str(tmp_path / "table"), DataOptions("csv"), split="train")
    assert source.read(0, 0).texts == ("t",)
    assert guess_type(f"{tmp_path}/c") == "imagefolder"


def test_scenes_have_variants() -> None:
    source = opened("scenes:split=compositional,shift=style,caption=dense,objects=1", count=7)
    scene = sample_scene(3, split="compositional", shift="style", objects=1)
    sample = source.read(0, 3)
    assert source.counts == (7,)
    assert sample.label == class_index(scene) is not None
    assert sample.texts == (caption(scene, "dense", seed=hash64(3)),)
    assert sample.key == "compositional00000003"
    assert opened("scenes:", count=1).read(0, 0).texts == opened("scenes").read(0, 0).texts
    assert opened("scenes").counts == (20_000,)
    assert open_source("scenes", split="val").counts == (1000,)
    a, b = (opened(f"scenes{o}").read(0, 5) for o in ("", ":shift=palette"))
    assert not np.array_equal(np.asarray(a.image), np.asarray(b.image))


def test_of_several_shifts_a_scene_has_one_or_none() -> None:
    source = opened("scenes:shift=style+palette", count=60)
    found = []
    for i in range(60):
        image = np.asarray(source.read(0, i).image)
        kinds = [None, "style", "palette"]
        alike = [np.array_equal(image, np.asarray(draw(i, kind))) for kind in kinds]
        found.append(alike.index(True))
    assert {found.count(kind) > 10 for kind in range(3)} == {True}


def draw(index: int, shift: str | None) -> Image.Image:
    """The scene, drawn apart from the source."""
    return render(sample_scene(index, shift=shift), SCENE_PIXELS)


@pytest.mark.parametrize(
    "data, message",
    [
        ("scenes:color=red", "unknown key 'color'; known are split, shift, caption, objects"),
        ("scenes:shift=weather", "unknown shift 'weather'; known are style, palette"),
        ("scenes:shift=style+", "unknown shift ''; known are style, palette"),
        ("scenes:objects=4", "unknown objects '4'; known are 1, 2, 3"),
        ("scenes:caption", "unknown caption ''; known are short, alt, dense"),
        ("scenes:split=val,split=val", "gives split twice"),
    ],
)
def test_unknown_variants(data: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(data)


def test_synthetic_samples_are_distinct_and_the_same_each_time() -> None:
    source, again = opened("synthetic"), opened("synthetic", count=30)
    assert source.counts == (1000,) and again.counts == (30,)
    samples = [again.read(0, i) for i in range(30)]
    assert len({sample.texts for sample in samples}) == 30
    assert len({sample.image.tobytes() for sample in samples}) == 30
    assert samples[4].image.tobytes() == source.read(0, 4).image.tobytes()
    assert samples[4].image.size == (224, 224)
    held_out = open_source("synthetic", split="val").read(0, 4)
    assert held_out.image.tobytes() != samples[4].image.tobytes()


def test_upsampling_factors(make_shard: MakeShard, tmp_path: Path) -> None:
    for name in ("a-0.tar", "a-1.tar", "b.tar"):
        make_shard(name)
    source = opened(f"{tmp_path}/a-{{0..1}}.tar::{tmp_path}/b.tar")
    assert shard_weights(source, None) is None
    weights = shard_weights(source, "1::2.5")
    assert weights == (1, 1, 2.5)
    assert len(Order(source.counts, 0, weights=weights)) == 8 + 8 + 20
    for factors, message in {
        "1": "has 1 factors for the 2 patterns",
        "1::2::3": "has 3 factors for the 2 patterns",
        "1::x": "give numbers joined by '::'",
        "1::0": "give positive numbers",
        "1::nan": "give positive numbers",
        "1::inf": "give positive numbers",
    }.items():
        with pytest.raises(ValueError, match=message):
            shard_weights(source, factors)
    tables = opened("scenes::scenes:caption=dense", count=10)
    assert shard_weights(tables, "1::2") == (1, 2)
    with pytest.raises(ValueError, match="only shards take fractions"):
        shard_weights(tables, "1::2.5")
