"""CLIP, CLIP-Rocket and UniCLIP on CIFAR-10, in equal training time."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastclip.data.options import DataOptions
from fastclip.data.sources import open_source
from fastclip.evaluate.features import ImageFeatures, embed_images
from fastclip.evaluate.interpolation import has_two_heads, weigh_heads
from fastclip.evaluate.zeroshot import classes_of, evaluate_zeroshot
from fastclip.models.build import load
from fastclip.models.clip import Model
from fastclip.study.report import Row, write
from fastclip.study.runs import Scores, first_rows, run, steady_speed, training_seconds
from fastclip.train.config import parse

COLUMNS = {"accuracy": "zero-shot", "head_weight": "weak head's weight"}
RECIPES = {"CLIP": "cifar10", "CLIP-Rocket": "cifar10_rocket", "UniCLIP": "cifar10_uniclip"}
# of the images not trained on: the heads' weight is chosen on these, and no score is theirs
HELD_OUT = 1000
TEST = "val-00000.tar"
TRIAL_STEPS = 12
IMAGES = 45_000


def study(
    data: Path, folder: Path, minutes: float = 5, seeds: int = 2, flags: Sequence[str] = ()
) -> str:
    """Train each for as many samples as it manages in this time, and compare; the report.

    Args:
        data: folder that `fastclip convert cifar10` wrote.
        folder: for runs and report.
        minutes: of training, evaluation apart.
        seeds: runs of each.
        flags: of `fastclip train`, for all of them.
    """
    shards = ["--train-data", str(data / "train-{00000..00004}.tar")]
    rows: list[Row] = []
    for label, recipe in RECIPES.items():
        given = ["--config", recipe, *shards, *flags]
        samples = _samples(recipe, given, folder, minutes)
        outcomes = []
        for seed in range(seeds):
            ends = ["--seed", str(seed), "--train-num-samples", str(samples[0])]
            ends += ["--epochs", str(samples[1])]
            name, ends = f"{recipe}-{seed}", [*given, *ends]
            outcome = run(name, ends, folder, functools.partial(judge, data=data))
            seconds = training_seconds(folder / name, parse(given).optim.batch_size)
            outcomes.append(replace(outcome, seconds=seconds))
            print(outcomes[-1], flush=True)
        rows.append((label, outcomes))
    notes = [
        f"The images of val-00000.tar but for the first {HELD_OUT}, on which the weight between "
        f"the heads is chosen; {seeds} seeds, mean ± standard deviation; {minutes} minutes of "
        "training each, at the speed that each had in a short trial."
    ]
    return write(folder, "CIFAR-10 in equal time", rows, COLUMNS, notes)


def _samples(recipe: str, flags: Sequence[str], folder: Path, minutes: float) -> tuple[int, int]:
    """Samples an epoch and epochs that fill the time, by the speed of a short trial."""
    batch = parse(flags).optim.batch_size
    trial = ["--train-num-samples", str(batch * TRIAL_STEPS), "--epochs", "1"]
    trial += ["--log-every-n-steps", "1"]
    run(f"{recipe}-trial", [*flags, *trial], folder, lambda path: ({}, {}))
    total = max(batch, int(steady_speed(folder / f"{recipe}-trial") * minutes * 60))
    epochs = -(-total // IMAGES)
    return total // epochs, epochs


def shards_of(data: Path | None) -> Path:
    """The folder with CIFAR-10's shards.

    Raises:
        ValueError: none was given.
    """
    if data is None:
        raise ValueError(
            "this study trains on CIFAR-10; give the folder that `fastclip convert cifar10` wrote"
        )
    return data


def prompts_of(data: Path) -> tuple[list[str], list[str]]:
    """Class names and templates.

    Raises:
        ValueError: there are no class names beside the data.
    """
    prompts = classes_of(str(data / TEST))
    if prompts is None:
        raise ValueError(f"{data} has no classes.txt; make it with `fastclip convert cifar10`")
    return prompts


def embed_test(model: Model, data: Path) -> tuple[ImageFeatures, ImageFeatures]:
    """The images that no score is of, and those that are scored."""
    images = embed_images(model, open_source(str(data / TEST), DataOptions(), split="val"))
    rest = first_rows(images, len(images.keys) - HELD_OUT, start=HELD_OUT)
    return first_rows(images, HELD_OUT), rest


def judge(path: Path, data: Path) -> Scores:
    """A run's zero-shot accuracy on all but the first images; those weigh two heads."""
    prompts, model = prompts_of(data), load(path)
    held_out, rest = embed_test(model, data)
    scores = {}
    if has_two_heads(model):
        rest, scores["head_weight"] = weigh_heads(model, held_out, rest, *prompts)
    scores["accuracy"] = evaluate_zeroshot(model, rest, *prompts)["acc1"]
    return scores, {"accuracy": 0.1}
