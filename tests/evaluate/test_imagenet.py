"""Readers of ImageNet's shifts, on folders laid out as they are published."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from fastclip.evaluate.features import ImageFile
from fastclip.evaluate.imagenet import (
    prompts,
    read_a,
    read_objectnet,
    read_r,
    read_sketch,
    read_v2,
    read_validation,
    wordnet_ids,
)

# The first and last classes, and some that are known by heart.
WORDNET_IDS = {0: "n01440764", 1: "n01443537", 207: "n02099601", 281: "n02123045", 999: "n15075141"}


def write_image(path: Path, color: tuple[int, int, int] = (0, 0, 0), size: int = 8) -> Path:
    """A PNG, whatever its ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), color).save(path, "PNG")
    return path


def write_mappings(folder: Path, objects: dict[str, tuple[str, Sequence[int]]]) -> None:
    """ObjectNet's four files of 1000 invented names; objects: (label, class indices) by folder."""
    folder.mkdir(parents=True)
    # classes have another order in the list of 2012: 7 has no factor in common with 1000
    line_of_index = {str(index): index * 7 % 1000 for index in range(1000)}
    names = {line: f"thing {index}, object {index}" for index, line in line_of_index.items()}
    (folder / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(line_of_index))
    (folder / "imagenet_to_label_2012_v2").write_text(
        "".join(f"{names[line]}\n" for line in range(1000))
    )
    folders = {name: label for name, (label, _) in objects.items()}
    known = {
        label: "; ".join(f"thing {index}, object {index}" for index in indices)
        for label, indices in objects.values()
        if indices
    }
    (folder / "folder_to_objectnet_label.json").write_text(json.dumps(folders))
    (folder / "objectnet_to_imagenet_1k.json").write_text(json.dumps(known))


def test_classes() -> None:
    assert len(wordnet_ids()) == 1000
    assert {index: wordnet_ids()[index] for index in WORDNET_IDS} == WORDNET_IDS
    assert list(wordnet_ids()) == sorted(wordnet_ids()), "torchvision's ImageFolder sorts them"
    classes, templates = prompts()
    assert len(classes) == 1000 and classes[0] == "tench" and classes[999] == "toilet paper"
    assert len(templates) == 80 and all(template.count("{}") == 1 for template in templates)
    assert "a photo of a {}." in templates


def test_validation_images(tmp_path: Path) -> None:
    assert read_validation(tmp_path) is None
    folder = tmp_path / "imagenet" / "val"
    last = write_image(folder / "n15075141" / "ILSVRC2012_val_00000003.JPEG")
    second = write_image(folder / "n01443537" / "ILSVRC2012_val_00000002.JPEG")
    first = write_image(folder / "n01443537" / "ILSVRC2012_val_00000001.JPEG")
    (folder / "n01443537" / "notes.txt").write_text("no image")
    (folder / "readme.txt").write_text("no folder")
    found = read_validation(tmp_path)
    assert found.images == [ImageFile(first), ImageFile(second), ImageFile(last)]
    assert found.correct == [frozenset({1}), frozenset({1}), frozenset({999})]
    assert found.allowed is None


def test_v2_counts_its_folders_as_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "imagenetv2-matched-frequency-format-val"
    for name in ("0", "1", "10", "100", "2", "999"):
        write_image(folder / name / "a.jpeg")
    found = read_v2(tmp_path)
    assert [image.path.parent.name for image in found.images] == ["0", "1", "2", "10", "100", "999"]
    assert [min(right) for right in found.correct] == [0, 1, 2, 10, 100, 999]
    write_image(folder / "1000" / "a.jpeg")
    with pytest.raises(ValueError, match="1000 is not a class of ImageNet"):
        read_v2(tmp_path)


@pytest.mark.parametrize("layout", ["imagenet-sketch/sketch", "imagenet-sketch"])
def test_sketch_in_either_layout(layout: str, tmp_path: Path) -> None:
    assert read_sketch(tmp_path) is None
    path = write_image(tmp_path / layout / "n02123045" / "sketch_1.JPEG")
    found = read_sketch(tmp_path)
    assert found.images == [ImageFile(path)] and found.correct == [frozenset({281})]


@pytest.mark.parametrize(("name", "read"), [("imagenet-r", read_r), ("imagenet-a", read_a)])
def test_subsets_restrict_the_choice(name: str, read, tmp_path: Path) -> None:
    indices = range(3, 1000, 5)
    for index in indices:
        write_image(tmp_path / name / wordnet_ids()[index] / "art_0.jpg")
    (tmp_path / name / "README.txt").write_text("")
    found = read(tmp_path)
    assert found.allowed == tuple(indices) and len(found.allowed) == 200
    assert found.correct == [frozenset({index}) for index in indices]
    write_image(tmp_path / name / wordnet_ids()[0] / "art_0.jpg")
    with pytest.raises(ValueError, match=f"images of 201 classes, {name} has 200"):
        read(tmp_path)


def test_objectnet(tmp_path: Path) -> None:
    root = tmp_path / "objectnet-1.0"
    objects = {
        "alarm_clock": ("Alarm clock", [409, 530]),
        "banana": ("Banana", [954]),
        "basket_hamper": ("Basket", [790, 588]),
        "air_freshener": ("Air freshener", []),
    }
    write_mappings(root / "mappings", objects)
    for name in objects:
        write_image(root / "images" / name / "a.png", size=20)
    wide = root / "images" / "banana" / "b.png"
    Image.new("RGB", (30, 20)).save(wide)
    found = read_objectnet(tmp_path)
    assert found.allowed == (409, 530, 588, 790, 954)
    assert [image.path.parent.name for image in found.images] == [
        *("alarm_clock", "banana", "banana", "basket_hamper"),
    ]
    assert found.correct == [
        *(frozenset({409, 530}), frozenset({954}), frozenset({954}), frozenset({588, 790})),
    ]
    assert [image.box for image in found.images] == [
        *((2, 2, 18, 18), (2, 2, 18, 18), (2, 2, 28, 18), (2, 2, 18, 18)),
    ]
    assert found.answers() == {
        409: frozenset({409, 530}),
        530: frozenset({409, 530}),
        954: frozenset({954}),
        588: frozenset({588, 790}),
        790: frozenset({588, 790}),
    }


def test_objectnet_without_its_mappings(tmp_path: Path) -> None:
    root = tmp_path / "objectnet-1.0"
    assert read_objectnet(tmp_path) is None
    write_image(root / "images" / "banana" / "a.png")
    with pytest.raises(FileNotFoundError, match=r"imagenet_to_label_2012_v2 not found"):
        read_objectnet(tmp_path)
    write_mappings(root / "mappings", {"banana": ("Banana", [954])})
    path = root / "mappings" / "objectnet_to_imagenet_1k.json"
    path.write_text('{"Banana": "a fruit nobody knows"}')
    with pytest.raises(ValueError, match="'Banana' stands for ImageNet's 'a fruit nobody knows'"):
        read_objectnet(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"objectnet_to_imagenet_1k\.json is not valid JSON"):
        read_objectnet(tmp_path)


def test_folders_that_are_no_classes(tmp_path: Path) -> None:
    write_image(tmp_path / "imagenet" / "val" / "n01440764" / "a.JPEG")
    write_image(tmp_path / "imagenet" / "val" / "tench" / "a.JPEG")
    with pytest.raises(ValueError, match=r"val/tench is not a class of ImageNet: .* as n01440764"):
        read_validation(tmp_path)


def test_folders_without_images(tmp_path: Path) -> None:
    (tmp_path / "imagenet" / "val" / "n01440764").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no image"):
        read_validation(tmp_path)
