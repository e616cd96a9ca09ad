"""Variants of one training, each with several seeds."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from fastclip.study.report import Row
from fastclip.study.runs import Judge, Outcome, Plan, run_all

# the scenes' own validation costs time and is not what a study judges by
NO_VALIDATION = ("--val-frequency", "1000000")
# small batches: in so short a training the number of steps is what counts
STEPS = ("--batch-size", "64", "--warmup", "30")


def run_variants(
    variants: Mapping[str, Sequence[str]],
    folder: Path,
    seeds: int,
    *,
    flags: Sequence[str] = (),
    jobs: int = 1,
    judge: Judge | None = None,
) -> list[Row]:
    """Train each variant with each seed, and judge; a row a variant.

    Args:
        variants: flags of `fastclip train` by label.
        folder: for the runs; those that are there already are not made again.
        seeds: runs of each.
        flags: for all of them, after the variant's own.
        jobs: runs at a time.
        judge: see `Plan`.
    """
    # seed by seed, so that a study that is stopped has all variants
    plans = [
        Plan(run_name(label, seed), (*own, "--seed", str(seed), *NO_VALIDATION, *flags), judge)
        for seed in range(seeds)
        for label, own in variants.items()
    ]
    outcomes = run_all(plans, folder, jobs)
    return [(label, outcomes_of(label, outcomes, seeds)) for label in variants]


def outcomes_of(label: str, outcomes: Mapping[str, Outcome], seeds: int) -> list[Outcome]:
    """A variant's outcomes, seed by seed."""
    return [outcomes[run_name(label, seed)] for seed in range(seeds)]


def run_name(label: str, seed: int) -> str:
    """Of a variant's run: its label in small letters and underscores, and the seed."""
    return f"{re.sub(r'[^a-z0-9]+', '_', label.lower()).strip('_')}-{seed}"


def scores_of(rows: Sequence[Row], label: str, name: str) -> list[float]:
    """A row's values of a score, one a seed."""
    return [outcome.scores[name] for outcome in dict(rows)[label]]


def mean_scores(rows: Sequence[Row], names: Iterable[str]) -> dict[str, list[float]]:
    """By label, the mean of some scores of each seed: one number a run, to judge all rows alike."""
    by_label = {label: [scores_of(rows, label, name) for name in names] for label, _ in rows}
    return {label: list(map(mean, zip(*own, strict=True))) for label, own in by_label.items()}


def differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """first - second, seed by seed: what a seed does to both falls out."""
    return [a - b for a, b in zip(first, second, strict=True)]


def seeds_note(seeds: int, jobs: int) -> str:
    """What the table's figures are of."""
    spread = f"{seeds} seeds: mean ± standard deviation" if seeds > 1 else "One seed"
    beside = f" Minutes are of {jobs} runs side by side." if jobs > 1 else ""
    return (
        f"{spread}. Intervals of differences are 95 %, by Student's t over the seeds, whose runs "
        f"are paired.{beside}"
    )
