"""What all evaluations have in common: the model, how it encodes, and where the result goes."""

import json
import sys
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from fastclip.bounded import read_yaml
from fastclip.cli.model_flags import ModelFlags
from fastclip.data.options import DataOptions
from fastclip.data.regular import digest_of
from fastclip.data.samples import Source
from fastclip.data.sources import open_source
from fastclip.data.variants import without_photographs
from fastclip.evaluate import sharing
from fastclip.evaluate.features import Encoding, ImageFeatures, embed_images
from fastclip.evaluate.results import replaces_other, write_result
from fastclip.evaluate.wds import expand_wds
from fastclip.messages import logger
from fastclip.models.checkpoint import is_best, run_of
from fastclip.models.clip import Model
from fastclip.models.image_tower import ImageSystem
from fastclip.train.distributed import world


@dataclass(frozen=True, kw_only=True)
class Evaluation(ModelFlags, ABC):
    """Flags that every evaluation of a model has."""

    batch_size: int = 256
    """Images per batch."""
    workers: int = 2
    """Processes that load images."""
    precision: Literal["fp32", "amp_bf16"] = "fp32"
    """Precision of the towers."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    output: Path | None = None
    """File for the result; by default EVALUATION_DATA.json in the run directory's folder eval, or,
    for other models, in ./eval/MODEL_PRETRAINED; a result of other settings is not replaced."""

    task: ClassVar[str]
    """What CLIP_benchmark calls the task."""
    unmeasured: ClassVar[tuple[str, ...]] = ()
    """Further flags on which no metric depends."""

    @property
    def encoding(self) -> Encoding:
        """How features are computed."""
        return Encoding(self.batch_size, self.workers, self.precision, sys.stderr.isatty())

    @property
    @abstractmethod
    def dataset(self) -> str:
        """What result files call the data."""

    @property
    def name(self) -> str:
        """The result's file, without its ending."""
        return self.dataset

    @abstractmethod
    def measure(self, model: Model) -> dict[str, Any]:
        """The metrics by name, on all ranks."""

    def suits(self, model: Model) -> bool:
        """Whether the model has what is measured: towers of images and of language."""
        return not isinstance(model.model, ImageSystem)

    def check(self) -> None:
        """See mistakes in the flags before the model is at work for hours.

        Raises:
            ValueError, FileNotFoundError: there is one.
        """
        if self.output is not None and self.output.is_dir():
            raise ValueError(f"--output {self.output} is a folder; give a file in it")

    def run(self) -> int:
        """Measure the model on all ranks; the first prints the metrics and writes the result."""
        self.check()
        with world(self.device) as here, sharing.together():
            model = self.open(here.device)
            if not self.suits(model):
                raise ValueError(
                    f"{self.model} was trained without language: there is nothing for "
                    f"{type(self).__name__.lower()} to compare images with"
                )
            given = {} if self.head_weight is None else {"head_weight": self.head_weight}
            metrics = {**self.measure(model), **given}
            if here.is_first:
                self._report(metrics)
        return 0

    def _report(self, metrics: dict[str, Any]) -> None:
        # the file has all digits
        print(json.dumps(_rounded(metrics), indent=2))
        model, pretrained = self.model, self.pretrained or ""
        if self.is_run:
            model, pretrained = _architecture(run_of(Path(self.model))), self.model
        if self.average:
            pretrained = f"{pretrained} (average)"
        settings = self._settings()
        output = self.output or self._file(settings)
        write_result(
            output,
            dataset=self.dataset,
            model=model,
            pretrained=pretrained,
            task=self.task,
            metrics=metrics,
            settings=settings,
            named=self.output is not None,
        )
        logger.info(f"written to {output}")

    def _settings(self) -> dict[str, Any]:
        """The flags that metrics depend on besides the model."""
        flags = {**asdict(self), **asdict(self).pop("options", {})}
        for name in (*_UNMEASURED, *self.unmeasured):
            flags.pop(name, None)
        # as a file gives them back
        settings: dict[str, Any] = json.loads(json.dumps(flags, default=str))
        return settings

    def _file(self, settings: dict[str, Any]) -> Path:
        """Where the result goes: it replaces another of the same settings and no other.

        Those of a run's best and other single checkpoints are beside that of the newest.
        """
        path, name = Path(self.model), self.name
        if is_best(self.model):
            name += "_best"
        elif self.is_run and run_of(path) != path:
            name += f"_{path.stem}"
        if self.average:
            name += "_average"
        folder = self.folder("eval")
        if replaces_other(folder / f"{name}.json", settings):
            name += f"_{digest_of(sorted(settings.items()))[:6]}"
        return folder / f"{name}.json"


@dataclass(frozen=True, kw_only=True)
class DataEvaluation(Evaluation):
    """Flags of an evaluation on data of any of fastclip's types."""

    data: str = "scenes"
    """As --train-data of `fastclip train`, e.g. '/data/val-{00000..00004}.tar', a COCO captions
    file, a folder with one folder of images per class, or 'scenes:split=compositional'; or a folder
    in CLIP_benchmark's webdataset layout."""
    split: str = "test"
    """Split, for a folder in CLIP_benchmark's layout."""
    options: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    """How the data are read."""
    num_samples: int = 1000
    """Number of scenes, collages or synthetic images; other data are read whole."""

    required: ClassVar[tuple[str, ...]]
    """Extensions that a shard's sample must have besides an image."""
    classify: ClassVar[bool] = True
    """Whether a classifier's logits are wanted, or the features below them."""

    @property
    def dataset(self) -> str:
        """The name of the first file or folder of the data."""
        return Path(without_photographs(self.data.split("::")[0])).stem

    @property
    def name(self) -> str:
        """The command and the data."""
        return f"{type(self).__name__.lower()}_{self.dataset}"

    def open_data(self, data: str, split: str | None = None) -> Source:
        """The data as they are evaluated."""
        return open_source(
            expand_wds(data, split or self.split),
            self.options,
            split="val",
            count=self.num_samples,
            required=self.required,
        )

    def same_images(self, data: str, split: str | None = None) -> bool:
        """Whether other data are those of --data, by whatever name."""
        return self.open_data(data, split).digest() == self.open_data(self.data).digest()

    def embed(self, model: Model, data: str, split: str | None = None) -> ImageFeatures:
        """Features of all readable images of the data; what was skipped is reported."""
        images = embed_images(
            model,
            self.open_data(data, split),
            **vars(self.encoding),
            classify=self.classify,
        )
        if images.faults.counts and sharing.is_first():
            logger.warning(f"skipped: {images.faults.report()}")
        return images


# flags of all evaluations on which no metric depends, or that the file's name stands for
_UNMEASURED = (
    *("model", "pretrained", "average", "trust_checkpoint"),
    *("options", "cache_dir", "cache_bytes"),
    *("batch_size", "workers", "device", "output"),
)


def _rounded(metrics: dict[str, Any]) -> dict[str, Any]:
    """With four digits, also in nested ones."""
    rounded = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            value = _rounded(value)
        rounded[name] = round(value, 4) if isinstance(value, float) else value
    return rounded


def _architecture(run: Path) -> str:
    model = read_yaml(run / "config.yaml")["model"]
    # by section, or flat, as runs of before have it
    return str(model["model"] if isinstance(model, dict) else model)
