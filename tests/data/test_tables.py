"""Tables and folders of image files: what is read, and what is said of bad ones."""

import csv
import gc
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastclip.data.augment import Augmentation
from fastclip.data.files import STRETCH
from fastclip.data.folders import FolderSource
from fastclip.data.loader import TrainingLoader
from fastclip.data.options import DataOptions
from fastclip.data.order import Order
from fastclip.data.samples import Sample, Source, UnreadableSample
from fastclip.data.sources import open_source
from fastclip.data.strings import Strings
from fastclip.data.tables import TableSource, open_coco, open_csv
from fastclip.data.training_samples import TrainingSamples
from fastclip.evaluate.zeroshot import classes_of
from tests.conftest import jpeg


def read_all(source: Source) -> list[Sample]:
    return [
        source.read(*Order(source.counts, 0, window=0).locate(0, i)) for i in range(len_(source))
    ]


def len_(source: Source) -> int:
    return sum(source.counts)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 0.jpg to 4.jpg of different colors."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.jpg").write_bytes(jpeg((40 * i, 0, 0)))
    return folder


def table(path: Path, *rows: str, header: str = "filepath\ttitle") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_rows_of_one_image_are_its_captions(images: Path) -> None:
    path = table(
        images / "t.csv", "1.jpg\tone", "0.jpg\tzero", f"{images}/2.jpg\ttwo", "1.jpg\t uno "
    )
    source = open_source(str(path), split="train")
    samples = read_all(source)
    assert [sample.key for sample in samples] == ["1.jpg", "0.jpg", f"{images}/2.jpg"]
    assert [sample.texts for sample in samples] == [("one", "uno"), ("zero",), ("two",)]
    assert [sample.image.getpixel((5, 5))[0] // 10 for sample in samples] == [4, 0, 8]


def test_captions_keep_the_order_of_rows(images: Path) -> None:
    rows = [f"{i * i % 5}.jpg\t{i}" for i in range(3000)]
    source = open_csv(table(images / "t.csv", *rows), DataOptions())
    assert source.count == 3
    for number in range(3):
        texts = [int(text) for text in source.texts_of(number)]
        assert texts == sorted(texts)
        assert {i * i % 5 for i in texts} == {int(source.path_of(number)[0])}


def test_relative_paths_begin_at_the_table_then_here(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "0.jpg").write_bytes(jpeg((250, 250, 250)))
    (here / "9.jpg").write_bytes(jpeg((250, 250, 250)))
    monkeypatch.chdir(here)
    path = table(images / "t.tsv", "0.jpg\ta", "9.jpg\tb")
    dark, bright = read_all(open_csv(path, DataOptions()))
    assert dark.image.getpixel((0, 0))[0] < 20 and bright.image.getpixel((0, 0))[0] > 240
    # a root is the only place looked at
    rooted = open_csv(path, DataOptions(image_root=here))
    assert all(sample.image.getpixel((0, 0))[0] > 240 for sample in read_all(rooted))


def test_columns_and_separators(images: Path, logged: Callable[[], str]) -> None:
    path = table(images / "t.csv", '0.jpg,7,"a, b"', header="\ufefffilepath,id,title")
    assert read_all(open_csv(path, DataOptions()))[0].texts == ("a, b",)
    # what the name says already is not said again
    assert logged() == ""
    other = path.rename(path.with_suffix(".tsv"))
    assert read_all(open_csv(other, DataOptions()))[0].texts == ("a, b",)
    assert logged() == f"note: {other} is separated by ',', not '\\t'\n"
    path = other.rename(path)
    open_csv(path, DataOptions(csv_separator=";"))
    assert logged() == f"note: {path} is separated by ',', not ';'\n"
    options = DataOptions(csv_separator=",", csv_caption_key="id")
    assert read_all(open_csv(path, options))[0].texts == ("7",)
    assert DataOptions(csv_separator="\\t") == DataOptions()
    with pytest.raises(ValueError, match=r"no column 'text'.*\['filepath', 'id', 'title'\]"):
        open_csv(path, DataOptions(csv_separator=",", csv_caption_key="text"))
    # the message has the columns as --csv-separator splits them
    with pytest.raises(ValueError, match=r"no column 'text'.*separator ',' it has \['filepath', "):
        open_csv(path, DataOptions(csv_caption_key="text"))
    with pytest.raises(ValueError, match="csv-separator is ', '; give one character"):
        DataOptions(csv_separator=", ")


def test_rows_without_a_caption_are_left_out_with_a_note(
    images: Path, logged: Callable[[], str]
) -> None:
    path = table(images / "t.csv", "0.jpg\ta", "", "1.jpg", "2.jpg\t  ", "\tb", "3.jpg\tc")
    assert [s.texts for s in read_all(open_csv(path, DataOptions()))] == [("a",), ("c",)]
    assert "3 rows without path or caption left out" in logged()


@pytest.mark.parametrize("last", ["", '4.jpg\t"more'], ids=["once", "twice"])
def test_a_caption_that_begins_with_a_quotation_mark_swallows_no_rows(
    images: Path, last: str
) -> None:
    path = table(images / "t.csv", "0.jpg\ta", '1.jpg\t"b', "2.jpg\tc", "3.jpg\td", last)
    with pytest.raises(ValueError, match=r"line 3: .*look for a quotation mark .*never closed"):
        open_csv(path, DataOptions())


def test_a_closed_field_over_several_lines_is_one_row_and_noted(
    images: Path, logged: Callable[[], str]
) -> None:
    path = table(images / "t.csv", "0.jpg\ta", '1.jpg\t"b', '2.jpg\tc"', '3.jpg\t"two\nlines"')
    source = open_csv(path, DataOptions())
    assert [s.texts for s in read_all(source)] == [("a",), ("b\n2.jpg\tc",), ("two\nlines",)]
    assert "1 rows have a field over several lines" in (printed := logged())
    assert "line 3" in printed


def test_a_comma_outside_quotation_marks_cuts_no_caption(images: Path) -> None:
    path = table(images / "t.csv", "0.jpg,a", "1.jpg,a dog, not a cat", header="filepath,title")
    with pytest.raises(ValueError, match=r"line 3: 3 fields where the header has 2; .*quotation"):
        open_csv(path, DataOptions())


def test_rows_narrower_than_the_header_are_left_out(
    images: Path, logged: Callable[[], str]
) -> None:
    header = "filepath\ttitle\turl"
    path = table(images / "t.csv", "0.jpg\ta\tu", "1.jpg\tu", "2.jpg\tb\tu", header=header)
    assert [s.texts for s in read_all(open_csv(path, DataOptions()))] == [("a",), ("b",)]
    assert "1 rows with fewer fields than the header left out" in logged()


def test_a_long_caption_costs_its_row_only(images: Path, logged: Callable[[], str]) -> None:
    long, limit = "x" * 200_000, csv.field_size_limit()
    rows = f"0.jpg\t{long}", "1.jpg\t" + "é" * (1 << 19) + "!", "2.jpg\tc"
    assert [s.texts for s in read_all(open_csv(table(images / "t.csv", *rows), DataOptions()))] == [
        (long,),
        ("c",),
    ]
    assert "1 rows with a caption over 1,048,576 bytes left out" in logged()
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no column 'filepath'"),
        (b"filepath\ttitle\n", "holds no sample"),
        (b"filepath\ttitle\n0.jpg\tcaf\xe9\n", "not UTF-8"),
        (b'filepath\ttitle\n0.jpg\t"' + b"x" * 200_000, "line 2: .*never closed"),
        (b"filepath\ttitle\n0.jpg\t" + b"x" * (17 << 20), "line 2: a line of over 16,777,216"),
        ("filepath\ttitle\n0.jpg\ta\n".encode("utf-16"), "is UTF-16, not UTF-8"),
    ],
    ids=["empty", "no rows", "latin", "quote", "endless line", "utf-16"],
)
def test_files_that_are_no_tables(images: Path, content: bytes, message: str) -> None:
    (images / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_csv(images / "t.csv", DataOptions())


def test_images_that_are_not_there_at_all(images: Path) -> None:
    path = table(images / "t.csv", *(f"x/{i}.jpg\tt" for i in range(300)))
    with pytest.raises(
        FileNotFoundError, match=r"none of 100 images .*'x/0.jpg'.*--image-root"
    ) as e:
        open_csv(path, DataOptions())
    assert str(images) in str(e.value) and os.getcwd() in str(e.value)
    table(path, "https://a.b/c.jpg\tt")
    with pytest.raises(FileNotFoundError, match="is a URL; fetch the images first"):
        open_csv(path, DataOptions())
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv does not exist"):
        open_source("nowhere.csv", split="train")
    with pytest.raises(ValueError, match="is a URL; tables are read from local files"):
        open_source("s3://b/t.csv", split="train")


def test_unreadable_images_are_faults_and_replaced(images: Path) -> None:
    (images / "broken.jpg").write_bytes(jpeg()[:200])
    (images / "folder.jpg").mkdir()
    os.mkfifo(images / "pipe.jpg")
    bad = {
        "gone.jpg": "missing image file",
        "broken.jpg": "corrupt image",
        "folder.jpg": "image path is not a file",
        "pipe.jpg": "image path is not a file",
        "a\0b.jpg": "missing image file",
        "x" * 5000: "missing image file",
    }
    good = [f"{i % 5}.jpg" for i in range(20)]
    path = table(images / "t.csv", *(f"{name}\tt" for name in [*good, *bad]))
    source = open_csv(path, DataOptions())
    for number, kind in enumerate(bad.values(), start=5):
        with pytest.raises(UnreadableSample, match=kind):
            source.read(0, number)
    augmentation = Augmentation(8)
    samples = TrainingSamples(
        source, Order(source.counts, 0), augmentation, lambda texts: torch.zeros(len(texts), 2)
    )
    batches = list(TrainingLoader(samples, 11).batches(0))
    assert [len(batch["key"]) for batch in batches] == [11]
    assert set(batches[0]["key"]) <= set(good)
    kinds = Counter(fault.kind for fault in set(batches[0]["faults"]))
    assert kinds == {"missing image file": 3, "corrupt image": 1, "image path is not a file": 2}


def test_a_table_longer_than_a_window_is_shuffled_all_over(images: Path) -> None:
    """A window takes its rows from everywhere, though it never holds the whole table."""
    rows = (f"{images}/{i % 5}.jpg#{i}\tt" for i in range(100 * STRETCH + 3))
    (images / "0.jpg#0").write_bytes(jpeg())
    source = open_csv(table(images / "t.csv", *rows), DataOptions())
    assert len_(source) == 100 * STRETCH + 3
    order = Order(source.counts, 0, window=20 * STRETCH)
    shards = [shard for shard, _ in (order.locate(0, i) for i in range(20 * STRETCH))]
    assert min(shards) < 20 and max(shards) > 80
    with pytest.raises(UnreadableSample, match=f"#{3 * STRETCH + 2}$"):
        source.read(3, 2)
    assert source.path_of(100 * STRETCH + 2).endswith(f"#{100 * STRETCH + 2}")


def coco(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(content))
    return path


def some_captions() -> dict:
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (3, 1, 2)],
        "annotations": [
            {"image_id": 1, "caption": "one"},
            {"image_id": 3, "caption": "three "},
            {"image_id": 1, "caption": "uno"},
            {"image_id": 77, "caption": "of no image"},
            {"image_id": 1, "caption": "\ud800"},
        ],
    }


def test_coco_captions(images: Path, logged: Callable[[], str]) -> None:
    (images.parent / "val2017").symlink_to(images)
    path = coco(images.parent / "annotations", "captions_val2017.json", some_captions())
    samples = read_all(open_source(str(path), split="train"))
    assert [(s.key, s.texts) for s in samples] == [
        ("3.jpg", ("three",)),
        ("1.jpg", ("one", "uno")),
    ]
    noted = logged()
    assert "1 images without captions left out" in noted
    assert "2 captions without text or of unknown images left out" in noted
    # another name gives no folder: the file's own is taken, or the one given
    path = path.rename(path.with_name("captions.json"))
    with pytest.raises(
        FileNotFoundError, match=r"none of 2 images.*annotations; give --image-root"
    ):
        open_coco(path, DataOptions())
    assert len(read_all(open_coco(path, DataOptions(image_root=images)))) == 2
    assert len(read_all(open_coco(path.rename(images / "c.json"), DataOptions()))) == 2


@pytest.mark.parametrize(
    "content, message",
    [
        ({"images": []}, "it has no 'annotations'"),
        ({"images": [{"id": 1}], "annotations": []}, "it has no 'file_name'"),
        ({"images": [], "annotations": [{"image_id": 1, "bbox": []}]}, "it has no 'caption'"),
        ({"images": [], "annotations": []}, "holds no sample"),
        ([1, 2], "holds no COCO captions"),
        ({"images": [{"id": 1, "file_name": "\ud800"}], "annotations": []}, "c.json holds no COCO"),
    ],
    ids=["no annotations", "no names", "instances", "nothing", "a list", "half a pair"],
)
def test_files_that_are_no_coco(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_coco(coco(tmp_path, "c.json", content), DataOptions())
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ValueError, match="holds no COCO captions"):
        open_coco(tmp_path / "c.json", DataOptions())


def test_deep_json_is_no_coco(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("[" * 300_000)
    with pytest.raises(ValueError, match=r"c\.json holds no COCO captions"):
        open_coco(tmp_path / "c.json", DataOptions())


def test_folders_are_classes(tmp_path: Path) -> None:
    for name, files in {"dog": ["b.JPG", "a.png"], "cat": ["x.jpeg"], "ant": []}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for file in [*files, "notes.md", ".hidden.jpg"]:
            (tmp_path / "data" / name / file).write_bytes(jpeg())
    (tmp_path / "data" / ".cache").mkdir()
    (tmp_path / "t.txt").write_text("\ufeffa {}.\n\nmy {c}\n")
    options = DataOptions(templates=tmp_path / "t.txt")
    samples = read_all(open_source(f"{tmp_path}/data", options, split="train"))
    assert [(s.key, s.texts, s.label) for s in samples] == [
        ("cat/x.jpeg", ("a cat.", "my cat"), 1),
        ("dog/a.png", ("a dog.", "my dog"), 2),
        ("dog/b.JPG", ("a dog.", "my dog"), 2),
    ]
    assert FolderSource(tmp_path / "data").texts_of(0) == ("a photo of a cat.",)
    assert classes_of(f"{tmp_path}/data") == (["ant", "cat", "dog"], ["a photo of a {}."])
    with pytest.raises(ValueError, match=r"'no place' has no \{\} or \{c\}"):
        FolderSource(tmp_path / "data", ["no place"])
    with pytest.raises(ValueError, match="there is no prompt template"):
        FolderSource(tmp_path / "data", [])
    with pytest.raises(ValueError, match="holds no images; put them at CLASS NAME"):
        FolderSource(tmp_path / "data" / "dog")
    (tmp_path / "other" / "bird").mkdir(parents=True)
    (tmp_path / "other" / "bird" / "a.jpg").write_bytes(jpeg())
    with pytest.raises(ValueError, match="hold different classes"):
        open_source(f"{tmp_path}/data::{tmp_path}/other", split="train")


def test_images_in_folders_of_a_class_are_its_own(tmp_path: Path) -> None:
    """As in torchvision's ImageFolder; a link that leads back brings no other class's."""
    for name in ("cat/a.jpg", "cat/2/deep/b.jpg", "dog/c.jpg", "dog/.hidden/d.jpg"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(jpeg())
    (tmp_path / "data" / "dog" / "back").symlink_to(tmp_path / "data")
    # two names of one class
    (tmp_path / "data" / "hound").symlink_to(tmp_path / "data" / "dog")
    samples = read_all(open_source(f"{tmp_path}/data", split="train"))
    assert [(s.key, s.label) for s in samples] == [
        ("cat/a.jpg", 0),
        ("cat/2/deep/b.jpg", 0),
        ("dog/c.jpg", 1),
        ("hound/c.jpg", 2),
    ]


def test_several_tables_follow_one_another(images: Path) -> None:
    first = table(images / "a.csv", *(f"{i}.jpg\ta{i}" for i in range(5)))
    second = table(images / "b.csv", "3.jpg\tb")
    source = open_source(f"{first}::{second}", split="train")
    assert source.parts == (1, 1)
    assert [s.texts[0] for s in read_all(source)] == ["a0", "a1", "a2", "a3", "a4", "b"]
    assert source.drain_faults() == []


def test_strings_are_kept_whole() -> None:
    texts = ["", "a", "é☃😀", "x" * 1000, os.fsdecode(b"\xff.jpg")]
    kept = Strings()
    for text in texts:
        kept.append(text)
    assert [kept[i] for i in range(len(kept))] == texts
    with pytest.raises(IndexError):
        kept[len(texts)]


def private_bytes() -> int:
    """Memory of this process that it shares with no other."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no Private_Dirty")


def _read_every_row(source: TableSource, grown: Any) -> None:
    # a collection would write to every object that the tests before have left
    gc.disable()
    before = private_bytes()
    for number in range(source.count):
        source.path_of(number)
        source.texts_of(number)
    grown.value = private_bytes() - before


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_forked_workers_share_a_table(images: Path) -> None:
    rows = (f"{images}/0.jpg?{i}\tcaption number {i} of a long table" for i in range(200_000))
    (images / "0.jpg?0").write_bytes(jpeg())
    source = open_csv(table(images / "t.csv", *rows), DataOptions())
    context = multiprocessing.get_context("fork")
    grown = context.Value("q", -1)
    process = context.Process(target=_read_every_row, args=(source, grown))
    process.start()
    process.join(60)
    # two lists of 200,000 strings would be copied whole: about 40 MB
    assert 0 <= grown.value < 5 << 20


def test_real_captions_three_ways(real_data: Path, tmp_path: Path) -> None:
    """The same photographs and captions from COCO's JSON and from a table made of it."""
    folder = real_data / "coco_mini"
    for split, count in (("train", 50), ("val", 79)):
        annotations = folder / "annotations" / f"captions_{split}2017.json"
        from_json = open_source(str(annotations), split="train")
        content = json.loads(annotations.read_text())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        rows = [
            f"{names[a['image_id']]}\t" + '"{}"'.format(a["caption"].replace('"', '""'))
            for a in content["annotations"]
        ]
        options = DataOptions(image_root=folder / f"{split}2017")
        from_csv = open_source(str(table(tmp_path / "t.csv", *rows)), options, split="train")
        a, b = ({s.key: s for s in read_all(source)} for source in (from_json, from_csv))
        assert len(a) == count and set(a) == set(b) == set(names.values())
        for key, sample in a.items():
            # five a photograph; the files have them in another order than the photographs
            assert len(sample.texts) >= 5 and sample.texts == b[key].texts
            assert np.array_equal(np.asarray(sample.image), np.asarray(b[key].image))


def test_a_file_that_is_no_table_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("x" * (17 << 20))
    with pytest.raises(ValueError, match="is not a table in UTF-8"):
        open_csv(path, DataOptions())


def test_special_files_are_no_images(images: Path) -> None:
    os.mkfifo(images / "pipe.jpg")
    (images / "loop.jpg").symlink_to("loop.jpg")
    (images / "folder.jpg").mkdir()
    # regular files without a size: one waits for messages, the other gives more than it says
    special = ["/proc/kmsg", "/proc/self/maps", "/dev/zero", "/dev/stdin"]
    names = ["0.jpg", "pipe.jpg", "loop.jpg", "folder.jpg", *special]
    source = open_csv(table(images / "t.csv", *(f"{name}\tx" for name in names)), DataOptions())
    kinds = []
    for number in range(1, len(names)):
        with pytest.raises(UnreadableSample) as error:
            source.read(0, number)
        kinds.append(error.value.fault.kind)
    assert kinds[:3] == [
        "image path is not a file",
        "missing image file",
        "image path is not a file",
    ]
    assert kinds[4:6] == ["corrupt image", "image path is not a file"]


def test_templates_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "data" / "dog").mkdir(parents=True)
    (tmp_path / "data" / "dog" / "a.jpg").write_bytes(jpeg())
    (tmp_path / "t.txt").write_text("a {}.", encoding="utf-16")
    options = DataOptions(templates=tmp_path / "t.txt")
    with pytest.raises(ValueError, match=r"t\.txt is not UTF-8 .*; save it as UTF-8"):
        open_source(f"{tmp_path}/data", options, split="train")
