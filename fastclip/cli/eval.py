"""`fastclip eval zeroshot|retrieval --model RUN --data SHARDS`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastclip.data.options import DataOptions
from fastclip.data.sources import open_source
from fastclip.device import choose_device
from fastclip.evaluate.features import ImageFeatures, embed_images
from fastclip.evaluate.interpolation import (
    accuracy_by_head_weight,
    choose_head_weight,
    has_two_heads,
)
from fastclip.evaluate.results import write_result
from fastclip.evaluate.retrieval import evaluate_retrieval
from fastclip.evaluate.zeroshot import DEFAULT_TEMPLATES, classes_of, evaluate_zeroshot, read_lines
from fastclip.models.build import class_names, load
from fastclip.models.checkpoint import run_of
from fastclip.models.clip import Model
from fastclip.models.controls import Classifier, ImageSystem

TASKS = {"zeroshot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a trained model; prints the metrics, writes CLIP_benchmark's JSON."""

    task: Annotated[Literal["zeroshot", "retrieval"], tyro.conf.Positional]
    """What to measure."""
    model: str
    """A run's folder (its latest checkpoint is taken) or one of its checkpoints."""
    data: str = "scenes"
    """As --train-data of `fastclip train`, e.g. '/data/val-{00000..00004}.tar', a COCO captions
    file, a folder with a folder of images a class, or 'scenes:split=compositional'."""
    options: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    """How the data are read."""
    num_samples: int = 1000
    """Number of scenes or synthetic images; other data are read whole."""
    classes: Path | None = None
    """Class names, one a line in index order; by default classnames.txt or classes.txt beside
    the shards."""
    average: bool = False
    """Evaluate the averaged weights of a run with --ema."""
    head_weight: float | None = None
    """Of a model with weak and strong heads: the weak one's share in the similarity."""
    held_out: str | None = None
    """Labelled data, as --data, on which that share is chosen."""
    recall_k: tuple[int, ...] = (1, 5, 10)
    """Ranks at which recall is measured."""
    output: Path | None = None
    """File for the result; by default eval/TASK_DATA.json in the run's folder."""
    trust_checkpoint: bool = False
    """Read a checkpoint of DeepSpeed's: pickles, which can run any code when they are loaded."""
    batch_size: int = 256
    """Images encoded at a time."""
    workers: int = 2
    """Processes that load images."""
    precision: Literal["fp32", "amp_bf16"] = "fp32"
    """Arithmetic of the towers."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""


def main(arguments: Sequence[str]) -> int:
    """Evaluate; prints one JSON object of metrics."""
    config = tyro.cli(EvalConfig, args=list(arguments), prog="fastclip eval")
    model = load(
        config.model,
        choose_device(config.device),
        average=config.average,
        trust_checkpoint=config.trust_checkpoint,
    )
    language_free = isinstance(model.model, ImageSystem)
    if language_free and not (config.task == "zeroshot" and isinstance(model.model, Classifier)):
        raise ValueError(
            f"{config.model} was trained without language: there is nothing for {config.task} to "
            "compare images with"
        )
    classes: list[str] = []
    templates: list[str] = []
    if language_free:
        _check_classes(config)
    elif config.task == "zeroshot":
        classes, templates = _classes(config)
    weight = _head_weight(config, model, classes, templates)
    images = _embed(config, model, config.data)
    if config.task == "retrieval":
        metrics = evaluate_retrieval(model, images, k=config.recall_k, precision=config.precision)
    else:
        metrics = evaluate_zeroshot(model, images, classes, templates, precision=config.precision)
    metrics |= weight
    if images.faults.counts:
        print(f"skipped: {images.faults.report()}", file=sys.stderr)
    print(json.dumps(metrics, indent=2))

    run = run_of(Path(config.model))
    dataset = Path(config.data.split("::")[0]).stem
    output = config.output or run / "eval" / f"{config.task}_{dataset}.json"
    write_result(
        output,
        dataset=dataset,
        model=_model_name(run),
        pretrained=config.model,
        task=TASKS[config.task],
        metrics=metrics,
    )
    print(f"written to {output}", file=sys.stderr)
    return 0


def _embed(config: EvalConfig, model: Model, data: str) -> ImageFeatures:
    required = ("cls",) if config.task == "zeroshot" else ("txt",)
    return embed_images(
        model,
        open_source(data, config.options, split="val", count=config.num_samples, required=required),
        batch_size=config.batch_size,
        workers=config.workers,
        precision=config.precision,
        progress=sys.stderr.isatty(),
    )


def _head_weight(
    config: EvalConfig, model: Model, classes: list[str], templates: list[str]
) -> dict[str, float]:
    """Set the share of the weak head, given or chosen; what to say of it."""
    weight = config.head_weight
    if weight is None and config.held_out is None:
        return {}
    if weight is not None and (config.held_out is not None or not 0 <= weight <= 1):
        raise ValueError(
            f"--head-weight is {weight}; give one in [0, 1], or --held-out to choose it on"
        )
    if not has_two_heads(model):
        raise ValueError(
            "--head-weight, --held-out: the model has no weak and strong heads; leave them out"
        )
    if config.held_out is not None:
        if config.held_out == config.data:
            raise ValueError(
                f"--held-out is --data, {config.data}: a weight chosen on the test data shows more "
                "than the model can"
            )
        if not classes:
            raise ValueError("--held-out chooses by zero-shot accuracy; give --head-weight")
        images = _embed(config, model, config.held_out)
        precision = config.precision
        found = accuracy_by_head_weight(model, images, classes, templates, precision=precision)
        weight = choose_head_weight(found)
    assert weight is not None
    model.model.get_buffer("head_weight").fill_(weight)
    return {"head_weight": weight}


def _check_classes(config: EvalConfig) -> None:
    """A classifier has its classes' order; named for the data in another, labels would be wrong."""
    own = class_names(Path(config.model))
    beside = classes_of(config.data, config.options.dataset_type)
    given = read_lines(config.classes) if config.classes else beside[0] if beside else own
    if given != own:
        raise ValueError(
            f"the classifier's classes are {', '.join(own[:3])}, ... ({len(own)}), the data's "
            f"{', '.join(given[:3])}, ... ({len(given)}): the labels would mean other classes"
        )


def _classes(config: EvalConfig) -> tuple[list[str], list[str]]:
    beside = classes_of(config.data, config.options.dataset_type)
    if config.classes is None and beside is None:
        raise ValueError(
            f"no class names: give --classes FILE, or put classes.txt beside {config.data}"
        )
    classes, templates = beside or ([], list(DEFAULT_TEMPLATES))
    if config.classes is not None:
        classes = read_lines(config.classes)
    if config.options.templates is not None:
        templates = read_lines(Path(config.options.templates))
    return classes, templates


def _model_name(run: Path) -> str:
    import yaml

    return str(yaml.safe_load((run / "config.yaml").read_text())["model"])
