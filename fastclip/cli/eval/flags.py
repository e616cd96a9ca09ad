"""What all evaluations have in common: the model, how it encodes, and where the result goes."""

import json
import re
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from fastclip.bounded import read_yaml
from fastclip.data.options import DataOptions
from fastclip.data.sources import open_source
from fastclip.evaluate import sharing
from fastclip.evaluate.features import Encoding, ImageFeatures, embed_images
from fastclip.evaluate.interpolation import has_two_heads
from fastclip.evaluate.results import write_result
from fastclip.evaluate.wds import expand_wds
from fastclip.messages import logger
from fastclip.models.checkpoint import is_best, run_of
from fastclip.models.clip import Model
from fastclip.models.image_tower import ImageSystem
from fastclip.models.open import is_run, open_model
from fastclip.train.distributed import world


@dataclass(frozen=True, kw_only=True)
class Evaluation(ABC):
    """Flags that every evaluation of a model has."""

    model: str
    """A run directory (its latest checkpoint is used), RUN@best, or one of its checkpoints; an
    open_clip model, with --pretrained; hf-hub:ORG/NAME, or local-dir:FOLDER of the same files."""
    pretrained: str | None = None
    """For an open_clip model: the name of its weights, or a checkpoint file."""
    average: bool = False
    """Evaluate the averaged weights of a run with --ema."""
    trust_checkpoint: bool = False
    """Read a DeepSpeed checkpoint: pickles, which can run arbitrary code when they are loaded."""
    head_weight: float | None = None
    """For a model with weak and strong heads: the weight of the weak head in the similarity."""
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
    for other models, in ./eval/MODEL_PRETRAINED."""

    task: ClassVar[str]
    """What CLIP_benchmark calls the task."""

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

    def run(self) -> int:
        """Measure the model on all ranks; the first prints the metrics and writes the result."""
        with world(self.device) as here, sharing.together():
            options = (self.pretrained, self.average, self.trust_checkpoint)
            model = open_model(self.model, here.device, *options)
            if not self.suits(model):
                raise ValueError(
                    f"{self.model} was trained without language: there is nothing for "
                    f"{type(self).__name__.lower()} to compare images with"
                )
            given = {}
            if self.head_weight is not None:
                set_head_weight(model, self.head_weight)
                given = {"head_weight": self.head_weight}
            metrics = {**self.measure(model), **given}
            if here.is_first:
                self._report(metrics)
        return 0

    def _report(self, metrics: dict[str, Any]) -> None:
        print(json.dumps(metrics, indent=2))
        model, pretrained, name = self.model, self.pretrained or "", self.name
        if is_run(self.model, self.pretrained):
            run = run_of(Path(self.model))
            model, pretrained, folder = _architecture(run), self.model, run / "eval"
        else:
            folder = Path("eval", re.sub(r"[^\w.-]+", "_", f"{model}_{pretrained}").strip("_"))
        if is_best(self.model):
            # beside the result of the newest checkpoint
            name = f"{name}_best"
        if self.average:
            pretrained, name = f"{pretrained} (average)", f"{name}_average"
        output = self.output or folder / f"{name}.json"
        write_result(
            output,
            dataset=self.dataset,
            model=model,
            pretrained=pretrained,
            task=self.task,
            metrics=metrics,
            named=self.output is not None,
        )
        logger.info(f"written to {output}")


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
    """Number of scenes or synthetic images; other data are read whole."""

    required: ClassVar[tuple[str, ...]]
    """Extensions that a shard's sample must have besides an image."""
    classify: ClassVar[bool] = True
    """Whether a classifier's logits are wanted, or the features below them."""

    @property
    def dataset(self) -> str:
        """The name of the first file or folder of the data."""
        return Path(self.data.split("::")[0]).stem

    @property
    def name(self) -> str:
        """The command and the data."""
        return f"{type(self).__name__.lower()}_{self.dataset}"

    def embed(self, model: Model, data: str, split: str | None = None) -> ImageFeatures:
        """Features of all readable images of the data; what was skipped is reported."""
        images = embed_images(
            model,
            open_source(
                expand_wds(data, split or self.split),
                self.options,
                split="val",
                count=self.num_samples,
                required=self.required,
            ),
            **vars(self.encoding),
            classify=self.classify,
        )
        if images.faults.counts and sharing.is_first():
            logger.warning(f"skipped: {images.faults.report()}")
        return images


def set_head_weight(model: Model, weight: float) -> None:
    """Set the weak head's share in the similarity of a model with weak and strong heads.

    Raises:
        ValueError: the share is outside [0, 1], or the model has no two heads.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"--head-weight is {weight}; give one in [0, 1]")
    if not has_two_heads(model):
        raise ValueError("--head-weight: the model has no weak and strong heads; leave it out")
    model.model.get_buffer("head_weight").fill_(weight)


def _architecture(run: Path) -> str:
    model = read_yaml(run / "config.yaml")["model"]
    # by section, or flat, as runs of before have it
    return str(model["model"] if isinstance(model, dict) else model)
