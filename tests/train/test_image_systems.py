"""Language-free controls in training: heads on one backbone, labels by text match."""

import json
import math
from pathlib import Path

import pytest
import torch

import fastclip
from fastclip.cli import main
from fastclip.data.scenes import CLASSES
from fastclip.models.classifier import Classifier
from fastclip.train.config import parse
from fastclip.train.log import read_metrics
from fastclip.train.loop import train


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "epoch_1.pt", weights_only=True)["state_dict"]


@pytest.fixture
def flags(train_flags: list[str]) -> list[str]:
    return [*train_flags, "--epochs", "1"]


@pytest.fixture
def clip(flags: list[str]) -> Path:
    return train(parse([*flags, "--name", "clip"]))


def test_three_heads_on_one_backbone(clip: Path, flags: list[str]) -> None:
    """Zero-shot, linear on frozen features, and fine-tuned."""
    classify = [*flags, "--objective", "classify", "--finetune", str(clip), "--val-data", "scenes"]
    begun = weights(clip)
    # nothing learned: the classifier is zero-shot classification by the text tower
    still = ["--classifier", "zeroshot", "--lr", "0", "--wd", "0"]
    zeroshot = train(parse([*classify, *still, "--name", "zeroshot"]))
    own = read_metrics(zeroshot)[-1]["val/acc1"]
    assert main(["eval", "zeroshot", "--model", str(clip), "--workers", "0"]) == 0
    written = json.loads((clip / "eval" / "zeroshot_scenes.json").read_text())
    assert own == pytest.approx(written["metrics"]["acc1"], abs=1e-9)

    linear = train(parse([*classify, "--lock-image", "--name", "linear"]))
    tuned = train(parse([*classify, "--name", "tuned"]))
    visual = [name for name in begun if name.startswith("visual.")]
    assert all(torch.equal(weights(linear)[name], begun[name]) for name in visual)
    assert not all(torch.equal(weights(tuned)[name], begun[name]) for name in visual)
    assert weights(linear)["criterion.weight"].abs().max() > 0
    model = fastclip.load(tuned).model
    assert isinstance(model, Classifier)
    assert model.classify(torch.zeros(2, 3, 16, 16)).shape == (2, len(CLASSES))
    with pytest.raises(ValueError, match="was trained without language"):
        model.encode_text(torch.zeros(1, 12, dtype=torch.long))


def test_a_classifier_begins_with_the_prompts_and_the_scale_of_clip(
    clip: Path, flags: list[str], tmp_path: Path
) -> None:
    """By the templates asked for; nothing is learned."""
    templates = ["{} from afar", "the {c}"]
    (tmp_path / "templates.txt").write_text("\n".join(templates))
    classify = f"--objective classify --classifier zeroshot --finetune {clip} --lr 0 --wd 0"
    asked = [*classify.split(), "--templates", f"{tmp_path}/templates.txt", "--name", "z"]
    found, begun = weights(train(parse([*flags, *asked]))), weights(clip)
    scale = begun["logit_scale"]
    # it was trained, so that the scale of a new classifier is another
    assert (scale - math.log(1 / 0.07)).abs() > 1e-4 and found["criterion.logit_scale"] == scale
    model, _, tokenizer = fastclip.load(clip)
    expected = []
    for name in CLASSES:
        prompts = tokenizer([f"{name} from afar", f"the {name}"])
        with torch.no_grad():
            expected.append(model.encode_text(prompts, normalize=True).mean(0))
    for ours, mean in zip(found["criterion.weight"], expected, strict=True):
        torch.testing.assert_close(ours, mean / mean.norm(), rtol=0, atol=1e-6)


def test_simclr_then_finetuned_by_text_match(flags: list[str], tmp_path: Path) -> None:
    simclr = ["--objective", "simclr", "--projector-hidden", "12", "--projector-width", "8"]
    first = train(parse([*flags, *simclr, "--name", "simclr"]))
    names = tmp_path / "names.txt"
    names.write_text("red\ngreen\nblue\nsquare\n")
    text = ["--objective", "classify", "--label-source", "text", "--classes", str(names)]
    second = train(parse([*flags, *text, "--finetune", str(first), "--name", "noclip"]))
    assert weights(second)["criterion.weight"].shape[0] == 4
    losses = [line["loss"] for line in read_metrics(second) if "loss" in line]
    # labels were found: without any the loss would be 0
    assert min(losses) > 0.5


def test_what_cannot_be_is_reported(
    clip: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(*more: str) -> str:
        assert main(["train", *flags, "--name", "x", *more]) == 1
        return capsys.readouterr().err

    uniclip = [*flags, "--objective", "uniclip", "--strong-views", "0", "--name", "uniclip"]
    run = train(parse(uniclip))
    zeroshot = ("--objective", "classify", "--classifier", "zeroshot", "--finetune")
    assert "is a UniClip, which compares text with what its heads make" in error_of(
        *zeroshot, str(run)
    )
    assert "no class names: give --classes FILE" in error_of(
        "--objective", "classify", "--train-data", "synthetic"
    )
    other = json.loads((Path(parse(flags).model.model)).read_text())
    other["vision_cfg"]["width"] = 24
    path = clip.parent / "other.json"
    path.write_text(json.dumps(other))
    finetune = ("--objective", "simclr", "--finetune", str(clip), "--model", str(path))
    message = error_of(*finetune)
    assert "of another shape: class_embedding (16,) for (24,)" in message
    assert "give the --model that it was trained with" in message
