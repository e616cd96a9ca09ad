"""Winoground in its published layout; scores by hand and by the definition, ties included."""

import random
from pathlib import Path

import pytest

from fastclip.evaluate.choices import Scores
from fastclip.evaluate.features import Encoding
from fastclip.evaluate.winoground import Outcome, evaluate_winoground, judge
from fastclip.models.clip import Model
from tests.evaluate.planned import BLUE, GREEN, RED, WHITE, paint, planned_model, write_json

COLORS = {"red": RED, "green": GREEN, "blue": BLUE, "white": WHITE}
TEXTS = {"red": (9, 1, 1), "green": (1, 9, 1), "blue": (1, 1, 9), "gray": (5, 5, 5)}


@pytest.mark.parametrize(
    ("of_image_0", "of_image_1", "wanted"),
    [
        ((0.9, 0.1), (0.8, 0.2), Outcome(True, True, True, False)),
        # each image prefers its own, but caption 0 prefers image 1 (0.5 < 0.6)
        ((0.5, 0.1), (0.8, 0.6), Outcome(True, False, False, False)),
        # image 0 prefers caption 1 (0.5 < 0.6), but each caption its own image
        ((0.5, 0.6), (0.8, 0.2), Outcome(False, True, False, False)),
        ((0.1, 0.9), (0.2, 0.8), Outcome(False, False, False, False)),
        # equal to an image, equal to a caption, both
        ((0.5, 0.5), (0.8, 0.2), Outcome(False, True, False, True)),
        ((0.5, 0.1), (0.8, 0.5), Outcome(True, False, False, True)),
        ((0.5, 0.5), (0.5, 0.5), Outcome(False, False, False, True)),
        ((float("nan"), 0.1), (0.8, 0.2), Outcome(False, False, False, False)),
    ],
)
def test_one_example_by_hand(of_image_0: Scores, of_image_1: Scores, wanted: Outcome) -> None:
    assert judge(of_image_0, of_image_1) == wanted


def test_random_scores_equal_the_definition_and_chance() -> None:
    """All 24 orders of four scores are equally probable: 6, 6 and 4 of them are right."""
    rng = random.Random(0)
    totals = [0, 0, 0]
    for levels in (1 << 30, 3):
        for _ in range(2000):
            # s[caption][image], as the paper writes it
            s = [[rng.randrange(levels) for _ in range(2)] for _ in range(2)]
            text = s[0][0] > s[1][0] and s[1][1] > s[0][1]
            image = s[0][0] > s[0][1] and s[1][1] > s[1][0]
            found = judge((s[0][0], s[1][0]), (s[1][1], s[0][1]))
            assert found[:3] == (text, image, text and image)
            if levels > 3:
                assert not found.ties
                totals = [total + right for total, right in zip(totals, found[:3], strict=True)]
    # four standard deviations of 2000 draws
    shares = [total / 2000 for total in totals]
    for share, chance in zip(shares, (1 / 4, 1 / 4, 1 / 6), strict=True):
        assert abs(share - chance) < 4 * (chance * (1 - chance) / 2000) ** 0.5


def lay_out(root: Path, rows: list[tuple[str, str, str, str, str]]) -> Model:
    """Examples of (image 0, image 1, caption 0, caption 1, collapsed tag)."""
    examples = []
    for number, (*images, caption_0, caption_1, tag) in enumerate(rows):
        names = [f"ex_{number}_img_{i}" for i in range(2)]
        for name, color in zip(names, images, strict=True):
            paint(root / "images" / f"{name}.png", COLORS[color])
        examples.append(
            {
                "id": number,
                "image_0": names[0],
                "image_1": names[1],
                "caption_0": caption_0,
                "caption_1": caption_1,
                "tag": "Adjective-Color",
                "secondary_tag": "",
                "num_main_preds": 1,
                "collapsed_tag": tag,
            }
        )
    write_json(root / "examples.jsonl", examples)
    return planned_model(TEXTS)


def test_by_hand(tmp_path: Path) -> None:
    rows = [
        ("red", "blue", "red", "blue", "Object"),
        ("red", "blue", "blue", "red", "Object"),
        # white is as near to red as to blue: the second image prefers neither
        ("red", "white", "red", "blue", "Relation"),
        # the first image and caption fit, and so do the second
        ("green", "white", "green", "gray", "Relation"),
        ("green", "red", "green", "red", "Both"),
    ]
    metrics = evaluate_winoground(lay_out(tmp_path, rows), tmp_path, Encoding())
    # cosines of example 3, caption 0: 0.99 with red, 0.70 with white; caption 1: 0.11, 0.70.
    # Of example 4, caption 0: 0.99, 0.70; caption 1: 0.58, 1
    assert metrics["text_score"] == pytest.approx(3 / 5)
    assert metrics["image_score"] == pytest.approx(4 / 5)
    assert metrics["group_score"] == pytest.approx(3 / 5)
    assert metrics["ties"] == pytest.approx(1 / 5) and metrics["examples"] == 5
    assert metrics["Object"] == {
        "text_score": 0.5,
        "image_score": 0.5,
        "group_score": 0.5,
        "ties": 0,
        "examples": 2,
    }
    assert metrics["Relation"]["text_score"] == 0.5 and metrics["Relation"]["image_score"] == 1
    assert metrics["Both"]["group_score"] == 1


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks examples\.jsonl"):
        evaluate_winoground(planned_model(TEXTS), tmp_path, Encoding())
    model = lay_out(tmp_path, [("red", "blue", "red", "blue", "Object")])
    (tmp_path / "images" / "ex_0_img_1.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 .* missing: .*ex_0_img_1\.png"):
        evaluate_winoground(model, tmp_path, Encoding())
    write_json(tmp_path / "examples.jsonl", [{"id": 0, "image_0": "ex_0_img_0"}])
    with pytest.raises(ValueError, match="entry 0: image_1 is missing"):
        evaluate_winoground(model, tmp_path, Encoding())
