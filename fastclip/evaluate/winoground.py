"""Winoground: two images and two captions of the same words (Thrush et al. 2022)."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from fastclip.evaluate.choices import Choice, Scores, score_choices, strict
from fastclip.evaluate.entries import read_entries
from fastclip.evaluate.features import Encoding, ImageFile
from fastclip.evaluate.registry import require
from fastclip.models.clip import Model

_FIELDS = dict.fromkeys(("image_0", "image_1", "caption_0", "caption_1", "collapsed_tag"), str)


class Outcome(NamedTuple):
    """What a model gets right of one example.

    text_score: each image prefers its caption. image_score: each caption prefers its image.
    group_score: both. ties: an image or a caption prefers neither.
    """

    text_score: bool
    image_score: bool
    group_score: bool
    ties: bool


def judge(of_image_0: Scores, of_image_1: Scores) -> Outcome:
    """What is right of one example; preferring needs a strictly higher score, NaN is never right.

    Args:
        of_image_0, of_image_1: an image's scores with its own caption and with the other.
    """
    (own_0, other_0), (own_1, other_1) = of_image_0, of_image_1
    of_caption_0, of_caption_1 = (own_0, other_1), (own_1, other_0)
    text = strict(of_image_0) and strict(of_image_1)
    image = strict(of_caption_0) and strict(of_caption_1)
    pairs = (of_image_0, of_image_1, of_caption_0, of_caption_1)
    return Outcome(text, image, text and image, any(own == other for own, other in pairs))


def evaluate_winoground(model: Model, root: Path, encoding: Encoding) -> dict[str, Any]:
    """Text, image and group score; guessing has 1/4, 1/4 and 1/6.

    Args:
        root: folder with examples.jsonl and images/NAME.png.

    Returns:
        The shares of examples as `Outcome` names them, "examples", their number, and the same for
        those of each collapsed_tag ("Object", "Relation", "Both").

    Raises:
        ValueError: an example is malformed, or images are missing or cannot be read.
        FileNotFoundError: the files are not there.
    """
    root = require("winoground", root)
    examples = read_entries(root / "examples.jsonl", _FIELDS)
    cases = [
        Choice(
            ImageFile(root / "images" / f"{example[f'image_{own}']}.png"),
            (example[f"caption_{own}"], example[f"caption_{other}"]),
        )
        for example in examples
        for own, other in ((0, 1), (1, 0))
    ]
    scores = score_choices(model, cases, encoding)
    outcomes = [judge(*pair) for pair in zip(scores[::2], scores[1::2], strict=True)]
    by_tag: dict[str, list[Outcome]] = {}
    for example, outcome in zip(examples, outcomes, strict=True):
        by_tag.setdefault(example["collapsed_tag"], []).append(outcome)
    return {**_shares(outcomes), **{tag: _shares(own) for tag, own in by_tag.items()}}


def _shares(outcomes: Sequence[Outcome]) -> dict[str, float]:
    shares = {
        name: fmean(column)
        for name, column in zip(Outcome._fields, zip(*outcomes, strict=True), strict=True)
    }
    return {**shares, "examples": len(outcomes)}
