"""Damaged checkpoints: none loads as something else; an error names the file, or all is equal."""

import random
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.atomic import describe
from fastclip.models import checkpoint, sharded

Reader = Callable[[Path], Any]


def training_state() -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(0)
    weights = {
        "visual.weight": torch.randn(8, 16, generator=drawn),
        "text.weight": torch.randn(8, 16, generator=drawn).bfloat16(),
        "logit_scale": torch.tensor(2.6),
    }
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(8, 16, generator=drawn)}}
    return {
        "step": 7,
        "epoch": 1,
        "data": {"position": 1024, "counts": [5, 6, 7]},
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "state_dict": weights,
    }


def ours(folder: Path) -> tuple[Path, list[Reader]]:
    """A checkpoint with a manifest."""
    checkpoint.write(folder / "c.pt", training_state())
    return folder / "c.pt", [checkpoint.read, checkpoint.read_weights]


def open_clips(folder: Path) -> tuple[Path, list[Reader]]:
    """A file of the open_clip trainer: nothing vouches for it but the zip's own sums."""
    torch.save({**training_state(), "name": "x"}, folder / "c.pt")
    return folder / "c.pt", [checkpoint.read, checkpoint.read_weights]


def bare(folder: Path) -> tuple[Path, list[Reader]]:
    """A state dictionary alone."""
    torch.save(training_state()["state_dict"], folder / "c.bin")
    return folder / "c.bin", [checkpoint.read_weights]


def deepspeeds(folder: Path) -> tuple[Path, list[Reader]]:
    """The plain state in a folder of DeepSpeed's, whose manifest is beside the folder."""
    (folder / "c").mkdir()
    file = folder / "c" / sharded.TRAINING
    torch.save({**training_state(), "zero": {"stage": 3}}, file)
    text = sharded.manifest_text(7, {sharded.TRAINING: describe(file)})
    (folder / "c.json").write_text(text)
    return file, [lambda path: checkpoint.read(path.parent)]


FORMS = (ours, open_clips, bare, deepspeeds)


def flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 1, 2, 20))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def flip_weights(data: bytearray, draw: random.Random) -> None:
    """A bit of a tensor: the damage that a reader without sums cannot see."""
    start, size = draw.choice([member for member in members(data) if member[1] >= 256])
    data[start + draw.randrange(size)] ^= 1 << draw.randrange(8)


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def cut_out(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    del data[start : start + draw.choice((1, 64, 512))]


def blank(data: bytearray, draw: random.Random) -> None:
    """A block that never reached the disk."""
    start = draw.randrange(len(data)) // 512 * 512
    data[start : start + 512] = bytes(len(data[start : start + 512]))


def lengthen(data: bytearray, draw: random.Random) -> None:
    data.extend(draw.randbytes(draw.choice((1, 64, 5000))))


def swap_contents(data: bytearray, draw: random.Random) -> None:
    """Two members' bytes change places."""
    (a, size), (b, other) = draw.sample(members(data), 2)
    size = min(size, other)
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def swap_names(data: bytearray, draw: random.Random) -> None:
    """Two entries of the directory, which holds the sums too, point to each other's contents."""
    entries = directory(data)
    a, b = (entry + 42 for entry in draw.sample(entries, 2))
    data[a : a + 4], data[b : b + 4] = data[b : b + 4], data[a : a + 4]


def directory(data: bytearray) -> list[int]:
    """Where the entries of a zip's directory begin."""
    return [i for i in range(len(data)) if data[i : i + 4] == b"PK\1\2"]


def members(data: bytearray) -> list[tuple[int, int]]:
    """Where the contents of a zip's members begin, and their sizes."""
    found = []
    for entry in directory(data):
        size, start = (struct.unpack_from("<I", data, entry + place)[0] for place in (24, 42))
        name, extra = struct.unpack_from("<HH", data, start + 26)
        found.append((start + 30 + name + extra, size))
    return found


DAMAGES = (flip, flip_weights, cut, cut_out, blank, lengthen, swap_contents, swap_names)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, keys and kinds too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("cases", [160, pytest.param(2000, marks=pytest.mark.fuzz)])
def test_no_damaged_checkpoint_loads_as_another(cases: int, tmp_path: Path) -> None:
    seen: Counter[tuple[str, str, str]] = Counter()
    wrong = []
    for number in range(cases):
        form, damage = FORMS[number % 4], DAMAGES[number // 4 % 8]
        folder = tmp_path / str(number)
        folder.mkdir()
        path, readers = form(folder)
        wanted = [reader(path) for reader in readers]
        data = bytearray(path.read_bytes())
        damage(data, random.Random(number))
        path.write_bytes(data)
        for reader, whole in zip(readers, wanted, strict=True):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    equal = same(reader(path), whole)
                outcome = "equal" if equal else "another"
            except ValueError as error:
                outcome = "refused" if str(folder / "c") in str(error) else f"nameless: {error}"
            except Exception as error:
                outcome = repr(error)
            seen[form.__name__, damage.__name__, outcome] += 1
            if outcome not in ("equal", "refused"):
                wrong.append((number, form.__name__, damage.__name__, outcome))
    for what, count in sorted(seen.items()):
        print(*what, count)
    assert not wrong, f"{len(wrong)} of {cases}: {wrong[:5]}"
    assert all(
        any(seen[form.__name__, damage.__name__, "refused"] for form in FORMS) for damage in DAMAGES
    )


def test_a_file_without_sums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path, readers = open_clips(tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert all(reader(path) for reader in readers)


def test_a_packed_file_is_refused(tmp_path: Path) -> None:
    path, _ = open_clips(tmp_path)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"packed\.pt.*compressed"):
        checkpoint.read(packed)
