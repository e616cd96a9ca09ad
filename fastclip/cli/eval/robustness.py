"""`fastclip eval robustness`: accuracies under distribution shifts, and effective robustness."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclip.cli.eval.classification import Zeroshot, require_same_classes_in
from fastclip.evaluate import sharing
from fastclip.evaluate.effective_robustness import BASELINES, Line, suited_fit
from fastclip.evaluate.imagenet import SHIFTS, prompts, wordnet_ids
from fastclip.evaluate.results import read_result
from fastclip.evaluate.robustness_plot import plot_shifts
from fastclip.evaluate.shifts import (
    Counts,
    accuracy_metrics,
    baseline_from_results,
    evaluate_imagenet_shifts,
    evaluate_shifts,
    read_metrics,
)
from fastclip.evaluate.zeroshot import evaluate_zeroshot, labeled
from fastclip.messages import logger
from fastclip.models.build import class_names
from fastclip.models.classifier import Classifier
from fastclip.models.clip import Model


@dataclass(frozen=True, kw_only=True)
class Robustness(Zeroshot):
    """Classify images without and with distribution shift, and compute effective robustness.

    Either ImageNet with its natural shifts (--root), or any labeled data (--data and --shifts) of
    the same classes.
    """

    root: Path | None = None
    """Folder with imagenet/val and any of imagenetv2-matched-frequency-format-val, imagenet-sketch,
    imagenet-r, imagenet-a and objectnet-1.0, as they are published."""
    shifts: tuple[str, ...] = ()
    """NAME=DATA of each shift, with DATA as for --data: fog=/data/corrupted/fog-3.tar."""
    baseline: tuple[Path, ...] = ()
    """Results of three or more models trained only on the distribution of --data, from which the
    expected accuracy under a shift is fitted."""
    plot: Path | None = None
    """PNG file to draw; one per shift if there are several."""
    compare: tuple[Path, ...] = ()
    """Results of other models to draw as well."""

    task = "robustness"
    unmeasured = ("plot", "compare")

    @property
    def dataset(self) -> str:
        """imagenet, or the name of the data."""
        return super().dataset if self.root is None else "imagenet"

    def check(self) -> None:
        """See `Evaluation.check`; of the files, too, that others have made."""
        super().check()
        self._shifts()
        if self.compare and self.plot is None:
            raise ValueError("--compare draws further models; give --plot FILE.png as well")
        if self.plot is not None and (self.plot.suffix != ".png" or self.plot.is_dir()):
            raise ValueError(f"--plot is {self.plot}; give a file that ends in .png")
        for path in (*self.baseline, *self.compare):
            read_metrics(path)
            dataset = read_result(path)["dataset"]
            if dataset != self.dataset:
                logger.warning(f"{path} is a result on {dataset}, and this is on {self.dataset}")
        self._lines()

    def measure(self, model: Model) -> dict[str, Any]:
        """Accuracies with their intervals, and rho; see `fastclip.evaluate.shifts`."""
        if self.root is not None:
            return self._measure_imagenet(model, self.root)
        return self._measure_data(model, self._shifts(), self._lines())

    def _report(self, metrics: dict[str, Any]) -> None:
        super()._report(metrics)
        self._summarize(metrics)
        if self.plot is not None:
            lines = self._lines() if self.root is None else BASELINES[suited_fit(metrics["acc1"])]
            models = [(f"{self.model} {self.pretrained or ''}".strip(), metrics)]
            models += [(_label(path), read_metrics(path)) for path in self.compare]
            baselines = [read_metrics(path) for path in self.baseline]
            for path in plot_shifts(self.plot, models, lines, baselines):
                logger.info(f"drawn in {path}")

    def _lines(self) -> dict[str, Line]:
        return baseline_from_results(self.baseline) if self.baseline else {}

    def _shifts(self) -> dict[str, str]:
        """The data of each shift by its name.

        Raises:
            ValueError: flags exclude each other, or a shift has no name or data, one name twice, or
                a name that no file or another metric can have.
        """
        if (self.root is None) == (not self.shifts):
            raise ValueError(
                "give --root with ImageNet's sets, or --data with one NAME=DATA or more after "
                "--shifts"
            )
        others = {
            "--baseline": self.baseline,
            "--held-out": self.held_out,
            "--classes": self.classes,
            "--templates": self.options.templates,
            "--data": self.data != Robustness.data,
        }
        if self.root is not None and (given := [flag for flag, value in others.items() if value]):
            raise ValueError(
                f"{' and '.join(given)} cannot be given with --root, whose data, classes and "
                "baselines are ImageNet's"
            )
        pairs = [shift.partition("=") for shift in self.shifts]
        shifts = {name: data for name, _, data in pairs if name and data}
        if len(shifts) < len(pairs):
            raise ValueError(
                f"--shifts {' '.join(self.shifts)}: give NAME=DATA with a name of its own for each"
            )
        for name in shifts:
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(f"--shifts {name}=...: give a name of letters, digits, . + and -")
            if name in (*accuracy_metrics(1, 1), "head_weight"):
                raise ValueError(f"--shifts {name}=...: this is the name of a metric; give another")
        return shifts

    def _measure_imagenet(self, model: Model, root: Path) -> dict[str, Any]:
        if isinstance(model.model, Classifier):
            own = class_names(Path(self.model))
            if own not in (list(wordnet_ids()), prompts()[0]):
                raise ValueError(
                    f"the classifier's classes are {', '.join(own[:3])}, ... ({len(own)}); for "
                    f"ImageNet they must be {', '.join(wordnet_ids()[:3])}, ... in this order"
                )
        metrics = evaluate_imagenet_shifts(model, root, self.encoding)
        absent = [name for name in SHIFTS if name not in metrics]
        if absent and sharing.is_first():
            logger.warning(f"not in {root}, left out: {', '.join(absent)}")
        return metrics

    def _measure_data(
        self, model: Model, shifts: dict[str, str], lines: dict[str, Line]
    ) -> dict[str, Any]:
        classes, templates = self._prompts_for(model)
        chosen = self._choose_head_weight(model, classes, templates)

        def counts(data: str) -> Counts:
            images = self.embed(model, data)
            count = len(labeled(images)[1])
            found = evaluate_zeroshot(model, images, classes, templates, precision=self.precision)
            return round(found["acc1"] * count), count

        for data in shifts.values():
            require_same_classes_in(self.data, data, self.options.dataset_type)
        original = counts(self.data)
        shifted = {name: counts(data) for name, data in shifts.items()}
        return {**evaluate_shifts(original, shifted, lines), **chosen}

    def _summarize(self, metrics: dict[str, Any]) -> None:
        """Print accuracies in percent and effective robustness in points."""
        fit = f", {suited_fit(metrics['acc1'])} baseline" if self.root is not None else ""
        logger.info(f"{self.dataset}: {100 * metrics['acc1']:.1f} %{fit}")
        for name, found in metrics.items():
            if isinstance(found, dict):
                rho = f", ρ {100 * found['rho']:+.1f} points" if "rho" in found else ""
                logger.info(f"{name}: {100 * found['acc1']:.1f} %{rho}")


def _label(path: Path) -> str:
    result = read_result(path)
    return f"{result['model']} {result['pretrained']}".strip()
