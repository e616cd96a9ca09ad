"""Zero-shot classification with prompt ensembles (Radford et al. 2021, section 3.1)."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.data.folders import class_names
from fastclip.data.scenes import CLASSES, TEMPLATES
from fastclip.data.shards import expand_shards
from fastclip.data.sources import collage_classes, guess_type
from fastclip.data.templates import (
    CLASS_FILES,
    DEFAULT_TEMPLATES,
    TEMPLATE_FILES,
    fill_template,
    read_beside,
)
from fastclip.evaluate import imagenet
from fastclip.evaluate.features import ImageFeatures, embed_texts
from fastclip.evaluate.retrieval import scores_of
from fastclip.messages import counted
from fastclip.models.classifier import Classifier
from fastclip.models.clip import Model


def class_embeddings(
    model: Model, classes: list[str], templates: list[str], *, precision: str = "fp32"
) -> Tensor:
    """One normalized feature a class, (C, D): the mean of its normalized prompts' features.

    Args:
        classes: class names in index order.
        templates: each with one {} or {c} where the class name goes.

    Raises:
        ValueError: there is no class or template, or a template has no place for the name.
    """
    if not classes or not templates:
        raise ValueError(f"{len(classes)} classes and {len(templates)} templates: both are needed")
    names = list(dict.fromkeys(classes))
    prompts = [fill_template(template, name) for name in names for template in templates]
    features = embed_texts(model, prompts, precision=precision)
    means = features.view(len(names), len(templates), -1).mean(dim=1)
    # a feature of several parts has a norm for each
    found: Tensor = getattr(model.model, "renormalize", _unit)(means)
    # two of ImageNet's names stand for two classes each, which then tie to the bit
    return found[[names.index(name) for name in classes]]


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features, dim=-1)


def first_of_name(names: Sequence[str]) -> Tensor:
    """For every class the lowest one of the same name, (C,) int64."""
    first = {name: number for number, name in reversed(list(enumerate(names)))}
    return torch.tensor([first[name] for name in names])


def zeroshot_metrics(
    features: Tensor, classes: Tensor, labels: Tensor, names: Sequence[str] | None = None
) -> dict[str, float]:
    """acc1, acc5 and mean_per_class_recall, as CLIP_benchmark names them.

    Another class that ties with the true one, or whose logit is NaN, comes before it; a true class
    whose own logit is NaN or -inf is never right, even among five classes or fewer, where acc5
    counts every other image. Of classes of one name, which always tie, the lowest comes first, as
    it does by `torch.topk`. Recall is averaged over the classes that have images.

    Args:
        features: (N, D) image features. classes: (C, D) class features. labels: (N,) int64.
        names: of the classes; None: no two have one name.

    Raises:
        ValueError: a label is outside the classes.
    """
    # classes of equal features tie to the bit
    return classification_metrics(scores_of(features, classes), labels, names)


def classification_metrics(
    logits: Tensor, labels: Tensor, names: Sequence[str] | None = None
) -> dict[str, float]:
    """As `zeroshot_metrics`, of logits (N, C).

    Raises:
        ValueError: a label is outside the classes.
    """
    count = logits.shape[1]
    if labels.numel() == 0 or labels.min() < 0 or labels.max() >= count:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, but the {count} classes given are "
            f"0..{count - 1}"
            if labels.numel()
            else "there are no labels"
        )
    truth = logits.gather(1, labels[:, None])
    # NaN is below nothing: a broken model must not look perfect
    before = ~(logits < truth)
    if names is not None and len(set(names)) < count:
        # the true class is the lowest of its name, and these come after it
        before &= ~((first_of_name(names) == labels[:, None]) & (logits == truth))
        before.scatter_(1, labels[:, None], True)
    rank = before.sum(dim=1) - 1
    rank[~(truth[:, 0] > -torch.inf)] = count
    hits = (rank == 0).double()
    per_class = [hits[labels == label].mean() for label in labels.unique()]
    return {
        "acc1": hits.mean().item(),
        "acc5": (rank < min(5, count)).double().mean().item(),
        "mean_per_class_recall": torch.stack(per_class).mean().item(),
    }


def evaluate_zeroshot(
    model: Model,
    images: ImageFeatures,
    classes: list[str],
    templates: list[str],
    *,
    precision: str = "fp32",
) -> dict[str, float]:
    """Zero-shot metrics of embedded images that carry labels; unlabeled ones are left out.

    Of a classifier they are its own: it predicts its classes without names and templates.

    Raises:
        ValueError: no image has a label.
    """
    features, labels = labeled(images)
    if isinstance(model.model, Classifier):
        return classification_metrics(features, labels)
    embeddings = class_embeddings(model, classes, templates, precision=precision)
    return zeroshot_metrics(features, embeddings, labels, classes)


def labeled(images: ImageFeatures) -> tuple[Tensor, Tensor]:
    """The features (or logits) of images that carry labels, and the labels.

    Raises:
        ValueError: no image has a label.
    """
    rows = [i for i, label in enumerate(images.labels) if label is not None]
    if not rows:
        raise ValueError("no sample has a class index (KEY.cls); labels are needed")
    return images.features[rows], torch.tensor([images.labels[i] for i in rows])


def classes_of(data: str, dataset_type: str = "auto") -> tuple[list[str], list[str]] | None:
    """Class names and prompt templates: of a world's own, folders' names, or from beside the data.

    None where no file of class names is there. Templates default to "a photo of a {}."; folders
    that WordNet ids name are ImageNet's, with its class names and templates.
    """
    kind = guess_type(data) if dataset_type == "auto" else dataset_type
    if kind == "scenes":
        return list(CLASSES), list(TEMPLATES)
    if kind == "collages":
        return collage_classes(data.split("::")[0]), list(DEFAULT_TEMPLATES)
    if kind == "imagefolder":
        folders = class_names(Path(data.split("::")[0]).expanduser())
        return imagenet.prompts_of(folders) or (folders, list(DEFAULT_TEMPLATES))
    first = expand_shards(data)[0] if kind == "webdataset" else data.split("::")[0]
    classes = read_beside(first, CLASS_FILES)
    if classes is None:
        return None
    return classes, read_beside(first, TEMPLATE_FILES) or list(DEFAULT_TEMPLATES)


def require_same_classes(
    data: str, names: list[str] | None, other: str, others: list[str] | None
) -> None:
    """Refuse labels of other classes: they are numbers, and must mean the same in both.

    Args:
        data, other: what has the classes, for the message.
        names, others: the classes in the order of the labels; None or empty where they are unknown,
            and nothing is refused.

    Raises:
        ValueError: the classes differ, or their order does.
    """
    if not names or not others or names == others:
        return
    if len(names) != len(others):
        one, two = (counted(len(each), "class", "classes") for each in (names, others))
        differs = f"{data} has {one}, {other} has {two}"
    else:
        number = next(i for i, name in enumerate(names) if name != others[i])
        differs = f"class {number} is {names[number]!r} in {data}, {others[number]!r} in {other}"
    raise ValueError(f"{differs}; give data of the same classes, in the same order")
