"""`fastclip convert cifar10` on a small data set in torchvision's own layout."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from fastclip.cli import main
from fastclip.data.convert import CIFAR10_TEMPLATES, convert_cifar10
from fastclip.data.shards import ShardSource

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
    assert "train: 36 samples in 1 shards" in capsys.readouterr().err
    # nothing is overwritten, and a source that is not there is explained
    assert main(["convert", "cifar10", str(small_cifar10), target]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["convert", "cifar10", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 1
    assert "holds no whole CIFAR-10" in capsys.readouterr().err
