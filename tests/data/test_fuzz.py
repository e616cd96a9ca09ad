"""Damaged tars: nothing but faults comes out, in little time and memory."""

import multiprocessing
import random
import signal
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from fastclip.data.samples import UnreadableSample
from fastclip.data.shards import ShardSource
from tests.data.hostile import END, encoded, forget_peak, member, pax, peak_mebibytes

# for one tar, of which the usual time is a millisecond; other work may share the processor
SECONDS = 10.0
# Growth of the process over all of them, beyond what the whole tars took.
MEBIBYTES = 64

FORMS = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("jpg", "WEBP"))
NUMBERS = (b"-0000000001\0", b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"zz")


class Result(NamedTuple):
    """Of all the cases: what should not be (none), the slowest, the growth, what was seen."""

    failures: list[str]
    seconds: float
    mebibytes: float
    read: int
    unread: int
    faults: int


def named(name: str, content: bytes, rng: random.Random) -> bytes:
    """A member, its name in an extended header where it is long and sometimes where it is not."""
    before = b""
    if len(name) > 100 or rng.random() < 0.2:
        long_link = member("././@LongLink", name.encode() + b"\0", b"L")
        before = rng.choice((long_link, pax(("path", name.encode()))))
    return before + member(name, content)


def whole_tar(rng: random.Random) -> bytes:
    """Three to six samples in any of the forms."""
    members = []
    for number in range(rng.randint(3, 6)):
        key = rng.choice(("", "", "d/" + "n" * 120)) + f"{number:04d}"
        extension, form = rng.choice(FORMS)
        side = rng.randint(8, 16)
        color = tuple(rng.randrange(256) for _ in range(3))
        image = encoded(Image.new("RGB", (side, side), color), form)
        parts = {extension: image, "txt": f"about {number}".encode()}
        if rng.random() < 0.3:
            parts["json"] = b'{"captions": ["one", "two"]}'
        if rng.random() < 0.3:
            parts["cls"] = b"%d" % number
        members += [named(f"{key}.{each}", content, rng) for each, content in parts.items()]
    return b"".join(members) + END


def mutated(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """A tar with one to four things done to it."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        blocks = max(1, len(data) // 512)
        block, another = 512 * rng.randrange(blocks), 512 * rng.randrange(blocks)
        what = rng.randrange(9)
        if what == 0:
            for _ in range(rng.randint(1, 16)):
                place = rng.randrange(max(1, len(data)))
                data[place : place + 1] = bytes([rng.randrange(256)])
        elif what == 1:
            place = block + rng.randrange(512)
            data[place : place + 1] = (
                bytes([data[place] ^ 1 << rng.randrange(8)]) if place < len(data) else b""
            )
        elif what == 2:
            del data[rng.randrange(len(data) + 1) :]
        elif what == 3:
            data[block:block] = data[another : another + 512]
        elif what == 4:
            del data[block : block + 512]
        elif what == 5:
            data[block : block + 512], data[another : another + 512] = (
                data[another : another + 512],
                data[block : block + 512],
            )
        elif what == 6:
            place = 512 * rng.randrange(len(other) // 512)
            data[block:] = other[place:]
        elif what == 7:
            number = rng.choice(NUMBERS)
            data[block + 124 : block + 124 + len(number)] = number
            resign(data, block)
        else:
            place = rng.choice((0, 100, 156, 157, 257, 345, 482))
            junk = rng.randbytes(rng.randint(1, 12))
            data[block + place : block + place + len(junk)] = junk
            resign(data, block)
    return bytes(data)


def resign(data: bytearray, block: int) -> None:
    """Give a header a right checksum, so that what else is wrong with it comes to bear."""
    header = data[block : block + 512]
    if len(header) == 512:
        total = sum(header) - sum(header[148:156]) + 8 * 32
        data[block + 148 : block + 156] = b"%06o\0 " % total


def read_all(path: Path, result: list[int]) -> None:
    """Index a tar and read each of its samples; counts what came of it."""
    try:
        source = ShardSource(str(path))
    except ValueError as error:
        assert "no readable sample in 1 shards" in str(error)
        assert str(path) in str(error)
        return
    assert source.counts[0] < 100
    for number in range(source.counts[0]):
        try:
            sample = source.read(0, number)
        except UnreadableSample as error:
            assert error.fault.where.startswith(str(path))
            result[1] += 1
            continue
        assert sample.image.mode == "RGB" and sample.texts
        for text in sample.texts:
            assert text.strip() and "\0" not in text and text.encode()
        assert sample.key.isprintable()
        result[0] += 1
    result[2] += len(source.drain_faults())


def run(cases: int) -> Result:
    """All cases one after another, in a process of its own."""

    def stop(*arguments: object) -> None:
        raise TimeoutError(f"over {SECONDS} seconds")

    signal.signal(signal.SIGALRM, stop)
    failures: list[str] = []
    counts = [0, 0, 0]
    slowest = 0.0
    rng = random.Random(0)
    originals = [whole_tar(rng) for _ in range(50)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        for content in originals:
            path.write_bytes(content)
            read_all(path, counts)
        assert counts[0] >= 150 and counts[1:] == [0, 0]
        forget_peak()
        before = peak_mebibytes()
        for case in range(cases):
            rng = random.Random(case)
            path.write_bytes(mutated(rng.choice(originals), rng.choice(originals), rng))
            start = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                read_all(path, counts)
            except Exception:
                failures.append(f"case {case}: {traceback.format_exc()}")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.monotonic() - start)
    return Result(failures, slowest, peak_mebibytes() - before, *counts)


@pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.fuzz)])
def test_damaged_tars(cases: int) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        result = pool.submit(run, cases).result(timeout=600)
    assert not result.failures, result.failures[0]
    assert result.seconds < SECONDS
    assert result.mebibytes < MEBIBYTES
    # the damage is such that much can still be read, and much cannot
    assert result.read > cases
    assert result.unread > cases // 20
    assert result.faults > cases // 2
