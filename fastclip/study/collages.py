"""Collages for studies: of photographs where there are some, else of drawn shapes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastclip.data.collages import (
    NEGATIVE_KINDS,
    PLACES,
    caption_claims,
    hard_negatives,
    is_held_out,
    sample_collage,
)
from fastclip.data.options import DataOptions
from fastclip.data.order import hash64
from fastclip.data.samples import Source
from fastclip.data.sources import collage_classes, open_source
from fastclip.data.text_augment import article_before
from fastclip.evaluate.features import embed_images
from fastclip.evaluate.zeroshot import evaluate_zeroshot
from fastclip.messages import counted
from fastclip.models.build import load
from fastclip.study.question import NO_VALIDATION, Settings
from fastclip.study.runs import Judge, Scores, recalls, run

COLLAGES = 1000
# of which composition is asked: some 2,000 cases, a standard error of about one point
COMPOSED = 2000
_SHARDS = "train-{00000..00004}.tar"
# the run with the image tower
_TOWER, _EPOCHS = "photographs", 4
OPTIMIZER = (
    *("--lr", "2e-3", "--wd", "0.1", "--warmup", "50", "--grad-clip-norm", "1", "--workers", "1"),
)
_LABELS = (
    *OPTIMIZER,
    *("--objective", "classify", "--batch-size", "128", *NO_VALIDATION),
    *("--aug-scale", "0.5", "1", "--aug-flip", "0.5"),
)


def training_data(data: Path | None) -> tuple[str, str]:
    """The flag of `fastclip train`: collages of CIFAR-10's photographs, or of shapes.

    Args:
        data: folder that `fastclip convert cifar10` wrote, or None.
    """
    return ("--train-data", _named(data))


def teach_image_tower(settings: Settings) -> None:
    """Train an image tower on single photographs by label: what the arms of a study begin with.

    On photographs as large as a collage has them; without photographs, on collages of one shape.

    Args:
        settings: of the study.
    """
    data: tuple[str, ...] = ("--model", "RN10t-64", "--train-data", "collages:objects=1")
    if settings.data is not None:
        data = ("--model", "RN10t-32", "--train-data", str(settings.data / _SHARDS))
    epochs = ("--epochs", str(settings.share(_EPOCHS)))
    flags = (*_LABELS, *data, *epochs, *settings.flags)
    run(_TOWER, flags, settings.folder, judge=lambda path: ({}, {}))


def image_tower(settings: Settings) -> tuple[str, str]:
    """The flag of `fastclip train` that begins with the tower of `teach_image_tower`.

    Args:
        settings: of the study.
    """
    return ("--finetune", str(settings.folder / _TOWER))


def image_tower_note(settings: Settings) -> str:
    """How the tower was trained, as an addition to its name.

    Args:
        settings: of the study.
    """
    pictures = "collages of one drawn shape" if settings.data is None else "the photographs"
    return f"trained on {pictures} by label for {counted(settings.share(_EPOCHS), 'epoch')}"


def classes_of_collages(data: Path | None) -> list[str]:
    """Names of the classes of the photographs, or of the shapes.

    Args:
        data: see `training_data`.
    """
    return collage_classes(_named(data))


def open_collages(
    data: Path | None,
    split: str,
    count: int,
    captions: tuple[str, ...] = ("short",),
    objects: int | None = None,
) -> Source:
    """Collages of photographs that are not trained on: each split has its own; or of shapes.

    Args:
        data: see `training_data`.
        split: "val", or "compositional" with pairs of class and place that training lacks.
        count: of collages.
        captions: their qualities.
        objects: photographs in a collage, or None for two or three.
    """
    keys = [f"split={split}", *([f"objects={objects}"] if objects else [])]
    options = DataOptions(captions=",".join(f"{name}=1" for name in captions))
    return open_source(_named(data, keys), options, split=split, count=count)


def _named(data: Path | None, keys: Sequence[str] = ()) -> str:
    photos = [] if data is None else [f"photos={data / _SHARDS}"]
    return ":".join(filter(None, ["collages", ",".join([*keys, *photos])]))


def judge_collages(data: Path | None) -> Judge:
    """Of collages that are not trained on: zero-shot accuracy and retrieval by short captions.

    accuracy is of collages of one photograph; image_to_text and text_to_image are recall@5.
    """

    def judge(path: Path) -> Scores:
        model = load(path)
        single = open_collages(data, "val", COLLAGES, objects=1)
        names = [f"{article_before(name)} {name}" for name in classes_of_collages(data)]
        found = evaluate_zeroshot(
            model, embed_images(model, single), names, [f"{{}} {place}" for place in PLACES]
        )
        scores, chance = {"accuracy": found["acc1"]}, {"accuracy": 1 / len(names)}
        images = embed_images(model, open_collages(data, "val", COLLAGES))
        recall, guessed = recalls(model, images, 5)
        return scores | recall, chance | guessed

    return judge


def composition_cases(
    data: Path | None, split: str
) -> tuple[list[str], list[tuple[int, int, str]]]:
    """Texts, the collages' short captions first; and (collage, false text, kind) of each case.

    Args:
        data: see `training_data`.
        split: "val", or "compositional" for captions whose first class is at a held-out place.
    """
    classes = classes_of_collages(data)
    texts, cases = [], []
    for index in range(COMPOSED):
        collage = sample_collage(index, split=split, classes=classes)
        seed = hash64(index)
        text, [claim] = caption_claims(collage, "short", seed)
        texts.append(text)
        # a collage with a held-out pair may have a caption that does not speak of it
        spoken = claim.place is not None and is_held_out(claim.names[0], claim.place, classes)
        if spoken != (split == "compositional"):
            continue
        cases += [
            (index, text, kind)
            for kind in NEGATIVE_KINDS
            for text in hard_negatives(collage, kind, seed)[:1]
        ]
    false = [text for _, text, _ in cases]
    numbered = [(i, COMPOSED + n, kind) for n, (i, _, kind) in enumerate(cases)]
    return texts + false, numbered


def composition(
    images: Tensor, texts: Tensor, cases: Sequence[tuple[int, int, str]]
) -> dict[str, float]:
    """By kind, the share of cases in which the image is nearer to its caption than to a false one.

    Ties count as wrong.

    Args:
        images: (N, D). texts: (T, D), text i < N the caption of image i.
        cases: image, false text, kind.
    """
    image = torch.tensor([i for i, _, _ in cases])
    false = torch.tensor([n for _, n, _ in cases])
    right = (images[image] * texts[image]).sum(1) > (images[image] * texts[false]).sum(1)
    kinds = [kind for _, _, kind in cases]
    return {
        kind: right[[k == kind for k in kinds]].double().mean().item() for kind in sorted({*kinds})
    }
