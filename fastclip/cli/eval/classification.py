"""`fastclip eval zeroshot` and `linear-probe`: classes by their names, or by a trained head."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclip.cli.eval.flags import DataEvaluation
from fastclip.cli.model_flags import set_head_weight
from fastclip.data.templates import DEFAULT_TEMPLATES, read_lines
from fastclip.evaluate.interpolation import (
    accuracy_by_head_weight,
    choose_head_weight,
    has_two_heads,
)
from fastclip.evaluate.table import CHANCE
from fastclip.evaluate.wds import is_wds, wds_classes
from fastclip.evaluate.zeroshot import classes_of, evaluate_zeroshot, require_same_classes
from fastclip.models.build import class_names
from fastclip.models.classifier import Classifier
from fastclip.models.clip import Model


@dataclass(frozen=True, kw_only=True)
class Zeroshot(DataEvaluation):
    """Classify images by their similarity to prompts of the classes' names."""

    classes: Path | None = None
    """Class names, one per line in index order; by default classnames.txt or classes.txt beside
    the shards."""
    held_out: str | None = None
    """Labeled data, as for --data, on which the weight of the weak head is chosen."""

    task = "zeroshot_classification"
    required = ("cls",)

    def suits(self, model: Model) -> bool:
        """A classifier needs no language for its own classes."""
        return super().suits(model) or isinstance(model.model, Classifier)

    def measure(self, model: Model) -> dict[str, Any]:
        """Accuracies, those of guessing, and the share of the weak head if it is chosen."""
        classes, templates = self._prompts_for(model)
        chosen = self._choose_head_weight(model, classes, templates)
        images = self.embed(model, self.data)
        metrics = evaluate_zeroshot(model, images, classes, templates, precision=self.precision)
        count = len(classes or class_names(Path(self.model)))
        guessed = {
            "acc1": 1 / count,
            "acc5": min(5 / count, 1.0),
            "mean_per_class_recall": 1 / count,
        }
        return {**metrics, **chosen, CHANCE: guessed}

    def _prompts_for(self, model: Model) -> tuple[list[str], list[str]]:
        """Class names and templates; none for a classifier, whose classes must be the data's."""
        if isinstance(model.model, Classifier):
            self._check_classes()
            return [], []
        return self._prompts()

    def _choose_head_weight(
        self, model: Model, classes: list[str], templates: list[str]
    ) -> dict[str, float]:
        """Set the share of the weak head that is best on --held-out; what to say of it."""
        if self.held_out is None:
            return {}
        if self.head_weight is not None:
            raise ValueError(
                f"--head-weight is {self.head_weight}; give it, or --held-out to choose it on"
            )
        if not has_two_heads(model):
            raise ValueError("--held-out: the model has no weak and strong heads; leave it out")
        if self.same_images(self.held_out):
            raise ValueError(
                f"--held-out {self.held_out} has the images of --data: choose the weight on other "
                "data than the test data"
            )
        require_same_classes_in(self.data, self.held_out, self.options.dataset_type)
        images = self.embed(model, self.held_out)
        precision = self.precision
        found = accuracy_by_head_weight(model, images, classes, templates, precision=precision)
        weight = choose_head_weight(found)
        set_head_weight(model, weight)
        return {"head_weight": weight}

    def _check_classes(self) -> None:
        """A classifier's classes have an order; in another the data's labels would be wrong."""
        own = class_names(Path(self.model))
        beside = self._beside()
        given = read_lines(self.classes) if self.classes else beside[0] if beside else own
        require_same_classes(str(self.classes or self.data), given, "the classifier", own)

    def _prompts(self) -> tuple[list[str], list[str]]:
        """Class names and templates: the flags', or else the data's."""
        beside = self._beside()
        if self.classes is None and beside is None:
            raise ValueError(
                f"no class names: give --classes FILE, or put classes.txt beside {self.data}"
            )
        classes, templates = beside or ([], list(DEFAULT_TEMPLATES))
        if self.classes is not None:
            classes = read_lines(self.classes)
        if self.options.templates is not None:
            templates = read_lines(Path(self.options.templates))
        return classes, templates

    def _beside(self) -> tuple[list[str], list[str]] | None:
        return _classes(self.data, self.options.dataset_type)


def _classes(data: str, dataset_type: str) -> tuple[list[str], list[str]] | None:
    """Names and templates that come with data, if any do."""
    return wds_classes(data) if is_wds(data) else classes_of(data, dataset_type)


def require_same_classes_in(data: str, other: str, dataset_type: str) -> None:
    """Refuse two data whose labels are of other classes, as far as their classes are known."""
    names, others = ((_classes(one, dataset_type) or ([], []))[0] for one in (data, other))
    require_same_classes(data, names, other, others)


@dataclass(frozen=True, kw_only=True)
class LinearProbe(DataEvaluation):
    """Train a linear classifier on the features of labeled images, and test it on others."""

    train_data: str
    """Labeled data to train on, as for --data, e.g. scenes:split=train."""
    train_split: str = "train"
    """Split to train on, for a folder in CLIP_benchmark's layout."""
    seed: int = 0
    """Seed of the validation split of the training data, which chooses the regularization."""

    task = "linear_probe"
    required = ("cls",)
    classify = False

    @property
    def name(self) -> str:
        """The command and the data."""
        return f"linear_probe_{self.dataset}"

    def suits(self, model: Model) -> bool:
        """Images are enough."""
        return True

    def measure(self, model: Model) -> dict[str, Any]:
        """The accuracies that `linear_probe` gives."""
        if self.same_images(self.train_data, self.train_split):
            raise ValueError(
                f"--train-data {self.train_data} has the images of --data: train on other images "
                "than those of the test"
            )
        from fastclip.evaluate.linear_probe import linear_probe

        require_same_classes_in(self.data, self.train_data, self.options.dataset_type)
        train = self.embed(model, self.train_data, self.train_split)
        return linear_probe(train, self.embed(model, self.data), seed=self.seed)
