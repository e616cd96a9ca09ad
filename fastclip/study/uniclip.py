"""UniCLIP's ablation (Lee et al. 2022): each of its three parts switched off, in miniature."""

from collections.abc import Sequence
from pathlib import Path

from fastclip.study.report import Row, write
from fastclip.study.runs import run
from fastclip.study.systems import COLUMNS

# samples of a run: every variant has left chance behind, and fifteen runs take half an hour
SAMPLES = 6400
VARIANTS: dict[str, tuple[str, ...]] = {
    "full": (),
    "no augmentation encoder": ("--no-augmentation-encoder",),
    "InfoNCE": ("--pair-loss", "info-nce"),
    "SupCon": ("--pair-loss", "sup-con"),
    "one shared scale": ("--shared-similarity",),
}


def study(folder: Path, seeds: int = 3, flags: Sequence[str] = ()) -> str:
    """Train each variant with each seed and compare; returns the report.

    Args:
        folder: for runs and report; runs that are there already are not made again.
        seeds: runs of each variant.
        flags: of `fastclip train`, for all of them.
    """
    rows: list[Row] = [(label, []) for label in VARIANTS]
    # seed by seed, so that a study that is stopped has all variants
    for seed in range(seeds):
        for (label, options), (_, outcomes) in zip(VARIANTS.items(), rows, strict=True):
            name = f"{label.lower().replace(' ', '_')}-{seed}"
            given = ["--config", "uniclip_scenes", "--train-num-samples", str(SAMPLES)]
            given += ["--seed", str(seed), *options, *flags]
            outcome = run(name, given, folder)
            outcomes.append(outcome)  # type: ignore[attr-defined]
            print(f"{name}: {outcome.seconds:.0f} s, {outcome.scores}", flush=True)
    notes = [
        f"{seeds} seeds each: mean ± standard deviation. Two means whose difference is smaller "
        "than their spread are not told apart by this study."
    ]
    return write(folder, "UniCLIP, its parts switched off", rows, COLUMNS, notes)
