"""What damaged and malicious shards and images come to: a stated outcome, in bounds."""

import io
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image
from torchvision.transforms.v2.functional import resize

from fastclip.data.index import Fault, index_shard
from fastclip.data.samples import (
    MAX_ASPECT,
    MAX_IMAGE_PIXELS,
    UnreadableSample,
    decode_image,
)
from fastclip.data.shards import ShardSource
from tests.data.bombs import bombs
from tests.data.hostile import JPEG, encoded, pictures, tars

PICTURES = pictures() | bombs()
EXCESS = "image too complex"
# of any of the fixtures, on a busy machine; the largest take about a second
SECONDS = 20.0
# that Python allocates for an index; the fixtures claim up to 2^80 bytes
INDEX_BYTES = 4 << 20
BYTES_A_MEMBER = 600
# of any of the pictures, which claim up to 2^62 pixels
DECODING_MEBIBYTES = 32
MEASURE = """
import sys
from contextlib import suppress
from pathlib import Path

from fastclip.data.samples import (
    MAX_ASPECT,
    MAX_IMAGE_PIXELS,
    UnreadableSample,
    decode_image,
)

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

for path in sys.argv[1:]:
    content = Path(path).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    with suppress(UnreadableSample):
        decode_image(content, path)
    print(peak() - before)
"""


def as_pairs(path: Path, faults: list[Fault]) -> list[tuple[str, str]]:
    """Faults as (kind, member)."""
    assert all(fault.where.startswith(str(path)) for fault in faults)
    return [(fault.kind, fault.where.removeprefix(str(path)).removeprefix(":")) for fault in faults]


@pytest.mark.parametrize("name", tars())
def test_tars(name: str, tmp_path: Path) -> None:
    case = tars()[name]
    path = tmp_path / "00000.tar"
    case.write(path)
    start = time.monotonic()
    tracemalloc.start()
    index = index_shard(path, ("txt",))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [key for key, _ in index.samples] == list(case.keys)
    assert as_pairs(path, index.faults) == list(case.faults)
    assert sum(index.counts.values()) == len(index.faults)
    assert peak < INDEX_BYTES + 2 * BYTES_A_MEMBER * len(case.keys)
    if not case.keys:
        with pytest.raises(ValueError, match=f"{case.faults[0][0]}: {path}"):
            ShardSource(str(path))
        return
    source = ShardSource(str(path))
    assert source.counts == (len(case.keys),)
    # of the many, a few
    for number in sorted({*range(min(10, len(case.keys))), len(case.keys) - 1}):
        key = case.keys[number]
        if key in case.unreadable:
            with pytest.raises(UnreadableSample, match=case.unreadable[key]) as error:
                source.read(0, number)
            assert error.value.fault.where.startswith(f"{path}:{key}.")
        else:
            sample = source.read(0, number)
            assert (sample.key, sample.texts) == (key, (f"about {key}",))
            assert sample.image.size == (16, 16)
    assert as_pairs(path, source.drain_faults()) == list(case.faults)
    assert time.monotonic() - start < SECONDS


def test_pictures_take_little_memory(tmp_path: Path) -> None:
    paths = []
    for number, case in enumerate(PICTURES.values()):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(case.content)
    # a process that has not freed any memory it could use again
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True
    )
    if "clear_refs" in done.stderr:
        pytest.skip("the system cannot forget a process's peak of memory")
    assert done.returncode == 0, done.stderr
    growth = dict(zip(PICTURES, map(float, done.stdout.split()), strict=True))
    assert max(growth.values()) < DECODING_MEBIBYTES, growth


def test_the_narrowest_images_can_be_resized() -> None:
    content = encoded(Image.new("RGB", (MAX_ASPECT, 1)), "PNG")
    resized = resize(decode_image(content, "a"), [224])
    assert resized.size == (22_400, 224)
    assert resized.width * resized.height < MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    "before",
    [b"\xff\xd0x", b"\xff\xfe\0\0", b"\xff\xfe\0\1", b"\xff\xf0\xff\xff"],
    ids=["junk", "length 0", "length 1", "marker without a length"],
)
@pytest.mark.parametrize(
    "name", [n for n, case in PICTURES.items() if n.startswith("JPEG") and case.fault == EXCESS]
)
def test_jpegs_are_looked_at_as_pillow_does(name: str, before: bytes) -> None:
    """Whatever Pillow passes over hides nothing that it then parses."""
    start, rest = PICTURES[name].content[:2], PICTURES[name].content[2:]
    assert Image.open(io.BytesIO(start + before + JPEG[2:])).size == (16, 16)
    with pytest.raises(UnreadableSample, match=EXCESS):
        decode_image(start + before + rest, "00000.tar:a.jpg")


# of a palette with transparency
@pytest.mark.filterwarnings("ignore:Palette images")
# a line for each entry of EXIF
@pytest.mark.filterwarnings("ignore:Tag data larger")
@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(os, "system", start)
    case = PICTURES[name]
    began = time.monotonic()
    if case.fault:
        with pytest.raises(UnreadableSample) as error:
            decode_image(case.content, "00000.tar:a.jpg")
        assert (error.value.fault.kind, error.value.fault.where) == (case.fault, "00000.tar:a.jpg")
    else:
        image = decode_image(case.content, "00000.tar:a.jpg")
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", case.size, case.color)
    assert time.monotonic() - began < SECONDS
