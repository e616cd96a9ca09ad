"""`fastclip convert`: CIFAR-10 in torchvision's own layout, COCO and CSV tables."""

import csv
import hashlib
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from fastclip.cli import main
from fastclip.data.convert import CIFAR10_TEMPLATES, convert_cifar10
from fastclip.data.editing import Journal, ShardEditor
from fastclip.data.options import DataOptions
from fastclip.data.samples import Sample, UnreadableSample, decode_image
from fastclip.data.shards import ShardSource
from fastclip.data.tables import open_coco
from fastclip.data.writing import add_sizes, write_shards
from tests.conftest import jpeg

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def small_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five batches of eight images with the checksums that torchvision verifies set to theirs."""
    folder = tmp_path / "source" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict) -> str:
        encoded = pickle.dumps(content)
        (folder / name).write_bytes(encoded)
        return hashlib.md5(encoded).hexdigest()

    def batch() -> dict:
        pixels = rng.integers(0, 256, (8, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": rng.integers(0, 10, 8).tolist()}

    train = [[f"data_batch_{i}", write(f"data_batch_{i}", batch())] for i in range(1, 6)]
    test = [["test_batch", write("test_batch", batch())]]
    meta = {"filename": "batches.meta", "key": "label_names"}
    meta["md5"] = write("batches.meta", {"label_names": CLASSES})
    for name, value in (("train_list", train), ("test_list", test), ("meta", meta)):
        monkeypatch.setattr(CIFAR10, name, value)
    return tmp_path / "source"


def test_shards_hold_every_training_image_once(small_cifar10: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = convert_cifar10(small_cifar10, out)
    assert written == {"train": [36], "val": [4]}
    assert json.loads((out / "sizes.json").read_text()) == {
        "train-00000.tar": 36,
        "val-00000.tar": 4,
    }
    assert (out / "classes.txt").read_text().split() == CLASSES
    original = CIFAR10(str(small_cifar10), train=True)
    means = sorted(np.asarray(image).mean() for image, _ in original)
    found = []
    for name, count in (("train", 36), ("val", 4)):
        source = ShardSource(str(out / f"{name}-00000.tar"))
        assert source.counts == (count,)
        for i in range(count):
            sample = source.read(0, i)
            found.append(np.asarray(sample.image).mean())
            name_of_class = CLASSES[sample.label]
            assert sample.texts[0] in {
                template.format(name_of_class) for template in CIFAR10_TEMPLATES
            }
    # JPEG keeps an image's mean to a fraction of a level
    assert np.abs(np.sort(found) - means).max() < 1.5


def test_the_same_seed_gives_the_same_shards(small_cifar10: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert_cifar10(small_cifar10, tmp_path / name, seed=3)
    a, b = ((tmp_path / name / "train-00000.tar").read_bytes() for name in ("a", "b"))
    assert a == b


def test_command_line(
    small_cifar10: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "out")
    assert main(["convert", "cifar10", str(small_cifar10), target]) == 0
    assert "train: 36 samples in 1 shard" in capsys.readouterr().err
    # nothing is overwritten, and a source that is not there is explained
    assert main(["convert", "cifar10", str(small_cifar10), target]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["convert", "cifar10", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 1
    assert "does not hold all of CIFAR-10" in capsys.readouterr().err


def bytes_of_members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_coco_keeps_image_bytes_and_all_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    files = {f"{i}.v1.jpg": jpeg((50 * i, 0, 0)) for i in range(5)}
    files["3.v1.jpg"] = b"broken"
    for name, content in files.items():
        (tmp_path / "val2017" / name).write_bytes(content)
    Image.new("RGB", (9, 9)).save(tmp_path / "val2017" / "p.png")
    names = [*files, "p.png", "gone.jpg"]
    annotations = tmp_path / "annotations" / "captions_val2017.json"
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "caption": f"{word} {i}"} for word in ("ein", "ün") for i in range(7)
        ],
    }
    annotations.write_text(json.dumps(content))
    out = tmp_path / "out"
    assert main(["convert", "coco", str(annotations), str(out), "--per-shard", "2"]) == 0
    printed = capsys.readouterr().err
    assert "val2017: 5 samples in 3 shards" in printed
    assert "1 corrupt image, 1 missing image file" in printed
    assert "captions_val2017.json:gone.jpg" in printed
    assert json.loads((out / "sizes.json").read_text()) == {
        "val2017-00000.tar": 2,
        "val2017-00001.tar": 2,
        "val2017-00002.tar": 1,
    }
    members = bytes_of_members(out / "val2017-00000.tar")
    assert members["00000001_1_v1.jpg"] == files["1.v1.jpg"]
    assert members["00000001_1_v1.txt"] == b"ein 1"
    assert json.loads(members["00000001_1_v1.json"]) == {"captions": ["ein 1", "ün 1"]}
    assert "00000005_p.png" in bytes_of_members(out / "val2017-00002.tar")
    source = ShardSource(f"{out}/val2017-{{00000..00002}}.tar")
    assert source.read(1, 1).texts == ("ein 4", "ün 4")
    # no shard is overwritten, and a table without a single image is reported
    assert main(["convert", "coco", str(annotations), str(out)]) == 1
    assert "exists" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text(f"image,text\n{tmp_path}/val2017/3.v1.jpg,x\n")
    flags = ["--csv-separator", ",", "--csv-img-key", "image", "--csv-caption-key", "text"]
    table = ["convert", "csv", str(tmp_path / "t.csv"), str(tmp_path / "out2"), *flags]
    assert main(table) == 1
    assert "no image of" in capsys.readouterr().err
    assert main([*table, "--per-shard", "0"]) == 1
    assert "--per-shard is 0; give at least 1" in capsys.readouterr().err


def test_real_photographs_through_tars_and_tables(real_data: Path, tmp_path: Path) -> None:
    """COCO's JSON, the tars made of it, and tars made of an equal table hold the same samples."""
    folder = real_data / "coco_mini"
    annotations = folder / "annotations" / "captions_train2017.json"
    assert main(["convert", "coco", str(annotations), f"{tmp_path}/a", "--per-shard", "20"]) == 0
    original = open_coco(annotations, DataOptions())
    table = tmp_path / "t.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        for i in range(original.count):
            writer.writerows([original.path_of(i), text] for text in original.texts_of(i))
    root = ["--image-root", str(folder / "train2017")]
    assert main(["convert", "csv", str(table), f"{tmp_path}/b", "--per-shard", "20", *root]) == 0
    shards = ShardSource(f"{tmp_path}/a/train2017-{{00000..00002}}.tar")
    assert shards.counts == (20, 20, 10)
    seen = 0
    for shard, count in enumerate(shards.counts):
        names = [f"train2017-{shard:05d}.tar", f"t-{shard:05d}.tar"]
        coco, rows = (
            bytes_of_members(tmp_path / out / name) for out, name in zip("ab", names, strict=True)
        )
        assert coco == rows
        for i in range(count):
            sample, path = shards.read(shard, i), original.path_of(seen)
            assert sample.texts == original.texts_of(seen) and len(sample.texts) >= 5
            file = (folder / "train2017" / path).read_bytes()
            assert coco[f"{sample.key}.jpg"] == file
            assert sample.image.tobytes() == decode_image(file, path).tobytes()
            seen += 1
    assert seen == 50


def test_a_key_is_added_wherever_a_tar_was_cut(
    make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    """What can be read gets it, and what lies behind the last readable member is kept."""
    members = []
    for i in range(3):
        members.append((f"{i}.jpg", jpeg((90 * i, 0, 0))))
        members.append((f"{i}.json", b'{"n": 1.0}' if i % 2 else b" {} \n"))
    whole = make_shard("s.tar", [*members, ("9.jpg", jpeg()), ("9.txt", b"t")]).read_bytes()
    whole = whole.rstrip(b"\0") + bytes(1500)
    path, out = tmp_path / "cut.tar", tmp_path / "out.tar"
    edited = set()
    for size in range(600, len(whole), 149):
        for behind in (b"", b"\1" * 700):
            path.write_bytes(whole[:size] + behind)
            with path.open("rb") as file:
                shard = ShardEditor(file, "cut")
                shard.write(out, "k", {})
                assert out.read_bytes() == whole[:size] + behind
                shard.write(out, "k", dict.fromkeys(shard.samples, "v"))
                check_edited(shard, out)
            files = [place for files in shard.samples.values() for place in files.values()]
            end = max((-(-(offset + size) // 512) * 512 for offset, size in files), default=0)
            assert out.read_bytes().endswith((whole[:size] + behind)[end:])
            edited.add(len(shard.samples))
    assert edited == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("first", "second", "counted"),
    [
        (("txt",), ("txt",), True),
        (("txt", "json"), ("txt", "json"), True),
        (("txt",), (), False),
        (("txt", "json"), ("txt",), False),
        ((), (), False),
    ],
)
def test_samples_are_counted_where_any_reader_counts_alike(
    first: tuple[str, ...],
    second: tuple[str, ...],
    counted: bool,
    make_shard: Callable[..., Path],
    tmp_path: Path,
) -> None:
    content = {"txt": b"t", "json": b"{}"}
    members = []
    for key, extensions in (("a", first), ("b", second)):
        members += [(f"{key}.jpg", jpeg()), *((f"{key}.{e}", content[e]) for e in extensions)]
    out = tmp_path / "out" / "s.tar"
    out.parent.mkdir()
    with make_shard("s.tar", members).open("rb") as file:
        ShardEditor(file, "s").add_members(out, {"a": {"npy": b"x"}})
    assert (tmp_path / "out" / "sizes.json").exists() == counted
    if first:
        assert ShardSource(str(out)).counts == (sum("txt" in each for each in (first, second)),)


def check_edited(shard: ShardEditor, path: Path) -> None:
    with path.open("rb") as file:
        found = ShardEditor(file, "out")
        assert list(found.samples) == list(shard.samples)
        for key, places in shard.samples.items():
            n = {"n": 1.0} if key == "1" and "json" in places else {}
            assert found.json(key)[1] == n | {"k": "v"}
            assert found.read(*found.samples[key]["jpg"]) == shard.read(*places["jpg"])


def test_members_whose_name_or_size_is_out_of_the_ordinary(tmp_path: Path) -> None:
    """What an editor cannot change safely it leaves as it is, and says so."""
    path, out = tmp_path / "s.tar", tmp_path / "out.tar"
    with tarfile.open(path, "w") as tar:
        for name, content, headers in (
            ("0.jpg", jpeg(), {}),
            ("0.json", b"{}", {"size": "2"}),
            ("1.jpg", jpeg(), {}),
            ("1.json", None, {}),
            ("b\u0007l.jpg", jpeg(), {}),
            ("3.jpg", jpeg(), {}),
            ("3.json", b'{"a": "' + b"x" * (1 << 20) + b'"}', {}),
            ("ü" * 80 + ".jpg", jpeg(), {}),
            ("ü" * 80 + ".json", b"{}", {}),
        ):
            info = tarfile.TarInfo(name)
            info.pax_headers = headers
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "0.json"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
    with path.open("rb") as file:
        shard = ShardEditor(file, "s")
        assert len(shard.samples) == 5
        faults, fine = [], []
        for key in shard.samples:
            try:
                shard.json(key)
                fine.append(key)
            except UnreadableSample as error:
                faults.append(error.fault.kind)
        assert faults == ["damaged JSON", "damaged JSON", "damaged JSON", "JSON too long"]
        assert fine == ["ü" * 80]
        shard.write(out, "k", {fine[0]: "v"})
    before, after = bytes_of_files(path), bytes_of_files(out)
    assert after.pop(fine[0] + ".json") == b'{"k": "v"}' and before.pop(fine[0] + ".json")
    assert before == after


def bytes_of_files(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() if m.isreg() else b"" for m in tar}


def test_a_journal_is_held_by_one_and_forgets_what_is_torn(tmp_path: Path) -> None:
    first = Journal(tmp_path / "a.tar")
    first.begin({"n": 1})
    first.add({"done": "ü"})
    assert not Journal(tmp_path / "a.tar").mine
    first.close()
    text = first.path.read_bytes()
    for size in range(len(text) + 1):
        first.path.write_bytes(text[:size])
        again = Journal(tmp_path / "a.tar")
        again.begin({"n": 1})
        assert again.mine and again.pieces == [{"done": "ü"}] * (size == len(text))
        again.close()
        # it can always be resumed
        assert first.path.read_bytes() == (text if size == len(text) else text[:9])
    with pytest.raises(ValueError, match="n was 1 and is 2; delete it"):
        Journal(tmp_path / "a.tar").begin({"n": 2})
    with pytest.raises(ValueError, match="m was None and is 1"):
        Journal(tmp_path / "a.tar").begin({"n": 1, "m": 1})


def test_sizes_that_are_damaged_are_reported(tmp_path: Path) -> None:
    add_sizes(tmp_path, {"a.tar": 1})
    add_sizes(tmp_path, {"b.tar": 2})
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"a.tar": 1, "b.tar": 2}
    for content in ("{", "[]"):
        (tmp_path / "sizes.json").write_text(content)
        with pytest.raises(ValueError, match="is damaged"):
            add_sizes(tmp_path, {"c.tar": 3})
        assert (tmp_path / "sizes.json").read_text() == content


def test_each_format_has_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--help"], "imagenet-captions"),
        (["csv", "--help"], "--csv-img-key"),
        (["cifar10", "--help"], "--seed"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["convert", *words])
        assert stop.value.code == 0 and message in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["convert", "cifar10", "a", "b", "--csv-img-key", "x"])
    assert stop.value.code == 2


def test_a_shard_has_its_name_once_it_is_whole(tmp_path: Path) -> None:
    """What an interrupted conversion leaves is whole shards, and their counts."""

    def samples(count: int) -> Iterator[Sample]:
        for number in range(5):
            if number == count:
                raise KeyboardInterrupt
            yield Sample(f"{number}", Image.new("RGB", (8, 8)), ("a",))

    with pytest.raises(KeyboardInterrupt):
        write_shards(samples(3), tmp_path, "train", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sizes.json", "train-00000.tar"]
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"train-00000.tar": 2}
    with pytest.raises(FileExistsError, match=r"train-00000\.tar exists"):
        write_shards(samples(9), tmp_path, "train", 2)
    (tmp_path / "train-00000.tar").unlink()
    assert write_shards(samples(9), tmp_path, "train", 2) == [2, 2, 1]
