"""Shards: expansion, counts, and what is done about damage."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fastclip.data import counts, index, shards
from fastclip.data.check import check_shards
from fastclip.data.index import index_shard
from fastclip.data.shards import ShardSource, UnreadableSample, expand_shards
from tests.conftest import jpeg

MakeShard = Callable[..., Path]


def kinds(path: Path) -> list[str]:
    return [fault.kind for fault in index_shard(path, ("txt",)).faults]


def test_braces_and_mixtures(make_shard: MakeShard, tmp_path: Path) -> None:
    for name in ("a-00.tar", "a-01.tar", "b-7.tar"):
        make_shard(name)
    found = expand_shards(f"{tmp_path}/a-{{00..01}}.tar::{tmp_path}/b-7.tar")
    assert [Path(name).name for name in found] == ["a-00.tar", "a-01.tar", "b-7.tar"]


def test_missing_shards_are_counted_and_named(make_shard: MakeShard, tmp_path: Path) -> None:
    make_shard("a-00.tar")
    with pytest.raises(FileNotFoundError, match=r"2 of 3 shards do not exist: .*a-01.tar, .*a-02"):
        ShardSource(f"{tmp_path}/a-{{00..02}}.tar")


@pytest.mark.parametrize(
    "pattern, message",
    [("pipe:rm x", "fastclip runs none"), ("a.tar::", "names no shard"), ("", "names no shard")],
)
def test_refused_patterns(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_shards(pattern)


def test_samples_are_read(make_shard: MakeShard) -> None:
    source = ShardSource(str(make_shard(samples=5)))
    assert source.counts == (5,)
    sample = source.read(0, 3)
    assert (sample.key, sample.texts, sample.label) == ("00003", ("caption number 3",), 0)
    assert sample.image.size == (32, 32)
    assert source.drain_faults() == []


def test_keys_with_folders_dots_and_meta_data(make_shard: MakeShard) -> None:
    members = [("d/x.seg.png", b"1"), ("d/x.JPG", jpeg()), ("d/x.txt", b"t"), ("__meta__.txt", b"")]
    found = index_shard(make_shard(members=members), ("txt",))
    assert found.faults == []
    assert [(key, sorted(files)) for key, files in found.samples] == [
        ("d/x", ["jpg", "seg.png", "txt"])
    ]


def test_declared_counts_are_taken(make_shard: MakeShard, tmp_path: Path) -> None:
    make_shard("00000.tar", samples=4)
    make_shard("00001.tar", samples=4)
    (tmp_path / "sizes.json").write_text(json.dumps({"00000.tar": 6}))
    (tmp_path / "00001_stats.json").write_text(json.dumps({"successes": 3}))
    source = ShardSource(f"{tmp_path}/{{00000..00001}}.tar")
    assert source.counts == (6, 3)
    with pytest.raises(UnreadableSample, match="4 readable of 6 declared"):
        source.read(0, 5)
    # 00001 holds more than it declares: its last sample is never read, which is said
    source.read(1, 0)
    (fault,) = source.drain_faults()
    assert fault.kind == "more samples than declared" and "4 readable, 3 declared" in str(fault)
    for damage in ("{", "[]", "[" * 100_000, *(f'{{"00000.tar": {n}}}' for n in ("-1", "1e999"))):
        (tmp_path / "sizes.json").write_text(damage)
        with pytest.raises(ValueError, match=r"sizes.json is damaged"):
            ShardSource(f"{tmp_path}/00000.tar")


# A good member is a header of 512 bytes and data padded to the next 512.
@pytest.mark.parametrize(
    "keep, kind, samples",
    [
        ("inside a header", "cut inside a header", 4),
        ("inside data", "cut inside a member", 3),
        ("between members", "no end-of-archive mark", 4),
    ],
)
def test_cut_tars(make_shard: MakeShard, keep: str, kind: str, samples: int) -> None:
    path = make_shard(samples=8)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    fifth, fourth = members[12], members[9]
    size = {
        "inside a header": fifth.offset + 200,
        "inside data": fourth.offset_data + 100,
        "between members": fifth.offset,
    }[keep]
    path.write_bytes(path.read_bytes()[:size])
    found = index_shard(path, ("txt",))
    assert found.faults[0].kind == kind
    assert len(found.samples) == samples


def test_damaged_header(make_shard: MakeShard) -> None:
    path = make_shard(samples=4)
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[6].offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 20] = b"\xff" * 20
    path.write_bytes(content)
    assert kinds(path) == ["damaged header"]
    assert len(index_shard(path).samples) == 2


def test_files_that_are_no_tars(tmp_path: Path, make_shard: MakeShard) -> None:
    cases = {
        "empty.tar": (b"", "empty file"),
        "page.tar": (b"<html>" * 200, "not a tar"),
        "zipped.tar": (gzip.compress(make_shard().read_bytes()), "compressed shard"),
    }
    for name, (content, kind) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert kinds(tmp_path / name) == [kind]
        with pytest.raises(ValueError, match=f"no readable sample in 1 shards: {kind}"):
            ShardSource(str(tmp_path / name))


def test_incomplete_and_special_members(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in [("a.txt", b"no image"), ("b.jpg", jpeg()), ("c.jpg", jpeg())]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("c.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert sorted(kinds(path)) == [
        "link or special member",
        "sample without image",
        "sample without txt",
        "sample without txt",
    ]


def test_duplicate_member_keeps_the_first(make_shard: MakeShard) -> None:
    members = [("a.jpg", jpeg()), ("a.txt", b"first"), ("a.txt", b"second")]
    path = make_shard(members=members)
    assert kinds(path) == ["duplicate member"]
    assert ShardSource(str(path)).read(0, 0).texts == ("first",)


@pytest.mark.parametrize(
    "listed, texts",
    [
        (b'{"captions": ["a ", "", "b"], "url": "x"}', ("a", "b")),
        (b'{"captions": []}', ("t",)),
        (b'{"caption": "x"}', ("t",)),
        (b'{"captions": "abc"}', ("t",)),
        (b'{"captions": [1]}', ("t",)),
        (rb'{"captions": ["\ud800"]}', ("t",)),
        (rb'{"captions": ["a\u0000b"]}', ("t",)),
        (b"[1]", ("t",)),
        (b"{", ("t",)),
        (b"[" * 100_000, ("t",)),
        (b'{"captions": ["' + b"x" * (1 << 20) + b'"]}', ("t",)),
    ],
    ids=[
        "list",
        "empty",
        "none",
        "text",
        "number",
        "surrogate",
        "zero",
        "array",
        "cut",
        "deep",
        "huge",
    ],
)
def test_listed_captions_or_else_the_text(
    make_shard: MakeShard, listed: bytes, texts: tuple[str, ...]
) -> None:
    members = [("a.jpg", jpeg()), ("a.txt", b"t"), ("a.json", listed)]
    assert ShardSource(str(make_shard(members=members))).read(0, 0).texts == texts
    assert ShardSource(str(make_shard(members=members)), required=()).read(0, 0).texts == ()


def test_many_faults_are_counted_and_some_kept(
    make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_PLACES", 2)
    monkeypatch.setattr(shards, "MAX_PLACES", 2)
    members = [("a.jpg", jpeg()), ("a.txt", b"t"), *((f"{i}.txt", b"t") for i in range(5))]
    path = make_shard(members=members)
    found = index_shard(path, ("txt",))
    assert found.counts == {"sample without image": 5} and len(found.faults) == 2
    faults = ShardSource(str(path)).drain_faults()
    assert [fault.detail for fault in faults] == ["", "", "3 more in this shard"]


def test_too_many_members(make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MAX_MEMBERS", 6)
    found = index_shard(make_shard(samples=4), ("txt",))
    assert len(found.samples) == 2
    assert found.counts == {"too many members": 1}


def test_a_shard_that_is_lost_or_cut_while_it_is_used(make_shard: MakeShard) -> None:
    path = make_shard(samples=4)
    source = ShardSource(str(path))
    os.truncate(path, 4000)
    assert source.read(0, 0).key == "00000"
    with pytest.raises(UnreadableSample, match=r"shard changed while it was read: .*:00003\.jpg"):
        source.read(0, 3)
    path.unlink()
    with pytest.raises(UnreadableSample, match=r"shard not readable: .*shard-00000.tar"):
        source.read(0, 0)


def test_a_file_of_counts_is_read_once_whatever_the_number_of_shards(
    make_shard: MakeShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(make_shard(f"{number}.tar", samples=2)) for number in range(4)]
    (tmp_path / "sizes.json").write_text('{"0.tar": 2, "1.tar": 1, "3.tar": 2}')
    (tmp_path / "2_stats.json").write_text('{"successes": 1}')
    read: list[str] = []
    read_text = counts.read_text

    def noted(path: Path) -> str:
        read.append(path.name)
        return read_text(path)

    monkeypatch.setattr(counts, "read_text", noted)
    assert ShardSource(f"{tmp_path}/{{0..3}}.tar").counts == (2, 1, 1, 2)
    assert read == ["sizes.json", "2_stats.json"]
    check_shards(names, write=False)
    assert read == ["sizes.json", "2_stats.json"] * 2
    # in the working directory, shards have no folder in their names
    monkeypatch.chdir(tmp_path)
    assert counts.declared_counts(["1.tar", "2.tar"]) == {"1.tar": 1, "2.tar": 1}


def big_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (6000, 6000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "image, text, kind",
    [
        (jpeg()[:300], b"t", "corrupt image"),
        (b"<svg/>", b"t", "corrupt image"),
        (big_png(), b"t", "image too large"),
        (jpeg(), b"\xff\xfe\xff", "caption is not UTF-8"),
        (jpeg(), b"  ", "empty caption"),
        (jpeg(), b"x" * (1 << 21), "caption too long"),
    ],
    ids=["cut jpeg", "svg", "bomb", "latin", "blank", "long"],
)
def test_unreadable_samples(make_shard: MakeShard, image: bytes, text: bytes, kind: str) -> None:
    source = ShardSource(str(make_shard(members=[("a.jpg", image), ("a.txt", text)])))
    with pytest.raises(UnreadableSample, match=f"{kind}: .*shard-00000.tar:a"):
        source.read(0, 0)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "I;16"])
def test_every_color_mode_becomes_rgb(make_shard: MakeShard, mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (20, 10)).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    members = [("a.png", buffer.getvalue()), ("a.txt", b"t")]
    image = ShardSource(str(make_shard(members=members))).read(0, 0).image
    assert (image.mode, image.size) == ("RGB", (20, 10))


def test_real_shards_are_whole(real_data: Path) -> None:
    source = ShardSource(f"{real_data}/cifar10/train-{{00000..00004}}.tar")
    assert source.counts == (9000,) * 5
    assert source.drain_faults() == []
    assert "automobile" in {source.read(0, i).texts[0].split()[-1].rstrip(".") for i in range(100)}


def test_a_byte_order_mark_is_no_part_of_texts_and_labels(make_shard: MakeShard) -> None:
    mark = b"\xef\xbb\xbf"
    path = make_shard(
        "a.tar", [("a.jpg", jpeg()), ("a.txt", mark + b" a dog"), ("a.cls", mark + b"7")]
    )
    sample = ShardSource(str(path), ("txt", "cls")).read(0, 0)
    assert (sample.texts, sample.label) == (("a dog",), 7)


def test_a_pipe_in_the_place_of_a_shard_is_not_waited_for(
    make_shard: MakeShard, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(FileNotFoundError, match=r"pipe\.tar"):
        ShardSource(f"{tmp_path}/pipe.tar")
    with pytest.raises(OSError, match=r"pipe\.tar is not a regular file"):
        index_shard(tmp_path / "pipe.tar")
    # where a shard has become one since
    path = make_shard("a.tar", samples=2)
    source = ShardSource(str(path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UnreadableSample, match=r"shard not readable: .*a\.tar"):
        source.read(0, 0)


@pytest.mark.parametrize(("window", "kept"), [(1, 2), (6, 4)])
def test_places_are_kept_of_what_is_shuffled_together(
    window: int, kept: int, make_shard: MakeShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is read again has not to be walked through again."""
    for number in range(4):
        make_shard(f"{number}.tar", samples=3)
    monkeypatch.setattr(shards, "INDEX_CACHE_SAMPLES", 6)
    source = ShardSource(f"{tmp_path}/{{0..3}}.tar")
    source.window = window
    walked: list[str] = []
    walk = shards.index_file

    def noted(file, name, required):
        walked.append(name)
        return walk(file, name, required)

    monkeypatch.setattr(shards, "index_file", noted)
    for shard in (0, 1, 2, 3, *range(4 - kept, 4)):
        source.read(shard, 0)
    before = len(walked)
    for shard in range(4 - kept, 4):
        source.read(shard, 1)
    assert len(walked) == before
