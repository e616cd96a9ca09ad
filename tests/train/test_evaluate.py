"""`fastclip eval` and `convert` of systems: heads weighed on held-out data, averages, controls."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastclip.cli import main
from fastclip.cli.eval import classification
from fastclip.evaluate.features import ImageFeatures
from fastclip.train.config import parse
from fastclip.train.loop import train


@pytest.fixture
def rocket(train_flags: list[str]) -> Path:
    flags = [*train_flags, "--objective", "rocket", "--head-hidden", "12", "--strong-views", "1"]
    return train(parse([*flags, "--epochs", "1", "--ema", "0.5", "--name", "rocket"]))


def evaluate(run: Path, *more: str) -> int:
    flags = ["--model", str(run), "--workers", "0", "--num-samples", "60"]
    return main(["eval", "zeroshot", *flags, *more])


def test_heads_are_weighed_on_other_data(rocket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(rocket, "--held-out", "scenes:split=compositional") == 0
    chosen = json.loads(capsys.readouterr().out)
    assert chosen["head_weight"] in [step / 10 for step in range(11)]
    weight = str(chosen["head_weight"])
    assert evaluate(rocket, "--head-weight", weight) == 0
    assert json.loads(capsys.readouterr().out) == chosen
    assert evaluate(rocket, "--average") == 0
    assert "head_weight" not in json.loads(capsys.readouterr().out)


def test_the_weight_is_chosen_on_the_held_out_images(
    rocket: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def noted(model: object, images: ImageFeatures, *_: object, **__: object) -> dict:
        seen.extend(images.keys)
        return {0.2: 0.5, 0.7: 0.25}

    monkeypatch.setattr(classification, "accuracy_by_head_weight", noted)
    assert evaluate(rocket, "--held-out", "scenes:split=compositional") == 0
    assert seen == [f"compositional{number:08d}" for number in range(60)]
    chosen = json.loads(capsys.readouterr().out)
    assert chosen["head_weight"] == 0.2
    # and the test images are scored with it
    assert evaluate(rocket, "--head-weight", "0.2") == 0
    assert json.loads(capsys.readouterr().out) == chosen


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--held-out", "scenes"], "choose the weight on other data than the test data"),
        (["--head-weight", "1.5"], "give one in [0, 1]"),
        (["--head-weight", "0.5", "--held-out", "x.tar"], "or --held-out to choose it on"),
    ],
)
def test_mistakes(
    rocket: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(rocket, *more) == 1
    assert message in capsys.readouterr().err


def test_a_plain_model_has_no_heads_to_weigh(
    train_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(parse([*train_flags, "--epochs", "1", "--name", "clip"]))
    assert evaluate(run, "--head-weight", "0.5") == 1
    assert "has no weak and strong heads; leave it out" in capsys.readouterr().err
    assert evaluate(run, "--average") == 1
    assert "its run had no --ema" in capsys.readouterr().err


def test_a_system_is_no_model_of_open_clips(
    rocket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "to-open-clip", str(rocket), str(tmp_path / "out.pt")]) == 1
    assert "an open_clip model, which has no place for its heads" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


def test_models_without_language(
    train_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*train_flags, "--objective", "classify", "--epochs", "1", "--name", "labels"]
    run = train(parse(flags))
    assert evaluate(run) == 0
    assert {"acc1", "acc5"} <= json.loads(capsys.readouterr().out).keys()
    assert main(["eval", "retrieval", "--model", str(run)]) == 1
    assert "trained without language: there is nothing for retrieval" in capsys.readouterr().err
    names = tmp_path / "names.txt"
    names.write_text("red square\nred circle\n")
    assert evaluate(run, "--classes", str(names)) == 1
    assert "names.txt has 2 classes, the classifier has" in capsys.readouterr().err
    output = tmp_path / "features.npy"
    embed = ["embed", "images", "scenes", "--model", str(run), "-o", str(output)]
    assert main([*embed, "--workers", "0", "--num-samples", "20"]) == 0
    assert np.load(output).shape == (20, 16)
