"""Accuracies under distribution shifts and their effective robustness.

Protocol of Taori et al. 2020 and of Fang et al. 2022, "Data Determines Distributional Robustness in
Contrastive Language Image Pre-training (CLIP)". Metrics are plain numbers: of the original
distribution acc1, correct, count, ci_low and ci_high; of each shift, in a dictionary under its
name, the same and rho.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclip.evaluate import sharing
from fastclip.evaluate.effective_robustness import (
    BASELINES,
    OWN_CLASSES_BASELINES,
    Line,
    clopper_pearson,
    effective_robustness,
    fit_line,
    suited_fit,
)
from fastclip.evaluate.features import Encoding, embed_files
from fastclip.evaluate.imagenet import (
    CLASSES,
    PUBLISHED_CLASSES,
    SHIFTS,
    ShiftSet,
    prompts,
    read_validation,
)
from fastclip.evaluate.registry import BENCHMARKS, require
from fastclip.evaluate.results import read_result
from fastclip.evaluate.retrieval import scores_of
from fastclip.evaluate.zeroshot import class_embeddings, first_of_name
from fastclip.messages import logger
from fastclip.models.classifier import Classifier
from fastclip.models.clip import Model

TASK = "robustness"
# ImageNet-A is not among them: it was chosen by a model's mistakes, and follows no line well
AVERAGED = ("imagenetv2", "imagenet-sketch", "imagenet-r", "objectnet")
LEAST_MODELS = 3
# what every accuracy comes with
_ACCURACY = ("acc1", "ci_low", "ci_high")

# right answers, images
Counts = tuple[int, int]
_CHUNK_ROWS = 4096


def evaluate_shifts(
    original: Counts,
    shifts: Mapping[str, Counts],
    baseline: Line | Mapping[str, Line] | None = None,
) -> dict[str, Any]:
    """Metrics of one model on any data without and with shifts.

    Args:
        original: right answers and images in-distribution.
        shifts: the same under each shift.
        baseline: what in-distribution accuracy foretells, for all shifts or some by name; rho is
            left out where there is none.

    Raises:
        ValueError: there are no images, more right answers than images, or a shift has the name of
            a metric.
    """
    metrics: dict[str, Any] = dict(accuracy_metrics(*original))
    for name, counts in shifts.items():
        if name in metrics:
            raise ValueError(f"{name!r} is the name of a metric; give the shift another")
        found = accuracy_metrics(*counts)
        line = baseline if isinstance(baseline, Line) else (baseline or {}).get(name)
        if line is not None:
            found["rho"] = effective_robustness(found["acc1"], metrics["acc1"], line)
        metrics[name] = found
    return metrics


def accuracy_metrics(correct: int, count: int) -> dict[str, float]:
    """acc1 with the counts and its Clopper-Pearson interval (alpha 0.005)."""
    low, high = clopper_pearson(correct, count)
    counts: dict[str, float] = {"correct": correct, "count": count}
    return {"acc1": correct / count, **counts, "ci_low": low, "ci_high": high}


def shifts_in(metrics: Mapping[str, Any]) -> list[str]:
    """The names of the shifts that were measured, in their order."""
    return [name for name, found in metrics.items() if isinstance(found, dict) and "count" in found]


def baseline_from_results(paths: Sequence[Path]) -> dict[str, Line]:
    """Each shift's line, fitted on earlier results of models trained in-distribution alone.

    Raises:
        ValueError: a shift has fewer than three models with different accuracies in-distribution,
            a file is not a result of this task, or an accuracy is 0 or 1.
        FileNotFoundError: a file does not exist.
    """
    results = {str(path): read_metrics(path) for path in paths}
    lines = {}
    for name in dict.fromkeys(name for metrics in results.values() for name in shifts_in(metrics)):
        models = {path: found for path, found in results.items() if name in found}
        x = [found["acc1"] for found in models.values()]
        if len(set(x)) < LEAST_MODELS:
            raise ValueError(
                f"{len(set(x))} results with different accuracies have the shift {name!r}; a "
                f"baseline needs {LEAST_MODELS} or more: evaluate further models, e.g. of other "
                "sizes or trained on a part of the data"
            )
        y = [found[name]["acc1"] for found in models.values()]
        lines[name] = fit_line(x, y, names=list(models))
    return lines


def read_metrics(path: Path) -> dict[str, Any]:
    """The metrics in a result file of this task.

    Raises:
        ValueError: it is none. FileNotFoundError: it does not exist.
    """
    result = read_result(path)
    if result["task"] != TASK:
        raise ValueError(
            f"{path} is a result of {result['task']}; give one of `fastclip eval {TASK}`"
        )
    metrics: dict[str, Any] = result["metrics"]
    for part in (metrics, *(metrics[name] for name in shifts_in(metrics))):
        missing = [key for key in _ACCURACY if not isinstance(part.get(key), int | float)]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; evaluate the model again")
    return metrics


def evaluate_imagenet_shifts(model: Model, root: Path, encoding: Encoding) -> dict[str, Any]:
    """Zero-shot accuracies on ImageNet and those of its natural shifts that are there.

    A shift has rho_standard and rho_low by the two fits of `BASELINES`, and rho by the one that
    suits the model's accuracy (`suited_fit`). ImageNet-R, ImageNet-A and ObjectNet also have the
    accuracy on the validation images of their own classes, chosen among these, as
    own_classes_acc1, and rho_own_classes by the line of such accuracies. Where ImageNetV2, -Sketch,
    -R and ObjectNet are all there, "average" is of the four.

    Args:
        model: two towers, or a classifier of ImageNet's 1000 classes in their order.
        root: holds the folders, see `fastclip.evaluate.imagenet`.

    Raises:
        FileNotFoundError: the validation images are not there, or no shift is.
        ValueError: a folder is not as published, an image cannot be read, or a classifier is of
            other classes.
    """
    root = require(TASK, root)
    validation = read_validation(root)
    shifts = [shift for read in SHIFTS.values() if (shift := read(root)) is not None]
    if validation is None or not shifts:
        raise FileNotFoundError(
            f"{root} has no ImageNet validation images or none of the shifts {', '.join(SHIFTS)}; "
            f"get the files from {BENCHMARKS[TASK].source}"
        )
    for images in (validation, *shifts):
        _look_for_classes(images, validation)
    classes, names = None, None
    if isinstance(model.model, Classifier):
        count = len(model.model.criterion.weight)
        if count != CLASSES:
            raise ValueError(
                f"the classifier has {count} classes; ImageNet has {CLASSES}: evaluate it "
                "on data of its own classes"
            )
    else:
        names, templates = prompts()
        classes = class_embeddings(model, names, templates, precision=encoding.precision)
    logits = _logits(model, validation, classes, encoding)
    correct = count_correct(logits, None, validation.correct, names)
    metrics: dict[str, Any] = dict(accuracy_metrics(correct, len(validation.correct)))
    for shift in shifts:
        shifted = _logits(model, shift, classes, encoding)
        correct = count_correct(shifted, shift.allowed, shift.correct, names)
        found = accuracy_metrics(correct, len(shift.correct))
        for fit, lines in BASELINES.items():
            if shift.name in lines:
                line = lines[shift.name]
                found[f"rho_{fit}"] = effective_robustness(found["acc1"], metrics["acc1"], line)
        if shift.allowed is not None:
            found |= _on_own_classes(logits, validation, shift, found["acc1"], names)
        metrics[shift.name] = found
    if all(name in metrics for name in AVERAGED):
        metrics["average"] = _average(metrics)
    suited = f"rho_{suited_fit(metrics['acc1'])}"
    for name in (*SHIFTS, "average"):
        if suited in metrics.get(name, {}):
            metrics[name]["rho"] = metrics[name][suited]
    return metrics


def _look_for_classes(images: ShiftSet, validation: ShiftSet) -> None:
    """Note it where classes are missing, with which no published figure compares.

    Raises:
        ValueError: no validation image is of a class of theirs.
    """
    found, published = len(set(images.correct)), PUBLISHED_CLASSES[images.name]
    if found != published and sharing.is_first():
        logger.warning(
            f"{images.name} has images of {found:,} classes, as published of {published:,}: "
            "neither its accuracy nor rho compares with published ones"
        )
    if not images.answers().keys() & validation.answers().keys():
        raise ValueError(
            f"no validation image is of a class of {images.name}; unpack the validation images "
            "whole"
        )


def count_correct(
    logits: Tensor,
    allowed: Sequence[int] | None,
    correct: Sequence[frozenset[int]],
    names: Sequence[str] | None = None,
) -> int:
    """For how many images a right class has the highest logit of those allowed; ties are wrong.

    Args:
        logits: (N, C).
        allowed, correct: see `ShiftSet`.
        names: of the classes, see `zeroshot_metrics`: of one name the lowest comes first.
    """
    groups = list(dict.fromkeys(correct))
    number = {group: i for i, group in enumerate(groups)}
    right = torch.zeros(len(groups), logits.shape[1], dtype=torch.bool)
    for row, group in zip(right, groups, strict=True):
        row[list(group)] = True
    choice = torch.zeros(logits.shape[1], dtype=torch.bool)
    choice[list(allowed) if allowed is not None else slice(None)] = True
    wrong = choice & ~right
    if names is not None:
        wrong &= ~right[:, first_of_name(names)]
    rows = torch.tensor([number[group] for group in correct])
    found = 0
    for part, group in zip(logits.split(_CHUNK_ROWS), rows.split(_CHUNK_ROWS), strict=True):
        best_right = part.masked_fill(~right[group], -torch.inf).amax(dim=1)
        best_wrong = part.masked_fill(~wrong[group], -torch.inf).amax(dim=1)
        # NaN is above nothing: a broken model must not look good
        found += int((best_right > best_wrong).sum())
    return found


def _logits(model: Model, images: ShiftSet, classes: Tensor | None, encoding: Encoding) -> Tensor:
    features = embed_files(model, images.images, encoding)
    # a classifier's are its logits
    return features if classes is None else scores_of(features, classes)


def _on_own_classes(
    logits: Tensor,
    validation: ShiftSet,
    shift: ShiftSet,
    shift_accuracy: float,
    names: Sequence[str] | None,
) -> dict[str, float]:
    """The model on the validation images of the shift's classes, chosen among these."""
    answers = shift.answers()
    labels = [label for (label,) in validation.correct]
    rows = [row for row, label in enumerate(labels) if label in answers]
    right = [answers[labels[row]] for row in rows]
    correct = count_correct(logits[rows], shift.allowed, right, names)
    own = accuracy_metrics(correct, len(rows))
    found = {f"own_classes_{key}": own[key] for key in ("acc1", "correct", "count")}
    line = OWN_CLASSES_BASELINES[shift.name]
    found["rho_own_classes"] = effective_robustness(shift_accuracy, own["acc1"], line)
    return found


def _average(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The mean accuracy under the four shifts, and its rho by either fit."""
    mean, low = (
        sum(metrics[name][key] for name in AVERAGED) / len(AVERAGED) for key in ("acc1", "rho_low")
    )
    line = BASELINES["standard"]["average"]
    return {
        "acc1": mean,
        "rho_standard": effective_robustness(mean, metrics["acc1"], line),
        # no line was fitted to low mean accuracies: the mean of the four lines stands in
        "rho_low": low,
    }
