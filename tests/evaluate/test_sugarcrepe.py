"""SugarCrepe in its published layout, with a planned model and with real cases."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastclip.cli.eval.compositional import SugarCrepe
from fastclip.evaluate.features import Encoding
from fastclip.evaluate.sugarcrepe import SETS, evaluate_sugarcrepe
from fastclip.models.clip import Model, create
from tests.evaluate.planned import BLUE, GREEN, RED, paint, planned_model, write_json
from tests.train.conftest import tiny_model

__all__ = ["tiny_model"]  # fixtures

NAMES = {"red.jpg": RED, "green.jpg": GREEN, "blue.jpg": BLUE}
# more like red than like green or blue, and so on; gray is as near to all
TEXTS = {
    "red": (9, 1, 1),
    "green": (1, 9, 1),
    "blue": (1, 1, 9),
    "gray": (5, 5, 5),
    "ash": (1,) * 3,
}


def lay_out(root: Path, sets: dict[str, list[tuple[str, str, str]]]) -> Model:
    """The sets' files of (image, caption, negative), and the images."""
    for name, rows in sets.items():
        entries = [
            {"filename": f"{image}.jpg", "caption": caption, "negative_caption": negative}
            for image, caption, negative in rows
        ]
        numbered = {str(number): entry for number, entry in enumerate(entries)}
        write_json(root / "sugar_crepe" / f"{name}.json", numbered)
    for name, color in NAMES.items():
        paint(root / "val2017" / name, color)
    return planned_model(TEXTS)


def test_by_hand(tmp_path: Path) -> None:
    sets = {
        # right; wrong
        "add_att": [("red", "red", "blue"), ("red", "blue", "red")],
        "add_obj": [("blue", "blue", "gray")],
        # equal scores are wrong
        "replace_att": [("green", "gray", "ash"), ("green", "green", "blue")],
        "replace_obj": [("green", "red", "green")],
        "replace_rel": [("green", "green", "red"), ("red", "gray", "blue"), ("red", "red", "gray")],
        "swap_att": [("blue", "red", "blue")],
        "swap_obj": [("blue", "blue", "red"), ("blue", "gray", "red"), ("blue", "gray", "blue")],
    }
    metrics = evaluate_sugarcrepe(lay_out(tmp_path, sets), tmp_path, Encoding())
    shares = {
        "add_att": 1 / 2,
        "add_obj": 1.0,
        "replace_att": 1 / 2,
        "replace_obj": 0.0,
        "replace_rel": 1.0,
        "swap_att": 0.0,
        "swap_obj": 2 / 3,
    }
    assert {name: metrics[name] for name in SETS} == shares
    assert metrics["add"] == pytest.approx(3 / 4)
    assert metrics["replace"] == pytest.approx(1 / 2)
    assert metrics["swap"] == pytest.approx(1 / 3)
    assert metrics["macro"] == pytest.approx((1 / 2 + 1 + 1 / 2 + 1 + 2 / 3) / 7)
    assert metrics["micro"] == pytest.approx(8 / 13)
    assert metrics["ties"] == pytest.approx(1 / 13)
    assert metrics["sets"] == 7
    assert metrics["cases"] == {name: len(rows) for name, rows in sets.items()}


def test_sets_that_are_there(tmp_path: Path) -> None:
    sets = {"swap_obj": [("red", "red", "blue")], "add_obj": [("red", "blue", "red")]}
    metrics = evaluate_sugarcrepe(lay_out(tmp_path, sets), tmp_path, Encoding())
    assert metrics["sets"] == 2 and metrics["macro"] == 0.5
    assert (metrics["add"], metrics["swap"]) == (0, 1) and "replace" not in metrics
    assert list(metrics["cases"]) == ["add_obj", "swap_obj"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"sugar_crepe/add_att\.json") as message:
        evaluate_sugarcrepe(planned_model(TEXTS), tmp_path, Encoding())
    assert "github.com/RAIVNLab/sugar-crepe" in str(message.value)


def test_missing_images_are_named(tmp_path: Path) -> None:
    model = lay_out(tmp_path, {"add_att": [("red", "red", "blue"), ("gone", "red", "blue")]})
    with pytest.raises(ValueError, match=r"1 of 2 image files are missing: .*gone\.jpg"):
        evaluate_sugarcrepe(model, tmp_path, Encoding())


def test_real_cases(real_data: Path) -> None:
    """211 published cases, read as they are."""
    torch.manual_seed(0)
    model = create("RN10t-64")
    model.model.eval()
    root = real_data / "coco_mini"
    metrics = evaluate_sugarcrepe(model, root, Encoding(batch_size=64))
    assert metrics["sets"] == 7 and sum(metrics["cases"].values()) == 211
    # one image and one text at a time, with nothing of the evaluation's
    published = json.loads((root / "sugar_crepe" / "swap_obj.json").read_text()).values()
    right = 0
    with torch.no_grad():
        for entry in published:
            pixels = model.preprocess(Image.open(root / "val2017" / entry["filename"]))
            image = model.model.encode_image(pixels[None], normalize=True)
            true, false = (
                (image @ model.model.encode_text(model.tokenizer([text]), normalize=True).T).item()
                for text in (entry["caption"], entry["negative_caption"])
            )
            right += true > false
    assert metrics["cases"]["swap_obj"] == len(published)
    assert metrics["swap_obj"] == right / len(published)


def test_command(
    tmp_path: Path,
    tiny_model: str,
    capsys: pytest.CaptureFixture[str],
    logged: Callable[[], str],
) -> None:
    lay_out(tmp_path / "data", {"add_att": [("red", "red", "blue")]})
    weights = tmp_path / "weights.pt"
    torch.save(create(tiny_model).model.state_dict(), weights)
    output = tmp_path / "result.json"
    command = SugarCrepe(
        model=tiny_model,
        pretrained=str(weights),
        device="cpu",
        workers=0,
        root=tmp_path / "data",
        output=output,
    )
    assert command.run() == 0
    message = capsys.readouterr()
    result = json.loads(output.read_text())
    assert result["dataset"] == "sugarcrepe" and result["task"] == "image_caption_selection"
    assert result["metrics"] == json.loads(message.out) and result["metrics"]["sets"] == 1
    assert "add_obj.json" in (noted := logged()) and "add_att.json" not in noted
