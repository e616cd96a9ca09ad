"""Global contrastive losses beside CLIP's at a small batch: CIFAR-10, equally many samples."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastclip.study.cifar10 import judge
from fastclip.study.report import Row, write
from fastclip.study.runs import run, training_seconds

COLUMNS = {"accuracy": "zero-shot"}
BATCH = 128
_GLOBAL = ("--loss", "global", "--global-variant")
LOSSES: dict[str, tuple[str, ...]] = {
    "CLIP": (),
    "SogCLR": (*_GLOBAL, "sogclr"),
    "FastCLIP v1": (*_GLOBAL, "v1"),
    "FastCLIP v3": (*_GLOBAL, "v3"),
}


def study(
    data: Path, folder: Path, epochs: int = 2, seeds: int = 3, flags: Sequence[str] = ()
) -> str:
    """Train with each loss, seed after seed, and compare; the report.

    Args:
        data: folder that `fastclip convert cifar10` wrote.
        folder: for runs and report; runs that are there already are not made again.
        epochs: of each run.
        seeds: runs of each loss.
        flags: of `fastclip train`, for all of them.
    """
    shared = ["--config", "cifar10", "--train-data", str(data / "train-{00000..00004}.tar")]
    shared += ["--batch-size", str(BATCH), "--epochs", str(epochs), *flags]
    rows: list[Row] = [(label, []) for label in LOSSES]
    # a seed of every loss first: a study that is stopped has comparable runs
    for seed in range(seeds):
        for place, (label, own) in enumerate(LOSSES.items()):
            name = f"{label.lower().replace(' ', '-')}-{seed}"
            given = [*shared, *own, "--seed", str(seed)]
            outcome = run(name, given, folder, functools.partial(judge, data=data))
            outcome = replace(outcome, seconds=training_seconds(folder / name, BATCH))
            rows[place] = label, [*rows[place][1], outcome]
            print(outcome, flush=True)
    notes = [
        f"Batches of {BATCH}, {epochs} epochs, {seeds} seeds, mean ± standard deviation; recipe "
        "cifar10, scored on the images of val-00000.tar but for its first 1000. The losses' values "
        "are not comparable."
    ]
    return write(folder, "Global losses at a small batch", rows, COLUMNS, notes)
