"""SugarCrepe: captions against hard negatives that read as well (Hsieh et al. 2023)."""

from pathlib import Path
from statistics import fmean
from typing import Any

from fastclip.evaluate.choices import Choice, accuracy, score_choices
from fastclip.evaluate.entries import find_parts, read_entries
from fastclip.evaluate.features import Encoding, ImageFile
from fastclip.models.clip import Model

SETS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")

_FIELDS = {"filename": str, "caption": str, "negative_caption": str}


def evaluate_sugarcrepe(model: Model, root: Path, encoding: Encoding) -> dict[str, Any]:
    """Accuracy on the sets that are there; a caption must score strictly above its negative.

    Args:
        root: folder with sugar_crepe/SET.json and COCO's val2017.

    Returns:
        The accuracy of each set by its name; "add", "replace" and "swap", means of their sets;
        "macro", the mean of all sets, and "micro", of all cases; "ties", the share of cases with
        equal scores; "sets", how many were measured; and "cases" of each.

    Raises:
        ValueError: a set is malformed, or images are missing or cannot be read.
        FileNotFoundError: no set is there.
    """
    root = root.expanduser()
    files = {name: f"sugar_crepe/{name}.json" for name in SETS}
    cases = [
        Choice(
            ImageFile(root / "val2017" / entry["filename"]),
            (entry["caption"], entry["negative_caption"]),
            group=name,
        )
        for name, path in find_parts("sugarcrepe", root, files).items()
        for entry in read_entries(path, _FIELDS)
    ]
    found = accuracy(cases, score_choices(model, cases, encoding))
    by_kind: dict[str, list[float]] = {}
    for name, share in found.by_group.items():
        by_kind.setdefault(name.partition("_")[0], []).append(share)
    return {
        **found.by_group,
        **{kind: fmean(shares) for kind, shares in by_kind.items()},
        "macro": found.macro(),
        "micro": found.micro,
        "ties": found.ties,
        "sets": len(found.by_group),
        "cases": found.cases,
    }
