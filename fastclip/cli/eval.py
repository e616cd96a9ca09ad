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
from fastclip.evaluate.features import embed_images
from fastclip.evaluate.results import write_result
from fastclip.evaluate.retrieval import evaluate_retrieval
from fastclip.evaluate.zeroshot import DEFAULT_TEMPLATES, classes_of, evaluate_zeroshot, read_lines
from fastclip.models.checkpoint import run_of
from fastclip.models.clip import load

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
        config.model, choose_device(config.device), trust_checkpoint=config.trust_checkpoint
    )
    required = ("cls",) if config.task == "zeroshot" else ("txt",)
    source = open_source(
        config.data,
        config.options,
        split="val",
        count=config.num_samples,
        required=required,
    )
    classes, templates = _classes(config) if config.task == "zeroshot" else ([], [])
    images = embed_images(
        model,
        source,
        batch_size=config.batch_size,
        workers=config.workers,
        precision=config.precision,
        progress=sys.stderr.isatty(),
    )
    if config.task == "zeroshot":
        metrics = evaluate_zeroshot(model, images, classes, templates, precision=config.precision)
    else:
        metrics = evaluate_retrieval(model, images, k=config.recall_k, precision=config.precision)
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
