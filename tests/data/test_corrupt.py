"""Corrupted copies of shards: labels kept, pixels as the key and the kind say, nothing besides."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastclip.cli import main
from fastclip.data.corrupt import EXTRA_KINDS, KINDS, corrupt_image, corrupt_shards
from fastclip.data.shards import ShardSource
from tests.conftest import jpeg

pytest.importorskip("imagecorruptions")


def members(path: Path) -> dict[str, bytes]:
    """A tar's files by name."""
    with tarfile.open(path) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(np.int64)


def test_real_photographs_keep_labels_and_lose_quality(real_data: Path, tmp_path: Path) -> None:
    twenty = members(real_data / "cifar10" / "val-00000.tar")
    keys = sorted({name.split(".")[0] for name in twenty})[:20]
    shard = tmp_path / "val-00000.tar"
    with tarfile.open(shard, "w") as tar:
        for name, content in twenty.items():
            if name.split(".")[0] in keys:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (tmp_path / "classes.txt").write_bytes((real_data / "cifar10" / "classes.txt").read_bytes())
    kinds = ("gaussian_noise", "defocus_blur", "jpeg_compression")
    distances = {}
    for severity in (1, 5):
        out = tmp_path / f"out{severity}"
        counts, faults = corrupt_shards(str(shard), out, kinds, severity)
        assert counts == {f"{kind}-{severity}.tar": 20 for kind in kinds} and not faults.counts
        assert (out / "classes.txt").read_bytes() == (tmp_path / "classes.txt").read_bytes()
        for kind in kinds:
            found = members(out / f"{kind}-{severity}.tar")
            assert len(found) == 60
            each = []
            for key in keys:
                assert found[f"{key}.cls"] == twenty[f"{key}.cls"]
                assert found[f"{key}.txt"] == twenty[f"{key}.txt"]
                original, corrupted = pixels(twenty[f"{key}.jpg"]), pixels(found[f"{key}.png"])
                assert original.shape == corrupted.shape
                each.append(np.abs(original - corrupted).mean())
            assert min(each) > 0
            distances[kind, severity] = np.mean(each)
    assert all(distances[kind, 5] > distances[kind, 1] for kind in kinds)
    corrupt_shards(str(shard), tmp_path / "again", kinds, 5)
    for kind in kinds:
        first, second = (tmp_path / folder / f"{kind}-5.tar" for folder in ("out5", "again"))
        assert first.read_bytes() == second.read_bytes()


@pytest.fixture
def picture() -> Image.Image:
    """40 x 32 pixels with something to blur."""
    coarse = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((40, 32), Image.Resampling.NEAREST)


@pytest.mark.parametrize("kind", (*KINDS, *EXTRA_KINDS))
def test_neither_order_nor_other_code_matters(kind: str, picture: Image.Image) -> None:
    np.random.seed(1)
    first = np.asarray(corrupt_image(picture, kind, 3, "a"))
    assert first.shape == (32, 40, 3) and not np.array_equal(first, np.asarray(picture))
    np.random.seed(2)
    before = np.random.get_state()[1].copy()
    corrupt_image(picture, kind, 3, "b")
    assert np.array_equal(np.random.get_state()[1], before), "other code's random numbers changed"
    assert np.array_equal(np.asarray(corrupt_image(picture, kind, 3, "a")), first)


@pytest.mark.parametrize("kind", ["gaussian_noise", "impulse_noise", "glass_blur", "fog"])
def test_each_key_has_its_own_noise(kind: str, picture: Image.Image) -> None:
    one, other = (np.asarray(corrupt_image(picture, kind, 3, key)) for key in "ab")
    assert not np.array_equal(one, other)


def test_generators_are_as_before_after_a_failure(picture: Image.Image) -> None:
    make, state = np.random.default_rng, np.random.get_state()[1].copy()
    with pytest.raises(KeyError):
        corrupt_image(picture, "no such kind", 3, "a")
    assert np.random.default_rng is make and np.array_equal(np.random.get_state()[1], state)


def test_command_line(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    shard = make_shard(samples=3)
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n")
    out = tmp_path / "out"
    command = ["convert", "corrupt", str(shard), str(out), "--kinds", "contrast", "saturate"]
    assert main([*command, "--severity", "2"]) == 0
    for kind in ("contrast", "saturate"):
        source = ShardSource(str(out / f"{kind}-2.tar"), ("cls",))
        assert source.counts == (3,)
        assert [source.read(0, i).label for i in range(3)] == [0, 1, 2]
    assert (out / "templates.txt").is_file()
    assert sorted(path.name for path in out.iterdir()) == [
        "contrast-2.tar",
        "saturate-2.tar",
        "sizes.json",
        "templates.txt",
    ]


def test_unreadable_images_are_left_out_and_reported(
    make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    shard = make_shard(members=[("a.jpg", jpeg()), ("a.cls", b"1"), ("b.jpg", b"no image")])
    counts, faults = corrupt_shards(str(shard), tmp_path / "out", ("contrast",))
    assert counts == {"contrast-3.tar": 1} and "b" in faults.report()


def test_the_first_samples_alone(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    shard = str(make_shard(samples=5))
    corrupt_shards(shard, tmp_path / "all", ("contrast",))
    counts, _ = corrupt_shards(shard, tmp_path / "some", ("contrast",), number=3)
    assert counts == {"contrast-3.tar": 3}
    every, some = (members(tmp_path / name / "contrast-3.tar") for name in ("all", "some"))
    assert len({name.split(".")[0] for name in some}) == 3 and some.items() <= every.items()


def test_remote_shards_and_long_names(
    make_shard: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies beside the shards is copied from there; names may be longer than USTAR's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    key = "photographs/" + "n" * 120
    shard = make_shard(members=[(f"{key}.jpg", jpeg()), (f"{key}.cls", b"1")])
    (tmp_path / "classes.txt").write_text("ant\ncat\n")
    corrupt_shards(f"file://{shard}", tmp_path / "out", ("contrast",))
    assert (tmp_path / "out" / "classes.txt").read_text() == "ant\ncat\n"
    source = ShardSource(str(tmp_path / "out" / "contrast-3.tar"), ("cls",))
    assert (source.read(0, 0).key, source.read(0, 0).label) == (key, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("rain",)}, "'rain'; give some of gaussian_noise"),
        ({"kinds": ()}, "give some of"),
        ({"severity": 6}, "severity 6: give 1"),
    ],
)
def test_wrong_options(
    options: dict, message: str, make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        corrupt_shards(str(make_shard()), tmp_path / "out", **options)


def test_small_images_are_left_out(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    small, large = [("a.jpg", jpeg(size=31))], [("b.jpg", jpeg(size=32))]
    with pytest.raises(ValueError, match="a is 31 x 31: corruptions are made for sides of 32"):
        corrupt_image(Image.new("RGB", (31, 31)), "contrast", 3, "a")
    counts, faults = corrupt_shards(
        str(make_shard("both.tar", [*small, *large])), tmp_path / "out", ("contrast",)
    )
    assert counts == {"contrast-3.tar": 1} and faults.counts == {"small image": 1}
    # and nothing is begun without a single one
    with pytest.raises(ValueError, match="can be corrupted: 1 small image"):
        corrupt_shards(str(make_shard("small.tar", small)), tmp_path / "none", ("contrast",))
    assert list((tmp_path / "none").iterdir()) == []


def test_keys_that_come_twice_are_an_error(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    shards = f"{make_shard('a.tar')}::{make_shard('b.tar')}"
    with pytest.raises(ValueError, match=r"b\.tar has the key 00000"):
        corrupt_shards(shards, tmp_path / "out", ("contrast",))


def test_nothing_is_overwritten(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    shard, out = str(make_shard()), tmp_path / "out"
    corrupt_shards(shard, out, ("contrast",))
    with pytest.raises(FileExistsError, match=r"contrast-3\.tar"):
        corrupt_shards(shard, out, ("fog", "contrast"))
    assert not (out / "fog-3.tar").exists()
