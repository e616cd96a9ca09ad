"""Data of which the images alone are wanted: folders of any shape, and captions that may be."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastclip.data.options import DataOptions
from fastclip.data.samples import Sample, Source
from fastclip.data.sources import open_source
from tests.conftest import jpeg

MakeShard = Callable[..., Path]


def opened(data: object, **options: object) -> Source:
    chosen = {"split": "val", "required": (), "optional_texts": True, **options}
    return open_source(str(data), **chosen)


def samples(source: Source) -> list[Sample]:
    return [source.read(s, i) for s, count in enumerate(source.counts) for i in range(count)]


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg())


def test_a_folder_of_images_and_of_folders(tmp_path: Path) -> None:
    put(tmp_path, "b.jpg", "a.jpg", "2024/06/c.jpeg", "2024/d.JPG", ".hidden/e.jpg", "._f.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    found = samples(opened(tmp_path))
    assert [s.key for s in found] == ["a.jpg", "b.jpg", "2024/d.JPG", "2024/06/c.jpeg"]
    assert {(s.texts, s.label) for s in found} == {((), None)}
    with pytest.raises(ValueError, match=r"folder without CLASS/\*\.jpg"):
        open_source(str(tmp_path / "2024" / "06"), split="val")


def test_folders_of_classes_alone_keep_their_prompts(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.jpg", "dog/2.jpg")
    assert [s.texts for s in samples(opened(tmp_path))] == [
        ("a photo of a cat.",),
        ("a photo of a dog.",),
    ]
    # with an image elsewhere too, none is left out
    put(tmp_path, "3.jpg")
    assert [s.key for s in samples(opened(tmp_path))] == ["3.jpg", "cat/1.jpg", "dog/2.jpg"]


def test_several_folders(tmp_path: Path) -> None:
    put(tmp_path, "one/a.jpg", "two/b.jpg")
    found = samples(opened(f"{tmp_path}/one::{tmp_path}/two"))
    assert [s.key for s in found] == ["a.jpg", "b.jpg"]


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no images .*; if it holds shards, name them"):
        opened(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist or is not a folder"):
        opened(tmp_path / "no", options=DataOptions(dataset_type="imagefolder"))


def test_a_folder_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a.jpg", "b/c.jpg", "b/closed/d.jpg")
    scandir = os.scandir

    def closed(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    for required in ((), ("txt",)):
        with pytest.raises(PermissionError, match="closed"):
            opened(tmp_path, required=required)


def test_captions_of_shards_where_there_are_some(make_shard: MakeShard) -> None:
    members = [("a.jpg", jpeg()), ("a.txt", b"a caption"), ("b.jpg", jpeg()), ("c.jpg", jpeg())]
    members += [
        ("c.txt", b"\xff\xfe damaged"),
        ("d.jpg", jpeg()),
        ("d.json", b'{"captions": ["x"]}'),
    ]
    shard = make_shard(members=members)
    assert [s.texts for s in samples(opened(shard))] == [("a caption",), (), (), ("x",)]
    assert {s.texts for s in samples(opened(shard, optional_texts=False))} == {()}
    required = open_source(str(shard), split="val")
    assert required.counts == (2,)


def touch(path: Path) -> None:
    """Another time, whatever the file system's resolution."""
    os.utime(path, ns=(0, time.time_ns() - 10**12))


@pytest.mark.parametrize("kind", ["folder", "table", "shard"])
def test_a_digest_changes_with_the_files(kind: str, tmp_path: Path, make_shard: MakeShard) -> None:
    put(tmp_path / "images", "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_text("filepath,title\nimages/a.jpg,one\nimages/b.jpg,two\n")
    shard = make_shard()
    data, file = {
        "folder": (tmp_path / "images", tmp_path / "images" / "b.jpg"),
        "table": (tmp_path / "t.csv", tmp_path / "images" / "b.jpg"),
        "shard": (shard, shard),
    }[kind]
    first = opened(data).digest()
    assert opened(data).digest() == first
    touch(file)
    second = opened(data).digest()
    if kind == "shard":
        make_shard(samples=9)
    else:
        file.unlink()
    assert len({first, second, opened(data).digest()}) == 3


def test_a_digest_is_of_what_is_read(tmp_path: Path) -> None:
    """Other scenes differ, other captions of a table do not: they are no images."""
    names = ["scenes", "scenes:shift=style", "scenes:split=test", "synthetic", "scenes::scenes"]
    digests = {opened(name).digest() for name in names} | {opened("scenes", count=5).digest()}
    assert len(digests) == 6
    put(tmp_path, "a.jpg")
    table = tmp_path / "t.csv"
    table.write_text("filepath,title\na.jpg,one\n")
    before = opened(table).digest()
    table.write_text("filepath,title\na.jpg,two\n")
    assert opened(table).digest() == before


def test_folders_that_are_links_are_read_and_none_twice(tmp_path: Path) -> None:
    """As a part of ImageNet is often made; one leads back."""
    put(tmp_path / "elsewhere", "cat/a.jpg", "dog/b.jpg")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("cat", "dog"):
        (data / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "dog" / "back").symlink_to(data)
    found = samples(opened(data))
    assert [sample.key for sample in found] == ["cat/a.jpg", "dog/b.jpg"]
