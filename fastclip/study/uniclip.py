"""UniCLIP (Lee et al. 2022) beside CLIP and SLIP, and with each of its parts switched off."""

from collections.abc import Sequence
from pathlib import Path

from fastclip.study.report import write
from fastclip.study.systems import COLUMNS
from fastclip.study.variants import STEPS, differences, mean_scores, run_variants, seeds_note
from fastclip.study.verdict import Verdict, positive

# of a run
SAMPLES, QUICK_SAMPLES = 9600, 3200
_UNICLIP = ("--config", "uniclip_scenes")
VARIANTS: dict[str, tuple[str, ...]] = {
    "CLIP": ("--config", "quickstart", "--epochs", "1"),
    "SLIP": ("--config", "slip_scenes"),
    "UniCLIP": _UNICLIP,
    "no augmentation encoder": (*_UNICLIP, "--no-augmentation-encoder"),
    "InfoNCE": (*_UNICLIP, "--pair-loss", "info-nce"),
    "SupCon": (*_UNICLIP, "--pair-loss", "sup-con"),
    "one shared scale": (*_UNICLIP, "--shared-similarity"),
}
ABLATIONS = ("no augmentation encoder", "InfoNCE", "SupCon", "one shared scale")


def study(
    folder: Path,
    seeds: int = 3,
    flags: Sequence[str] = (),
    jobs: int = 1,
    samples: int = SAMPLES,
) -> str:
    """Train each variant with each seed and compare; returns the report.

    Args:
        folder: for runs and report; runs that are there already are not made again.
        seeds: runs of each variant.
        flags: of `fastclip train`, for all of them.
        jobs: runs at a time.
        samples: of each run.
    """
    flags = ("--train-num-samples", str(samples), *STEPS, *flags)
    rows = run_variants(VARIANTS, folder, seeds, flags=flags, jobs=jobs)
    total = mean_scores(rows, COLUMNS)

    def gain(claim: str, label: str) -> Verdict:
        by_seed = differences(total["UniCLIP"], total[label])
        return positive(claim, f"UniCLIP - {label}, mean of the scores,", by_seed)

    verdicts = [
        gain("UniCLIP is better than CLIP", "CLIP"),
        gain("UniCLIP is better than SLIP", "SLIP"),
        *(gain(f"without its part UniCLIP is worse: {label}", label) for label in ABLATIONS),
    ]
    notes = [seeds_note(seeds, jobs), f"{samples} samples a run, the same for all."]
    return write(folder, "UniCLIP and its parts", rows, COLUMNS, notes, verdicts)
