"""Flags of systems: views that each objective takes, and contradictions told."""

from typing import Any

import pytest

from fastclip.models.options import SystemOptions

VIEWS = {
    "clip": (1, 1),
    "slip": (3, 1),
    "siamlip": (3, 3),
    "rocket": (3, 3),
    "uniclip": (3, 1),
    "classify": (1, 0),
    "simclr": (2, 0),
}


@pytest.mark.parametrize("objective", VIEWS)
def test_views(objective: Any) -> None:
    assert SystemOptions(objective=objective).views == VIEWS[objective]


def test_strong_views_are_chosen() -> None:
    assert SystemOptions(objective="rocket", strong_views=4).views == (5, 5)
    assert SystemOptions(objective="uniclip", strong_views=0).views == (1, 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strong_views": 2}, "--strong-views: clip has none"),
        ({"objective": "swalip", "strong_views": 1}, "--strong-views is 1; swalip contrasts 2"),
        ({"objective": "uniclip", "strong_views": -1}, "--strong-views is -1; give 0 or more"),
        ({"label_smoothing": 1.0}, r"--label-smoothing is 1.0; give one in \[0, 1\)"),
        ({"objective": "swalip", "label_smoothing": 0.1}, "swalip has soft targets already"),
        ({"objective": "slip", "label_smoothing": 0.1}, "no pairs of strong views to smooth"),
        ({"objective": "uniclip", "hard_negatives": 1}, "to clip alone"),
        ({"pair_loss": "sup-con"}, "uniclip's, not clip's"),
        ({"objective": "rocket", "head_width": 0}, "--head-width is 0; give at least 1"),
        ({"objective": "siamlip", "extra_weight": 0.0}, "--extra-weight is 0.0"),
        ({"context_length": 128}, "--context-length is for --text-lm"),
        ({"objective": "simclr", "text_lm": "gpt2"}, "simclr has no text"),
        ({"objective": "classify", "label_source": "text"}, "give --classes FILE"),
        ({"classifier": "prototype"}, "--classifier is classify's, not clip's"),
        ({"objective": "classify", "classifier": "zeroshot"}, "give --finetune"),
    ],
)
def test_contradictions(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SystemOptions(**options)
