"""A teacher's features in shards: with their sample in any order, and what is no such feature."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastclip.data.augment import Augmentation
from fastclip.data.loader import TrainingLoader
from fastclip.data.order import Order
from fastclip.data.samples import decode_features
from fastclip.data.shards import ShardSource
from fastclip.data.sources import open_source
from fastclip.data.training_samples import TrainingSamples
from tests.conftest import jpeg

MakeShard = Callable[..., Path]
IMAGE, TEXT = "teacher_image_features", "teacher_text_features"


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values))
    return file.getvalue()


def members(numbers: range) -> list[tuple[str, bytes]]:
    """Samples whose features say their number: of the image by 2, of the text by 3."""
    found = []
    for i in numbers:
        vector = np.arange(1, 5, dtype=np.float16) * (i + 1)
        found += [(f"{i}.jpg", jpeg((i * 9, 9, 9))), (f"{i}.txt", f"number {i}".encode())]
        found += [
            (f"{i}.teacher_image.npy", npy(2 * vector)),
            (f"{i}.teacher_text.npy", npy(3 * vector)),
        ]
    return found


def samples_of(path: str) -> TrainingSamples:
    source = ShardSource(path, features=True)
    order = Order(source.counts, seed=0, window=5)
    tokenizer = lambda texts: torch.zeros(len(texts), 4, dtype=torch.int64)  # noqa: E731
    views = Augmentation(8)
    return TrainingSamples(source, order, views, tokenizer, one_text=True, features=True)


def changed(change: dict[str, bytes | None], make_shard: MakeShard) -> TrainingSamples:
    """Of eight samples, some of whose members are others, or are left out."""
    kept = [(name, change.get(name, content)) for name, content in members(range(8))]
    kept += [(name, content) for name, content in change.items() if name not in dict(kept)]
    listed = [(name, content) for name, content in kept if content is not None]
    return samples_of(str(make_shard(members=listed)))


@pytest.mark.parametrize("workers", [0, 2])
def test_they_come_with_their_sample(workers: int, make_shard: MakeShard, tmp_path: Path) -> None:
    for number in range(2):
        make_shard(f"{number}.tar", members(range(12 * number, 12 * (number + 1))))
    pattern = str(tmp_path / "{0..1}.tar")
    seen = []
    for rank in range(2):
        loader = TrainingLoader(
            samples_of(pattern), batch_size=3, workers=workers, rank=rank, world_size=2
        )
        # a second epoch, as a run resumed after its first step reads it
        for batch in loader.batches(1, first_step=1):
            keys = torch.tensor([int(key) for key in batch["key"]])
            vector = torch.arange(1.0, 5) * (keys[:, None] + 1)
            assert batch[IMAGE].dtype == torch.float32
            assert batch[IMAGE].equal(2 * vector) and batch[TEXT].equal(3 * vector)
            seen += keys.tolist()
    assert len(set(seen)) == len(seen) == 18
    assert seen != sorted(seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"3.teacher_text.npy": None},
            "shard-00000.tar:3.teacher_text.npy is missing: --distill-shards reads a teacher's "
            "features of every sample; write shards with fastclip embed shards",
        ),
        ({"3.teacher_text.npy": npy(np.ones(7))}, "3.teacher_text.npy has 7 numbers, other feat"),
        ({"3.teacher_image.npy": b"?"}, "shard-00000.tar:3.teacher_image.npy holds no features"),
        (
            {"3.json": b'{"captions": ["one", "two"]}'},
            "shard-00000.tar:3.jpg has 2 captions, and the teacher's stored features are of one",
        ),
    ],
)
def test_a_sample_without_its_features_is_an_error(
    change: dict[str, bytes | None], message: str, make_shard: MakeShard
) -> None:
    samples = changed(change, make_shard)
    with pytest.raises(ValueError, match=re.escape(message)):
        for position in range(8):
            samples[0, position]


def test_a_damaged_image_needs_none(make_shard: MakeShard) -> None:
    """It is replaced by another sample, with that one's features."""
    samples = changed({"3.jpg": jpeg()[:200], "3.teacher_image.npy": None}, make_shard)
    read = [samples[0, position] for position in range(8)]
    assert "3" not in [sample["key"] for sample in read]
    assert [fault.kind for sample in read for fault in sample["faults"]] == ["corrupt image"]
    for sample in read:
        assert sample[IMAGE][0] == 2 * (int(sample["key"]) + 1)


def huge_header() -> bytes:
    """A vector that claims a million million numbers."""
    return npy(np.ones(2)).replace(b"(2,), }            ", b"(1000000000000,), }")


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, np.ones(4))
    return file.getvalue()


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        npy(np.ones((1, 4))),
        npy(np.ones(4, np.int32)),
        npy(np.ones(0)),
        npy(np.array([1, None])),
        npy(np.array([1.0, np.nan])),
        npy(np.ones(4))[:-1],
        npy(np.ones(4)) + b"12345678",
        npy(np.ones(1 << 18)),
        huge_header(),
        archive(),
    ],
)
def test_what_is_no_vector(encoded: bytes) -> None:
    with pytest.raises(ValueError, match=r"^a\.npy holds no features"):
        decode_features(encoded, "a.npy")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_floating_type_is_read_as_float32(dtype: Any) -> None:
    found = decode_features(npy(np.array([1, -0.5], dtype)), "a.npy")
    assert found.dtype == np.float32 and found.tolist() == [1, -0.5]


@pytest.mark.parametrize("declared", [None, 2, 3])
def test_rows_elsewhere_want_every_sample(
    declared: int | None, make_shard: MakeShard, tmp_path: Path
) -> None:
    """The second sample has no caption: is the second row its, or the third sample's?"""
    kept = [(n, content) for n, content in members(range(3)) if n != "1.txt"]
    path = str(make_shard(members=kept))
    if declared:
        (tmp_path / "sizes.json").write_text(f'{{"shard-00000.tar": {declared}}}')
    with pytest.raises(ValueError, match=r"00000\.tar: 1 times sample without txt\. Rows of --dis"):
        open_source(path, split="train", by_row=True).read(0, 0)
    assert open_source(path, split="train", features=True).read(0, 1).key == "2"


def test_only_shards_hold_features() -> None:
    with pytest.raises(ValueError, match="scenes is scenes, and only shards hold a teacher's"):
        open_source("scenes", split="train", features=True)
