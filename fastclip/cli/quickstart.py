"""`fastclip quickstart`: train and evaluate a small model on the embedded data."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from fastclip.cli.train import run_or_status
from fastclip.command_line import parse_flags
from fastclip.data.scenes import CLASSES, TEMPLATES
from fastclip.data.sources import SceneSource
from fastclip.device import choose_device, precision_flags
from fastclip.evaluate.features import embed_images
from fastclip.evaluate.gallery import draw_retrieval
from fastclip.evaluate.results import write_result
from fastclip.evaluate.retrieval import caption_pairs, chance_of_retrieval, evaluate_retrieval
from fastclip.evaluate.zeroshot import evaluate_zeroshot
from fastclip.models.build import load
from fastclip.train.config import parse

RECIPE = "quickstart"
SCENES = 1000
QUERIES = 6


@dataclass(frozen=True)
class QuickstartConfig:
    """Train a small CLIP on the embedded scenes, evaluate it, plot the loss and some retrievals."""

    logs: str = "logs"
    """Directory that holds the run directories."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    samples: int | None = None
    """Training samples per epoch; by default as in the recipe."""


def main(arguments: Sequence[str]) -> int:
    """Run it; prints a table of scores beside what guessing would give."""
    config = parse_flags(QuickstartConfig, arguments, "fastclip quickstart")
    started = time.monotonic()
    name = f"quickstart-{datetime.now():%Y%m%d-%H%M%S}"
    flags = ["--config", RECIPE, "--logs", config.logs, "--name", name]
    device = choose_device(config.device)
    flags += ["--device", config.device, *precision_flags(device)]
    if config.samples is not None:
        flags += ["--train-num-samples", str(config.samples)]
    settings = parse(flags)
    run = run_or_status(settings)
    if isinstance(run, int):
        return run

    model = load(run, device)
    source = SceneSource("val", SCENES)
    images = embed_images(model, source)
    zeroshot = evaluate_zeroshot(model, images, list(CLASSES), list(TEMPLATES))
    retrieval = evaluate_retrieval(model, images, k=(1, 5))
    for task, metrics in (
        ("zeroshot_classification", zeroshot),
        ("zeroshot_retrieval", retrieval),
    ):
        write_result(
            run / "eval" / f"{task}_scenes.json",
            dataset="scenes",
            model=settings.model.model,
            pretrained=str(run),
            task=task,
            metrics=metrics,
        )
    # captions of several objects are the better test
    texts, pairs = caption_pairs(images.texts)
    queries = sorted(texts, key=lambda text: (-len(text), text))[:: SCENES // 12]
    draw_retrieval(run / "retrieval.png", model, source, images, queries[:QUERIES])

    chance = chance_of_retrieval(pairs, (1, 5))
    rows = [
        (f"zero-shot top-1, {len(CLASSES)} classes", zeroshot["acc1"], 1 / len(CLASSES)),
    ]
    recalls = {
        f"{asked} -> {found}, recall@{k}": f"{found}_retrieval_recall@{k}"
        for asked, found in (("image", "text"), ("text", "image"))
        for k in (1, 5)
    }
    rows += [(label, retrieval[name], chance[name]) for label, name in recalls.items()]
    print(f"\n{SCENES} held-out scenes{'':14} score   chance")
    for label, score, guess in rows:
        print(f"{label:30} {score:7.1%}  {guess:7.1%}")
    print(f"\nloss curve          {run}/loss.png")
    print(f"retrieved examples  {run}/retrieval.png")
    print(f"search it           fastclip search 'a small red star' --model {shlex.quote(str(run))}")
    print(f"use it              model, preprocess, tokenizer = fastclip.load({str(run)!r})")
    print(f"took {(time.monotonic() - started) / 60:.1f} minutes")
    return 0
