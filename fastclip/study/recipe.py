"""Do non-contrastive terms still help when plain CLIP is trained well (Fini et al. 2023)?

The paper trains on few pairs for its models' size, where CLIP overfits; so does this: 9,000
photographs of CIFAR-10, the same in every epoch.
"""

import functools
from collections.abc import Mapping

from fastclip.study.cifar10 import judge, shards_of
from fastclip.study.question import Arm, Contrast, Question, Settings
from fastclip.study.runs import Judge
from fastclip.study.verdict import Design

EPOCHS = 5
_COMMON = (
    *("--model", "RN10t-64", "--batch-size", "128", "--lr", "2e-3", "--wd", "0.1"),
    *("--warmup", "50", "--grad-clip-norm", "1", "--workers", "1", "--aug-scale", "0.5", "1"),
)
# Blur would hide photographs of 32 pixels, and a word left out of a template may be the class.
_STRONG_IMAGES = ("--strong-scale", "0.2", "1", "--aug-blur", "0")
_HEADS = ("--head-width", "128", "--head-hidden", "512")
_STRONG = (*_STRONG_IMAGES, *_HEADS, "--strong-text-augment", "none", "--label-smoothing", "0.1")
# CLIP's own loss on one weak pair with the term beside it, behind linear heads
_BASIC = ("--head-width", "128", "--strong-views", "0", "--no-separate-heads")
_PROJECTED = ("--projector-hidden", "512", "--projector-width", "128")
_SLIP = ("--objective", "slip", "--head-width", "128", *_PROJECTED, *_STRONG_IMAGES)

TERMS = ("SLIP", "SiamLIP", "BarLIP")


def _flags() -> dict[str, tuple[str, ...]]:
    siamlip, barlip = (("--objective", name, *_PROJECTED) for name in ("siamlip", "barlip"))
    return {
        "CLIP, basic": (),
        "SLIP, basic": _SLIP,
        "SiamLIP, basic": (*siamlip, *_BASIC),
        "BarLIP, basic": (*barlip, *_BASIC),
        "CLIP, strong": ("--objective", "rocket", *_STRONG),
        # its pair is of one view: the strong recipe is that view's augmentation
        "SLIP, strong": (*_SLIP, "--augment", "strong", "--aug-scale", "0.2", "1"),
        "SiamLIP, strong": (*siamlip, *_STRONG),
        "BarLIP, strong": (*barlip, *_STRONG),
    }


def _arms(settings: Settings) -> Mapping[str, Arm]:
    # one shard: 9,000 photographs
    data = ("--train-data", str(shards_of(settings.data) / "train-00000.tar"))
    epochs = ("--epochs", str(settings.share(EPOCHS)))
    return {label: Arm((*_COMMON, *own, *data, *epochs)) for label, own in _flags().items()}


def _judge(settings: Settings) -> Judge:
    return functools.partial(judge, data=shards_of(settings.data))


def _notes(settings: Settings) -> list[str]:
    return [
        f"9,000 photographs of CIFAR-10, {settings.share(EPOCHS)} epochs of batches of 128; scored "
        "on 4,000 others. The strong recipe has two strong views of each image, heads of their "
        "own for them, and label smoothing 0.1; CLIP with it is CLIP-Rocket. A step of the strong "
        "recipe, and of SLIP, sees three views of an image, the others one."
    ]


def _contrasts() -> list[Contrast]:
    found = [
        Contrast(f"with the basic recipe {term} helps", (f"{term}, basic",), ("CLIP, basic",))
        for term in TERMS
    ]
    found += [
        Contrast(
            f"with the strong recipe {term} helps less",
            (f"{term}, basic", "CLIP, strong"),
            (f"{term}, strong", "CLIP, basic"),
        )
        for term in TERMS
    ]
    found.append(
        Contrast("the strong recipe itself helps CLIP", ("CLIP, strong",), ("CLIP, basic",))
    )
    return found


QUESTION = Question(
    title="Added terms and the recipe",
    columns={"accuracy": "zero-shot"},
    design=Design(seeds=3, smallest=0.03),
    contrasts=_contrasts(),
    arms=_arms,
    judge=_judge,
    notes=_notes,
)
