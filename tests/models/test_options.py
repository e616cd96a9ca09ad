"""Flags of systems: views that each objective takes, and contradictions reported."""

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
    assert SystemOptions(objective="swalip", prototypes=8).views == (1, 1)


def test_what_training_begins_with_is_no_part_of_the_model() -> None:
    locked = SystemOptions(
        lock_image=True, lock_image_unlocked_groups=1, lock_image_freeze_bn_stats=True
    )
    assert locked.lasting() == SystemOptions()
    begun = SystemOptions(objective="classify", classifier="zeroshot", finetune="logs/a")
    assert begun.lasting() == SystemOptions(objective="classify", classifier="prototype")
    still = SystemOptions(objective="swalip", prototypes=4, prototypes_frozen_steps=9)
    assert still.lasting() == SystemOptions(objective="swalip", prototypes=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strong_views": 2}, "--strong-views is for slip, uniclip, simclr, .*, not clip"),
        ({"objective": "swalip", "strong_views": 1}, "--strong-views is 1; swalip contrasts 2"),
        ({"objective": "uniclip", "strong_views": -1}, "--strong-views is -1; give at least 0"),
        ({"label_smoothing": 1.0}, r"--label-smoothing is 1.0; give one in \[0, 1\)"),
        ({"objective": "swalip", "label_smoothing": 0.1}, "--label-smoothing is for clip, .*not s"),
        (
            {"objective": "rocket", "strong_views": 0, "label_smoothing": 0.1},
            "without strong views rocket has no pairs",
        ),
        ({"objective": "uniclip", "hard_negatives": 1}, "--hard-negatives is for clip, not unicl"),
        ({"hard_negatives": -1}, "--hard-negatives is -1; give at least 0"),
        ({"pair_loss": "sup-con"}, "--pair-loss is for uniclip, not clip"),
        ({"objective": "rocket", "augmentation_encoder": False}, "--augmentation-encoder is for"),
        ({"objective": "rocket", "head_width": 0}, "--head-width is 0; give at least 1"),
        ({"objective": "rocket", "projector_width": 8}, "--projector-width is for slip, simclr"),
        ({"objective": "swalip", "projector_width": 8}, "swalip has projectors only with --proto"),
        ({"objective": "swalip", "prototypes": 4, "strong_views": 2}, "with --prototypes, give 0"),
        ({"objective": "swalip", "prototypes": 0}, "--prototypes is 0; give at least 1"),
        ({"objective": "siamlip", "prototypes": 4}, "--prototypes is for swalip, not siamlip"),
        (
            {"objective": "swalip", "prototypes_frozen_steps": 4},
            "--prototypes-frozen-steps needs --prototypes; leave it out",
        ),
        ({"objective": "swalip", "prototypes": 4, "prototypes_frozen_steps": -1}, "at least 0"),
        ({"objective": "siamlip", "extra_weight": 0.0}, "--extra-weight is 0.0"),
        ({"text_lm_unfrozen": 2}, "--text-lm-unfrozen needs --text-lm"),
        ({"text_lm": "gpt2", "text_lm_unfrozen": 0}, "--text-lm-unfrozen is 0; give at least 1"),
        ({"lock_image_freeze_bn_stats": True}, "--lock-image-freeze-bn-stats needs --lock-image"),
        ({"context_length": 128}, "--context-length is for --text-lm"),
        ({"objective": "simclr", "text_lm": "gpt2"}, "--text-lm is for .*, not simclr"),
        ({"objective": "classify", "label_source": "text"}, "give --classes FILE"),
        ({"classifier": "prototype"}, "--classifier is for classify, not clip"),
        ({"objective": "classify", "classifier": "zeroshot"}, "give --finetune"),
    ],
)
def test_contradictions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SystemOptions(**options)
