"""ARO: attribution, relation and order, on which CLIP is a bag of words (Yuksekgonul et al. 2023).

Visual Genome-Relation and -Attribution exchange two objects or attributes of a region's caption;
COCO- and Flickr30k-Order shuffle a caption's words. A part's rule is that of the authors' code.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastclip.data.files import image_size
from fastclip.evaluate.aro_relations import SYMMETRIC_RELATIONS
from fastclip.evaluate.choices import Accuracy, Choice, accuracy, first, score_choices, strict
from fastclip.evaluate.entries import find_parts, read_entries
from fastclip.evaluate.features import Encoding, ImageFile
from fastclip.models.clip import Model

PARTS = {
    "relation": "visual_genome_relation.json",
    "attribution": "visual_genome_attribution.json",
    "coco_order": "coco_order.json",
    "flickr30k_order": "flickr30k_order.json",
}
# pairs of attributes with fewer cases have no share in the mean
PAIR_CASES = 25

# what the cases of a part with regions are grouped by
_GROUPS = {"relation": "relation_name", "attribution": "attributes"}
_BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
_FIELDS = {
    **dict.fromkeys(("image_path", "true_caption", "false_caption"), str),
    **dict.fromkeys(_BOX, (int, float)),
}
_ORDER_FIELDS = {"image_path": str, "caption_options": list}


def evaluate_aro(
    model: Model, root: Path, encoding: Encoding, parts: Sequence[str] = ()
) -> dict[str, Any]:
    """Accuracy on the parts that are there, or on those asked for.

    Args:
        root: folder with the files of `PARTS` and images/.
        parts: of `PARTS`; by default those that are there.

    Returns:
        "relation_macro", the published mean over relations that are not `SYMMETRIC_RELATIONS`
        (absent where there is none), "relation_macro_all", the mean over all that occur,
        "attribution_macro", the mean over pairs of attributes with 25 cases or more (absent where
        there is none), "relation_micro" and "attribution_micro", the share of all cases, for which
        the true caption must score strictly higher; "coco_order" and "flickr30k_order", the share
        of cases whose caption scores highest, where ties count as right, for a shuffled caption can
        be the same; "ties", the share of cases in which another caption scores the same, and
        "cases", by part.

    Raises:
        ValueError: a part is unknown or malformed, a box has no area in its image, or images are
            missing or cannot be read.
        FileNotFoundError: a part that was asked for is missing, or all are.
    """
    root = root.expanduser()
    metrics: dict[str, Any] = {}
    found: dict[str, Accuracy] = {}
    for part, path in find_parts("aro", root, PARTS, parts).items():
        if part not in _GROUPS:
            cases = order_cases(path)
            found[part] = accuracy(cases, score_choices(model, cases, encoding), first)
            metrics[part] = found[part].micro
            continue
        cases = visual_genome_cases(path, _GROUPS[part])
        found[part] = accuracy(cases, score_choices(model, cases, encoding), strict)
        macros = {"attribution_macro": found[part].macro(PAIR_CASES)}
        if part == "relation":
            macros = {
                "relation_macro": found[part].macro(apart=SYMMETRIC_RELATIONS),
                "relation_macro_all": found[part].macro(),
            }
        metrics |= {name: value for name, value in macros.items() if value is not None}
        metrics[f"{part}_micro"] = found[part].micro
    metrics["ties"] = {part: own.ties for part, own in found.items()}
    metrics["cases"] = {part: sum(own.cases.values()) for part, own in found.items()}
    return metrics


def visual_genome_cases(path: Path, group: str) -> list[Choice]:
    """The cases of a file with regions; what one has beyond its image's edge is black.

    Args:
        group: the field that cases are grouped by, a text or a list of texts.

    Raises:
        ValueError: a case is malformed, or its region has no area in the image.
    """
    sizes: dict[Path, tuple[int, int] | None] = {}
    cases = []
    for number, entry in enumerate(read_entries(path, {**_FIELDS, group: (str, list)})):
        image = path.parent / "images" / entry["image_path"]
        if image not in sizes:
            sizes[image] = _size_of(image)
        size = sizes[image]
        box = _box_of(entry)
        if size and (
            max(box[0], 0) >= min(box[2], size[0]) or max(box[1], 0) >= min(box[3], size[1])
        ):
            raise ValueError(
                f"{path}, entry {number}: the box {[entry[key] for key in _BOX]} (x, y, width, "
                f"height) has no area in {image}, which is {size} pixels (width, height); "
                "check that image and file are of the same release"
            )
        texts = (entry["true_caption"], entry["false_caption"])
        named = entry[group]
        name = named if isinstance(named, str) else "_".join(map(str, named))
        cases.append(Choice(ImageFile(image, box), texts, name))
    return cases


def order_cases(path: Path) -> list[Choice]:
    """The cases of a file of shuffled captions; images lie beside it or in images/.

    Raises:
        ValueError: a case is malformed.
    """
    cases = []
    for number, entry in enumerate(read_entries(path, _ORDER_FIELDS)):
        texts = entry["caption_options"]
        if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{path}, entry {number}: caption_options are {texts!r}; give the true caption and "
                "one shuffled or more"
            )
        image = path.parent / entry["image_path"]
        if not image.is_file():
            image = path.parent / "images" / entry["image_path"]
        cases.append(Choice(ImageFile(image), tuple(texts)))
    return cases


def _size_of(image: Path) -> tuple[int, int] | None:
    try:
        return image_size(image)
    except OSError:
        # all files that are missing or damaged are reported together when they are encoded
        return None


def _box_of(entry: dict[str, Any]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a region, which may reach beyond the image.

    Pillow's crop, which the authors use, makes black of what is not there.
    """
    x, y, w, h = (entry[key] for key in _BOX)
    return round(x), round(y), round(x + w), round(y + h)
