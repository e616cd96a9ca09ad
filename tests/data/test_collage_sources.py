"""Where collages get their photographs: shards, folders, drawn shapes; and what is refused."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image

from fastclip.cli.eval.retrieval import Retrieval
from fastclip.data import collages as C
from fastclip.data import shards
from fastclip.data.collages.source import COLLAGE_PIXELS
from fastclip.data.index import ShardIndex
from fastclip.data.options import DataOptions, parse_sources
from fastclip.data.samples import UnreadableSample
from fastclip.data.scenes import SHAPES
from fastclip.data.sources import collage_classes, guess_type, open_photographs, open_source
from fastclip.evaluate.zeroshot import classes_of
from tests.conftest import jpeg, write_tar
from tests.data.collages import CLASSES, PLACES, write_photographs


def opened(data: str, split: str = "train", **options: object) -> C.CollageSource:
    source = open_source(data, split=split, **options)
    assert isinstance(source, C.CollageSource)
    return source


def labeled_shard(path: Path, count: int = 40, classes: str | None = "\n".join(CLASSES)) -> Path:
    """A shard of photographs with their classes, whose names lie beside it."""
    members = []
    for index in range(count):
        label = index % len(CLASSES)
        members.append((f"{index:04}.jpg", jpeg((20 * label, 200, 50))))
        members.append((f"{index:04}.cls", b"%d" % label))
    if classes is not None:
        (path.parent / "classes.txt").write_text(classes)
    return write_tar(path, members)


def drawn_from(photographs: C.Photographs) -> int:
    """From how many photographs all classes and splits draw."""
    splits = ("train", "val", "test")
    return sum(len(each[split]) for each in photographs._numbers.values() for split in splits)


def test_collages_are_the_same_in_any_process(tmp_path: Path) -> None:
    data = f"collages:split=val,photos={write_photographs(tmp_path / 'photos', each=10)}"
    code = (
        "import hashlib, json, sys\n"
        "from fastclip.data.sources import open_source\n"
        "source = open_source(sys.argv[1], split='train', negatives=True)\n"
        "found = [source.read(0, index) for index in range(6)]\n"
        "images = [hashlib.sha256(sample.image.tobytes()).hexdigest() for sample in found]\n"
        "texts = [(s.key, *s.texts, *s.negatives) for s in found]\n"
        "print(json.dumps([images, texts, source.digest()]))"
    )
    root = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", code, data],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    source = open_source(data, split="train", negatives=True)
    found = [source.read(0, index) for index in range(6)]
    images = [hashlib.sha256(sample.image.tobytes()).hexdigest() for sample in found]
    texts = [[s.key, *s.texts, *s.negatives] for s in found]
    assert json.loads(run.stdout) == [images, texts, source.digest()]
    a, b = (opened(data, count=number).read(0, 3) for number in (10, 5000))
    assert (a.key, a.texts) == (b.key, b.texts) and a.image.tobytes() == b.image.tobytes()


def test_shards_with_classes_beside_them(tmp_path: Path) -> None:
    labeled_shard(tmp_path / "a,b-0.tar", 33)
    labeled_shard(tmp_path / "a,b-1.tar", 27)
    data = f"collages:objects=2,photos={tmp_path}/a,b-{{0..1}}.tar"
    source = opened(data, "val", count=50)
    assert source.pictures.classes == CLASSES and collage_classes(data) == list(CLASSES)
    for index in range(20):
        image = np.asarray(source.read(0, index).image).astype(int)
        for photo in source.collage(index).photos:
            row, column = divmod(PLACES.index(photo.place), 2)
            color = image[32 * row + 16, 32 * column + 16]
            # a JPEG's
            assert abs(color - (20 * CLASSES.index(photo.name), 200, 50)).max() <= 6
    assert source.digest() == opened(data, "val", count=50).digest()
    assert source.digest() != opened(data, "val", count=51).digest()
    labeled_shard(tmp_path / "a,b-0.tar", 34)
    assert source.digest() != opened(data, "val", count=50).digest()


def test_no_shard_is_walked_through_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs are drawn from all shards, whatever their number."""
    monkeypatch.setattr(shards, "DEFAULT_WINDOW", 1)
    monkeypatch.setattr(shards, "INDEX_CACHE_SAMPLES", 1)
    walked: list[str] = []
    walk = shards.index_file

    def noted(file: BinaryIO, name: str, required: tuple[str, ...]) -> ShardIndex:
        walked.append(name)
        return walk(file, name, required)

    for number in range(4):
        labeled_shard(tmp_path / f"{number}.tar")
    (tmp_path / "sizes.json").write_text(json.dumps({f"{i}.tar": 40 for i in range(4)}))
    monkeypatch.setattr(shards, "index_file", noted)
    source = opened(f"collages:photos={tmp_path}/{{0..3}}.tar", count=50)
    for index in range(20):
        source.read(0, index)
    assert sorted(walked) == [f"{tmp_path}/{i}.tar" for i in range(4)]


def test_samples_without_a_usable_class_are_left_out(tmp_path: Path) -> None:
    labeled_shard(tmp_path / "0.tar", 40)
    members = [("x.jpg", jpeg()), ("y.jpg", jpeg()), ("y.cls", b"a dog"), ("z.cls", b"1")]
    write_tar(tmp_path / "1.tar", members)
    data = f"{tmp_path}/{{0..1}}.tar"
    photographs = open_photographs(data)
    assert sum(photographs.source.counts) == 42 and drawn_from(photographs) == 40
    # what is beyond the declared number is not of the next shard
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 35, "1.tar": 2}))
    assert drawn_from(open_photographs(data)) == 35


def test_a_damaged_photograph_is_named(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "photos", each=3)
    for path in (folder / "cat").iterdir():
        path.write_bytes(b"no image")
    source = opened(f"collages:objects=4,photos={folder}", count=100)
    damaged = {i for i in range(40) if "cat" in {photo.name for photo in source.collage(i).photos}}
    assert 0 < len(damaged) < 40
    for index in range(40):
        if index not in damaged:
            source.read(0, index)
            continue
        with pytest.raises(UnreadableSample, match=r"corrupt image: .*photos:cat/00\d.png"):
            source.read(0, index)


def test_photographs_of_any_size_fill_their_place(tmp_path: Path) -> None:
    image = Image.new("RGB", (120, 60))
    image.paste((250, 10, 10), (30, 0, 90, 60))
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            image.save(tmp_path / name / f"{number}.png")
    sample = opened(f"collages:objects=1,photos={tmp_path}", count=5).read(0, 0)
    # the square about the middle
    red = (np.asarray(sample.image) == (250, 10, 10)).all(axis=2)
    # but for what is blended at its edge
    assert 28 * 32 <= red.sum() <= 32 * 32


def test_names_of_sources() -> None:
    assert guess_type("collages") == guess_type("collages:photos=/a/{0..3}.tar") == "collages"
    assert opened("collages").counts == (20_000,)
    assert opened("collages:split=test", "val").counts == (1000,)
    both = open_source("collages::collages:objects=1", split="train", count=7)
    assert both.counts == (7, 7)
    sample = opened("collages:caption=alt,split=test").read(0, 3)
    assert sample.key == "test00000003"
    expected = C.CollageSource(None, "test", 1, quality="alt").read(0, 3)
    assert sample.texts == expected.texts and sample.image == expected.image
    options = DataOptions("collages", captions="dense=1,short=2")
    assert set(opened("collages", options=options).read(0, 0).captions) == {"dense", "short"}
    # results and metrics are not called by the photographs
    data = "collages:split=val,photos=/data/x-{0..3}.tar"
    assert parse_sources([data], "--retrieval-data") == {"collages": data}
    assert Retrieval(model="m", data=data).name == "retrieval_collages:split=val"


def test_without_photographs_shapes_are_drawn() -> None:
    assert classes_of("collages") == (list(SHAPES), ["a photo of a {}."])
    source = opened("collages:objects=1", "val", count=100)
    for index in range(20):
        sample = source.read(0, index)
        assert sample.image.size == (COLLAGE_PIXELS, COLLAGE_PIXELS) and sample.label is not None
        assert re.findall("|".join(SHAPES), sample.texts[0]) == [SHAPES[sample.label]]
        empty = (np.asarray(sample.image) == 128).all(axis=2)
        assert 3 * 32 * 32 <= empty.sum() < 64 * 64
    shapes = C.Shapes()
    train, val = (shapes.picture("circle", split, 5) for split in ("train", "val"))
    assert train.size == (32, 32)
    assert train != val and train == C.Shapes().picture("circle", "train", 5)
    middles = [shapes.picture("circle", "train", draw).convert("HSV") for draw in range(60)]
    hues = np.array([np.asarray(each)[16, 16, 0] for each in middles])
    assert len(np.unique(hues // 32)) >= 5


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("color=red", "unknown key 'color'; known are split, caption, objects, photos"),
        ("objects=5", "unknown objects '5'; known are 1, 2, 3, 4"),
        ("split=dev", "unknown split 'dev'; known are train"),
        ("caption=long", "unknown caption 'long'; known are short, alt, dense"),
        ("objects=1,objects=2", "gives objects twice"),
        ("photos=/a,split=val", "photos= takes the rest of the text, and split= follows it; give"),
        ("photos=/a,photos=/b", "and photos= follows it; give photos= once, as the last key"),
        ("split=val,photos=", "photos= is empty; leave it out, or name data"),
        ("photos=scenes", "photos=scenes: .* of type scenes; give shards with a class index"),
        ("photos=/nowhere/at/all", "these data are of no known type; give shards"),
        ("photos=pipe:cat a.tar", "would run a command"),
    ],
)
def test_unknown_variants(variant: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(f"collages:{variant}", split="train")


def test_photographs_that_cannot_be_used(tmp_path: Path) -> None:
    shard = labeled_shard(tmp_path / "0.tar", classes=None)
    data = f"collages:photos={shard}"

    def refused(message: str, classes: tuple[str, ...] = CLASSES, **options: int) -> None:
        labeled_shard(shard, classes="\n".join(classes), **options)
        with pytest.raises(ValueError, match=message):
            opened(data)

    with pytest.raises(ValueError, match=r"no class names; put classes\.txt beside the shards"):
        opened(data)
    refused("has label 9, the 9 classes are 0..8; name all classes in their order", CLASSES[:9])
    refused("two classes are called 'dog'; give each a name", (*CLASSES[:9], "dog, hound"))
    refused("class 9 is called ''; give it a name", (*CLASSES[:9], ", a"))
    refused("class 'truck' has 2 photographs; collages need at least 3 of each", count=29)
    write_tar(shard, [("x.jpg", jpeg()), ("x.txt", b"a dog")])
    with pytest.raises(ValueError, match=r"0.tar has no classes; .*class index \(KEY.cls\) each"):
        opened(data)
    with pytest.raises(FileNotFoundError, match="1 of 1 shards do not exist"):
        opened(f"collages:photos={tmp_path}/1.tar")


def test_too_few_classes_and_unknown_captions(tmp_path: Path) -> None:
    few = write_photographs(tmp_path / "few", CLASSES[:4], each=3)
    opened(f"collages:photos={few}").read(0, 0)
    with pytest.raises(ValueError, match=r"4 classes are too few for collages of 4 .*at least 5"):
        opened(f"collages:objects=4,photos={few}")
    with pytest.raises(ValueError, match="collages have no captions called 'txt'; they have short"):
        opened("collages", options=DataOptions(captions="txt=1"))


def test_cifar10(real_data: Path) -> None:
    """The photographs of a collage are the data's own, pixel for pixel."""
    pattern = str(real_data / "cifar10" / "val-00000.tar")
    original = open_source(pattern, split="val", required=("cls",))
    # some of them, as decoding all takes seconds
    samples = [original.read(0, index) for index in range(0, original.counts[0], 10)]
    labels = {sample.image.tobytes(): sample.label for sample in samples}
    source = opened(f"collages:photos={pattern}", "train", count=200)
    found = []
    for index in range(200):
        sample = source.read(0, index)
        for photo in source.collage(index).photos:
            row, column = divmod(PLACES.index(photo.place), 2)
            tile = sample.image.crop((32 * column, 32 * row, 32 * column + 32, 32 * row + 32))
            if tile.tobytes() in labels:
                found.append((labels[tile.tobytes()], CLASSES.index(photo.name)))
    # a tenth of 500
    assert len(found) > 25 and all(label == own for label, own in found)
