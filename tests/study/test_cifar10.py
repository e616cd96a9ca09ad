"""CIFAR-10 in equal time: samples by speed, weights chosen on images that are not scored."""

import json
from pathlib import Path

import pytest

from fastclip.study import cifar10
from fastclip.study.cifar10 import study
from tests.conftest import jpeg, write_tar
from tests.evaluate.planned import planned_model
from tests.train.conftest import TINY_MODEL


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six shards of colored squares under CIFAR-10's names."""
    folder = tmp_path / "shards"
    folder.mkdir()
    colors = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
    (folder / "classes.txt").write_text("\n".join(colors) + "\n")
    for name in [*(f"train-{i:05d}" for i in range(5)), "val-00000"]:
        members = []
        for i in range(12):
            label = i % 3
            text = f"a photo of a {list(colors)[label]}."
            members += [
                (f"{i:04d}.jpg", jpeg(list(colors.values())[label], 16)),
                (f"{i:04d}.txt", text.encode()),
                (f"{i:04d}.cls", str(label).encode()),
            ]
        write_tar(folder / f"{name}.tar", members)
    return folder


def test_the_first_photographs_are_not_scored(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "HELD_OUT", 4)
    held_out, rest = cifar10.embed_test(planned_model({}), data)
    assert held_out.keys == [f"{i:04d}" for i in range(4)]
    assert rest.keys == [f"{i:04d}" for i in range(4, 12)]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_runs")
def test_a_system_in_a_table(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "HELD_OUT", 4)
    monkeypatch.setattr(cifar10, "TRIAL_STEPS", 2)
    monkeypatch.setattr(cifar10, "IMAGES", 60)
    monkeypatch.setattr(cifar10, "RECIPES", {"CLIP-Rocket": "cifar10_rocket"})
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    flags = f"--model {tmp_path}/tiny.json --batch-size 8 --workers 0 --device cpu"
    flags += " --precision fp32 --log-every-n-steps 1"
    report = study(data, tmp_path / "out", minutes=0.002, seeds=1, flags=flags.split())
    found = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    (outcome,) = found["CLIP-Rocket"]
    # eight images are scored
    assert (outcome["scores"]["accuracy"] * 8).is_integer()
    assert 0 <= outcome["scores"]["head_weight"] <= 1
    assert outcome["seconds"] > 0
    assert "| CLIP-Rocket |" in report and "the first 4" in report
    # another budget is another study
    with pytest.raises(FileExistsError, match="is of other flags"):
        study(data, tmp_path / "out", minutes=1, seeds=1, flags=flags.split())
