"""ARO in its published layout: regions, means over groups, shuffled captions and ties."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastclip.cli.eval.compositional import Aro
from fastclip.evaluate.aro import PAIR_CASES, evaluate_aro, order_cases, visual_genome_cases
from fastclip.evaluate.aro_relations import SYMMETRIC_RELATIONS
from fastclip.evaluate.choices import Choice, score_choices
from fastclip.evaluate.features import Encoding, ImageFile
from tests.evaluate.planned import BLUE, GREEN, RED, Color, paint, planned_model, write_json

MODEL = planned_model(
    {"red": (9, 1, 1), "green": (1, 9, 1), "blue": (1, 1, 9), "gray": (5, 5, 5), "ash": (1, 1, 1)}
)
COLORS: dict[str, Color] = {"red": RED, "green": GREEN, "blue": BLUE}
WHOLE = (0, 0, 8, 8)


def region(image: str, box: tuple[float, ...], true: str, false: str, **group: Any) -> Any:
    x, y, w, h = box
    place = {"bbox_x": x, "bbox_y": y, "bbox_w": w, "bbox_h": h}
    captions = {"true_caption": true, "false_caption": false}
    return {"image_id": 1, "image_path": f"{image}.jpg", **place, **captions, **group}


def relation(true: str, false: str, name: str, image: str = "red") -> Any:
    return region(image, WHOLE, true, false, relation_name=name)


def pair(true: str, false: str, *attributes: str) -> Any:
    return region("red", WHOLE, true, false, attributes=list(attributes))


def lay_out(root: Path, **parts: list[Any]) -> None:
    for name, color in COLORS.items():
        paint(root / "images" / f"{name}.jpg", color)
    for name, entries in parts.items():
        write_json(root / f"{name}.json", entries)


def test_by_hand(tmp_path: Path) -> None:
    relations = [
        relation("red", "blue", "on"),
        relation("blue", "red", "on"),
        # gray and ash are equally near to red: wrong
        relation("gray", "ash", "on"),
        relation("green", "red", "behind", "green"),
        relation("gray", "green", "under"),
        relation("blue", "red", "near"),
        relation("red", "blue", "around"),
    ]
    pairs = [
        # 25 cases, of which 10 are right; 24 and all right: no share in the macro mean
        *[pair("red", "blue", "wet", "old")] * 10,
        *[pair("blue", "red", "wet", "old")] * 15,
        *[pair("red", "blue", "old", "wet")] * 24,
        *[pair("red", "blue", "old", "red")] * 26,
    ]
    coco = [
        {"image_path": "images/red.jpg", "caption_options": ["red", "blue", "gray", "ash", "blue"]},
        # a shuffled caption can be the same: right
        {"image_path": "images/red.jpg", "caption_options": ["red", "red", "gray", "ash", "blue"]},
        {"image_path": "images/red.jpg", "caption_options": ["gray", "red", "ash", "ash", "blue"]},
    ]
    # without a folder, as Karpathy's file of Flickr30k names images
    flickr = [{"image_path": "blue.jpg", "caption_options": ["red", "blue", "red", "red", "red"]}]
    lay_out(
        tmp_path,
        visual_genome_relation=relations,
        visual_genome_attribution=pairs,
        coco_order=coco,
        flickr30k_order=flickr,
    )
    assert evaluate_aro(MODEL, tmp_path, Encoding()) == {
        # on 1 of 3, behind 1 of 1, under 1 of 1; near and around, which are symmetric, 0 and 1
        "relation_macro": pytest.approx(7 / 9),
        "relation_macro_all": pytest.approx((7 / 3 + 1) / 5),
        "relation_micro": pytest.approx(4 / 7),
        "attribution_macro": pytest.approx((10 / 25 + 1) / 2),
        "attribution_micro": pytest.approx(60 / 75),
        "coco_order": pytest.approx(2 / 3),
        "flickr30k_order": 0,
        "ties": {
            "relation": pytest.approx(1 / 7),
            "attribution": 0,
            "coco_order": pytest.approx(1 / 3),
            "flickr30k_order": 0,
        },
        "cases": {"relation": 7, "attribution": 75, "coco_order": 3, "flickr30k_order": 1},
    }


@pytest.mark.parametrize("seed", range(3))
def test_equals_plain_counting(seed: int, tmp_path: Path) -> None:
    """From the scores of all cases, with the published options [false, true] and argmax."""
    rng = random.Random(seed)
    words = ["red", "green", "blue", "gray", "ash"]
    entries = [
        region(
            rng.choice(list(COLORS)),
            WHOLE,
            rng.choice(words),
            rng.choice(words),
            attributes=rng.choice([["a", "b"], ["b", "a"], ["c", "d"], ["rare", "x"]][: 3 + i % 2]),
        )
        for i in range(140)
    ]
    lay_out(tmp_path, visual_genome_attribution=entries)
    metrics = evaluate_aro(MODEL, tmp_path, Encoding())
    cases = visual_genome_cases(tmp_path / "visual_genome_attribution.json", "attributes")
    by_pair: dict[str, list[bool]] = {}
    for entry, (true, false) in zip(entries, score_choices(MODEL, cases, Encoding()), strict=True):
        options = [false, true]
        right = options.index(max(options)) == 1
        by_pair.setdefault("_".join(entry["attributes"]), []).append(right)
    often = [sum(own) / len(own) for own in by_pair.values() if len(own) >= PAIR_CASES]
    assert 2 <= len(often) < len(by_pair)
    assert metrics["attribution_macro"] == pytest.approx(sum(often) / len(often))
    assert metrics["attribution_micro"] == sum(map(sum, by_pair.values())) / 140
    assert metrics["ties"]["attribution"] > 0


def test_the_region_is_cut_out(tmp_path: Path) -> None:
    """Of an image red on the left and blue on the right, 16 x 8 pixels."""
    paint(tmp_path / "images" / "two.jpg", RED, BLUE)
    boxes = [
        ((0, 0, 8, 8), (0, 0, 8, 8), "red"),
        ((8, 2, 8, 3), (8, 2, 16, 5), "blue"),
        ((8.4, 0.6, 4.0, 4.0), (8, 1, 12, 5), "blue"),
    ]
    entries = [
        region("two", box, color, "red" if color == "blue" else "blue", relation_name="on")
        for box, _, color in boxes
    ]
    write_json(tmp_path / "visual_genome_relation.json", entries)
    cases = visual_genome_cases(tmp_path / "visual_genome_relation.json", "relation_name")
    assert [case.image.box for case in cases] == [box for _, box, _ in boxes]
    metrics = evaluate_aro(MODEL, tmp_path, Encoding())
    assert metrics["relation_macro"] == 1
    # only pure colors are as near to their word as this
    assert all(scores[0] > 0.98 for scores in score_choices(MODEL, cases, Encoding()))


def test_what_lies_beyond_the_image_is_black(tmp_path: Path) -> None:
    """Half of the region, on the left and above: what the model sees is half as bright."""
    lay_out(tmp_path)
    boxes = [((-8, 0, 16, 8), (-8, 0, 8, 8)), ((0, -8, 8, 16), (0, -8, 8, 8))]
    entries = [region("red", box, "red", "blue", relation_name="on") for box, _ in boxes]
    write_json(tmp_path / "visual_genome_relation.json", entries)
    cases = visual_genome_cases(tmp_path / "visual_genome_relation.json", "relation_name")
    assert [case.image.box for case in cases] == [box for _, box in boxes]
    means: list[float] = []

    def seen(image: Image.Image) -> Any:
        means.append(np.asarray(image).mean())
        return MODEL.preprocess(image)

    whole = Choice(ImageFile(cases[0].image.path, WHOLE), cases[0].texts)
    score_choices(MODEL._replace(preprocess=seen), [*cases, whole], Encoding())
    assert means == pytest.approx([means[-1] / 2] * 2 + means[-1:]) and means[-1] > 0


def test_the_published_mean_needs_relations_with_a_direction(tmp_path: Path) -> None:
    assert len(SYMMETRIC_RELATIONS) == 157
    assert all(name == name.strip() and "\n" not in name for name in SYMMETRIC_RELATIONS)
    assert {
        "near",
        "on the other side of",
    } < SYMMETRIC_RELATIONS and "on" not in SYMMETRIC_RELATIONS
    lay_out(tmp_path, visual_genome_relation=[relation("red", "blue", "near")])
    metrics = evaluate_aro(MODEL, tmp_path, Encoding())
    assert "relation_macro" not in metrics and metrics["relation_macro_all"] == 1


@pytest.mark.parametrize("box", [(0, 0, 0, 8), (8, 0, 4, 4), (0, -9, 8, 9), (4, 4, -2, 2)])
def test_a_region_without_area_is_named(box: tuple[int, ...], tmp_path: Path) -> None:
    entries = [relation("red", "blue", "on"), region("red", box, "red", "blue", relation_name="on")]
    lay_out(tmp_path, visual_genome_relation=entries)
    with pytest.raises(ValueError, match="entry 1: the box") as message:
        evaluate_aro(MODEL, tmp_path, Encoding())
    assert str(list(box)) in str(message.value) and "(8, 8) pixels" in str(message.value)


def test_parts_that_are_there(tmp_path: Path, logged: Callable[[], str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks visual_genome_relation\.json, visual"):
        evaluate_aro(MODEL, tmp_path, Encoding())
    order = [{"image_path": "red.jpg", "caption_options": ["red", "blue"]}]
    few = [pair("red", "blue", "old", "wet")] * 24
    lay_out(tmp_path, coco_order=order, visual_genome_attribution=few)
    metrics = evaluate_aro(MODEL, tmp_path, Encoding())
    # no pair has the cases for a mean
    assert set(metrics) == {"attribution_micro", "coco_order", "ties", "cases"}
    assert set(evaluate_aro(MODEL, tmp_path, Encoding(), ["coco_order"])["cases"]) == {"coco_order"}
    with pytest.raises(FileNotFoundError, match=r"lacks flickr30k_order\.json; get"):
        evaluate_aro(MODEL, tmp_path, Encoding(), ["coco_order", "flickr30k_order"])
    with pytest.raises(ValueError, match="no part 'order'"):
        evaluate_aro(MODEL, tmp_path, Encoding(), ["order"])
    # the command says what was not measured, unless it was not asked for
    assert Aro(model="m", root=tmp_path).measure(MODEL) == metrics
    message = logged()
    assert (
        "visual_genome_relation.json, flickr30k_order.json\n" in message and "coco" not in message
    )
    Aro(model="m", root=tmp_path, parts=("coco_order",)).measure(MODEL)
    assert not logged()


def test_missing_images_are_reported_together(tmp_path: Path) -> None:
    entries = [relation("red", "blue", "on", image) for image in ("red", "gone", "lost", "blue")]
    lay_out(tmp_path, visual_genome_relation=entries)
    with pytest.raises(ValueError, match=r"2 of 4 image files are missing: .*gone.*, .*lost"):
        evaluate_aro(MODEL, tmp_path, Encoding())


@pytest.mark.parametrize("options", [["red"], [], ["red", 3], ["red", None]])
def test_malformed_options(options: list[Any], tmp_path: Path) -> None:
    entries = [{"image_path": "red.jpg", "caption_options": options}]
    path = write_json(tmp_path / "coco_order.json", entries)
    with pytest.raises(ValueError, match="entry 0: caption_options are"):
        order_cases(path)
