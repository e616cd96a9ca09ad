"""`fastclip check-data`: exact counts, what is written, and that DALI reads it."""

import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fastclip.cli import main
from fastclip.data import check
from fastclip.data.check import check_shards
from fastclip.data.index import index_shard
from fastclip.data.remote import ShardCache
from fastclip.data.samples import SampleReader, UnreadableSample
from fastclip.data.shards import ShardSource
from tests.conftest import jpeg
from tests.data.hostile import tars

MakeShard = Callable[..., Path]

# what training passes over without a word, or does not come to
ALSO = {
    "JSON that is not a dictionary": {"JSON is not a dictionary": 1},
    "deep JSON": {"damaged JSON": 1},
    "JSON with a number of 100,000 digits": {"damaged JSON": 1},
    "class index that is none": {"class index is not an integer": 1},
    "class index of 10 MB": {"class index out of range": 1},
    "100,000 tiny members": {"empty caption": 50_000},
}


def mixed(make_shard: MakeShard, name: str = "00000.tar") -> Path:
    """Five samples in order: good, cut image, blank text, good, no text."""
    members = [(f"{key}.jpg", jpeg()[:300] if key == "b" else jpeg()) for key in "abcde"]
    texts = [(f"{key}.txt", b" " if key == "c" else f"about {key}".encode()) for key in "abcd"]
    return make_shard(name, members=sorted(members + texts))


def test_every_hostile_tar_is_counted_exactly(tmp_path: Path) -> None:
    expected: Counter[str] = Counter()
    keys: list[str] = []
    names = []
    for number, (name, case) in enumerate(tars().items()):
        path = tmp_path / f"{number:05d}.tar"
        case.write(path)
        names.append(str(path))
        keys.extend(case.keys)
        expected += Counter([kind for kind, _ in case.faults] + [*case.unreadable.values()])
        expected.update(ALSO.get(name, {}))
    expected["key of an earlier shard"] = len(keys) - len(set(keys))
    unreadable = sum(len(case.unreadable) for case in tars().values())
    report = check_shards(names, workers=2)
    assert report.counts == expected
    assert (report.samples, report.good) == (len(keys), len(keys) - unreadable)
    assert report.bytes == sum(map(os.path.getsize, names))
    assert all(0 < len(places) <= check.PLACES_SHOWN for places in report.places.values())
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    for name, case in zip(names, tars().values(), strict=True):
        assert sizes[Path(name).name] == len(index_shard(Path(name), ("txt",)).samples)
        index = Path(name).with_suffix(".idx")
        good = len(case.keys) - len(case.unreadable)
        assert index.exists() == (good > 0)
        assert not good or index.read_text().startswith(f"v1.2 {good}\n")


def test_the_order_of_training_is_that_of_the_counts(make_shard: MakeShard) -> None:
    path = mixed(make_shard)
    uncounted = ShardSource(str(path)).counts
    check_shards([str(path)])
    assert ShardSource(str(path)).counts == uncounted == (4,)


def test_parts_of_a_shard_are_the_whole(
    make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mixed(make_shard)
    whole = check_shards([str(path)], workers=2)
    lines = path.with_suffix(".idx").read_text()
    for size in (1 << 12, 1 << 8):
        monkeypatch.setattr(check, "PART_BYTES", size)
        parts = check_shards([str(path)], workers=2)
        assert (parts.counts, parts.places) == (whole.counts, whole.places)
        assert (parts.samples, parts.good, parts.bytes) == (4, 2, whole.bytes)
        assert path.with_suffix(".idx").read_text() == lines


def test_keys_that_come_again_are_named(make_shard: MakeShard) -> None:
    paths = [str(make_shard(f"{i}.tar", samples=3, first=first)) for i, first in ((0, 0), (1, 2))]
    # the same shard twice is read once
    report = check_shards([*paths, paths[0]])
    assert report.counts == {"key of an earlier shard": 1}
    assert report.places == {"key of an earlier shard": [f"{paths[1]}:00002 (as in {paths[0]})"]}
    assert (report.shards, report.samples, report.good) == (2, 6, 6)


def test_texts_and_labels_are_checked_each(make_shard: MakeShard) -> None:
    members = [
        ("a.jpg", jpeg()),
        ("a.txt", b"\xff"),
        ("a.json", b'{"captions": ["used"]}'),
        ("b.jpg", b""),
        ("b.txt", b"\xff"),
        ("b.cls", b"x"),
        ("c.jpg", jpeg()),
        ("c.txt", b"t"),
        ("c.json", b'{"captions": "t"}'),
        ("d.jpg", jpeg()),
        ("d.txt", b"t"),
        ("d.json", b'{"captions": []' + b" " * (1 << 20) + b"}"),
    ]
    report = check_shards([str(make_shard(members=members))])
    assert report.counts == {
        "caption is not UTF-8": 2,
        "corrupt image": 1,
        "class index is not an integer": 1,
        "captions are not a list of texts": 1,
        "JSON too long": 1,
    }
    assert (report.samples, report.good) == (4, 3)


def test_a_class_that_is_a_text_matters_where_classes_are_needed(make_shard: MakeShard) -> None:
    members = [("a.jpg", jpeg()), ("a.txt", b"t"), ("a.cls", b"cat")]
    path = str(make_shard(members=members))
    sample = ShardSource(path).read(0, 0)
    assert (sample.texts, sample.label) == (("t",), None)
    with pytest.raises(UnreadableSample, match="class index is not an integer"):
        ShardSource(path, ("cls",)).read(0, 0)
    for required, good in (("txt", 1), ("cls", 0)):
        report = check_shards([path], SampleReader((required,)), write=False)
        assert report.counts == {"class index is not an integer": 1} and report.good == good


def test_places_move_no_cursor_and_reveal_no_secret(
    make_shard: MakeShard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a\x1b[2J\nb").mkdir()
    path = make_shard("a\x1b[2J\nb/0.tar", [("a.jpg", b"no image"), ("a.txt", b"t")])
    remote = "file://user:secret@host/0.tar"
    assert main(["check-data", str(path), remote, "--no-write"]) == 1
    printed = capsys.readouterr()
    assert r"a\x1b[2J\nb/0.tar:a.jpg" in printed.out and "***@host" in printed.out
    for text in (printed.out, printed.err):
        assert "\x1b" not in text and "secret" not in text


def test_counts_are_merged_and_old_ones_compared(make_shard: MakeShard, tmp_path: Path) -> None:
    path = make_shard("0.tar", samples=3)
    (tmp_path / "sizes.json").write_text('{"0.tar": 5, "other.tar": 7}')
    make_shard("1.tar", samples=3, first=3)
    (tmp_path / "1_stats.json").write_text('{"successes": 2}')
    names = [str(path), str(tmp_path / "1.tar")]
    report = check_shards(names, write=False)
    assert report.places == {
        "fewer samples than declared": [f"{names[0]} (3 readable, 5 declared)"],
        "more samples than declared": [f"{names[1]} (3 readable, 2 declared)"],
    }
    assert report.written == []
    assert sorted(os.listdir(tmp_path)) == ["0.tar", "1.tar", "1_stats.json", "sizes.json"]
    check_shards(names)
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert sizes == {"0.tar": 3, "1.tar": 3, "other.tar": 7}
    assert check_shards(names).counts == {}
    (tmp_path / "sizes.json").write_text("{")
    with pytest.raises(ValueError, match=r"sizes.json is damaged"):
        check_shards(names)


def test_remote_shards(make_shard: MakeShard, tmp_path: Path) -> None:
    path = make_shard("0.tar", samples=3)
    names = [f"file://{path}", f"local://{path}", f"file://{tmp_path}/1.tar"]
    cache = ShardCache(tmp_path / "cache")
    report = check_shards(names, cache=cache, workers=2)
    assert report.counts == {"key of an earlier shard": 3, "shard not fetched": 1}
    assert (report.samples, report.good) == (6, 6)
    # nothing is written beside what is elsewhere
    assert report.written == [] and not (tmp_path / "sizes.json").exists()


def test_a_process_that_dies_is_reported(
    make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("the stand-in that dies reaches forked processes only")
    monkeypatch.setattr(SampleReader, "check", lambda *arguments: os._exit(1))
    with pytest.raises(ChildProcessError, match=r"a process died at .*0\.tar or soon behind it"):
        check_shards([str(make_shard("0.tar"))])


def test_the_command(
    make_shard: MakeShard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed(make_shard, "00000.tar")
    make_shard("00001.tar", samples=3)
    pattern = f"{tmp_path}/{{00000..00001}}.tar"
    output = tmp_path / "report.json"
    assert main(["check-data", pattern, "--json", str(output), "--no-write"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["00000.tar", "00001.tar", "report.json"]
    printed = capsys.readouterr().out
    assert re.search(rf"^corrupt image +1  {tmp_path}/00000.tar:b.jpg", printed, re.MULTILINE)
    assert "7 samples in 2 shards, 5 of them good" in printed
    report = json.loads(output.read_text())
    assert report["faults"]["empty caption"] == {
        "count": 1,
        "places": [f"{tmp_path}/00000.tar:c.txt"],
    }
    assert (report["samples"], report["good"], report["written"]) == (7, 5, [])
    # several arguments, and a mixture
    parts = f"{tmp_path}/00000.tar::{tmp_path}/00001.tar"
    for arguments in ([parts], parts.split("::")):
        assert main(["check-data", *arguments, "--workers", "2", "--strict"]) == 1
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"00000.tar": 4, "00001.tar": 3}
    assert main(["check-data", f"{tmp_path}/00001.tar", "--strict"]) == 0
    # a class index is enough for an evaluation
    assert main(["check-data", f"{tmp_path}/00000.tar", "--required", "cls", "--no-write"]) == 1


def test_nothing_readable_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.tar").write_bytes(b"<html>" * 200)
    assert main(["check-data", f"{tmp_path}/0.tar"]) == 1
    assert "not a tar" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["0.tar"]
    assert main(["check-data", f"{tmp_path}/1.tar"]) == 1
    assert main(["check-data", "pipe:true"]) == 1
    assert main(["check-data", f"{tmp_path}/0.tar", "--workers", "0"]) == 1
    assert main(["check-data"]) == 1
    errors = capsys.readouterr().err
    assert "do not exist" in errors and "fastclip runs none" in errors
    assert "1 shards and --workers 0" in errors and "0 shards and --workers" in errors


def test_a_folder_that_cannot_be_written_to_is_reported_first(
    make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_shard()
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    assert main(["check-data", str(path)]) == 1
    assert f"{path.parent} cannot be written to; give --no-write" in capsys.readouterr().err
    assert main(["check-data", str(path), "--no-write"]) == 0


def test_dali_reads_the_good_samples(make_shard: MakeShard, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    from nvidia.dali import fn, pipeline_def

    # with blanks in a name, which separate the columns of the index
    members = [(f"a b/{key}.jpg", jpeg()) for key in "xy"]
    members += [(f"a b/{key}.txt", b"about " + key.encode()) for key in "xy"]
    members.append(("a b/x.json", b""))
    paths = [mixed(make_shard), make_shard("00001.tar", members=sorted(members))]
    check_shards([str(path) for path in paths])

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline() -> tuple[object, object]:
        encoded, text = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["jpg", "txt"],
            missing_component_behavior="error",
            name="reader",
        )
        return fn.decoders.image(encoded, device="cpu"), text

    built = pipeline()
    built.build()
    assert built.epoch_size("reader") == 4
    read = [built.run() for _ in range(4)]
    assert [bytes(text.at(0)).decode() for _, text in read] == [
        f"about {key}" for key in ("a", "d", "x", "y")
    ]
    assert all(image.at(0).shape == (32, 32, 3) for image, _ in read)


def test_real_shards_take_less_than_half_a_minute(real_data: Path) -> None:
    names = sorted(str(path) for path in (real_data / "cifar10").glob("train-*.tar"))
    report = check_shards(names, workers=2, write=False)
    assert (report.samples, report.good, report.counts) == (45_000, 45_000, {})
    assert report.seconds < 30
