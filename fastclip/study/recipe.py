"""Do non-contrastive terms still help when plain CLIP is trained well (Fini et al. 2023)?"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from fastclip.study.report import write
from fastclip.study.systems import COLUMNS
from fastclip.study.variants import STEPS, differences, mean_scores, run_variants, seeds_note
from fastclip.study.verdict import positive, together

# of a run
SAMPLES, QUICK_SAMPLES = 9600, 3200
# CLIP's own loss on one weak pair, beside it the added term; linear heads, texts as they are
_BASIC = (
    *("--strong-views", "0", "--strong-scale", "None"),
    *("--label-smoothing", "0", "--no-separate-heads"),
)
_BASIC_CLIP = ("--config", "quickstart", "--epochs", "1")
# strongly augmented images and texts, heads of their own for them, label smoothing: the twins'
TERMS = ("SiamLIP", "BYOLIP", "BarLIP")
VARIANTS: dict[str, tuple[str, ...]] = {
    "CLIP, basic": _BASIC_CLIP,
    "SLIP, basic": ("--config", "slip_scenes"),
    **{f"{name}, basic": ("--config", f"{name.lower()}_scenes", *_BASIC) for name in TERMS},
    # swapped assignments are of strong views: they stay, behind the same linear heads
    "SwALIP, basic": ("--config", "swalip_scenes", "--no-separate-heads"),
    "CLIP, strong": ("--config", "rocket_scenes"),
    "SLIP, strong": ("--config", "slip_scenes", "--augment", "strong", "--text-augment", "strong"),
    **{f"{name}, strong": ("--config", f"{name.lower()}_scenes") for name in TERMS},
    "SwALIP, strong": ("--config", "swalip_scenes"),
}
ADDED = ("SLIP", *TERMS, "SwALIP")


def study(
    folder: Path,
    seeds: int = 3,
    flags: Sequence[str] = (),
    jobs: int = 1,
    samples: int = SAMPLES,
) -> str:
    """Train CLIP and what adds a term to it by both recipes and compare; returns the report.

    Args:
        folder: for runs and report; runs that are there already are not made again.
        seeds: runs of each.
        flags: of `fastclip train`, for all of them.
        jobs: runs at a time.
        samples: of each run.
    """
    flags = ("--train-num-samples", str(samples), *STEPS, *flags)
    rows = run_variants(VARIANTS, folder, seeds, flags=flags, jobs=jobs)
    total = mean_scores(rows, COLUMNS)

    def advantage(recipe: str) -> list[float]:
        added = zip(*(total[f"{name}, {recipe}"] for name in ADDED), strict=True)
        return differences([mean(values) for values in added], total[f"CLIP, {recipe}"])

    basic, strong = advantage("basic"), advantage("strong")
    parts = [
        positive(
            "with the basic recipe the added terms help",
            "five systems' mean - CLIP, mean of the scores,",
            basic,
        ),
        positive(
            "with the strong recipe they help less",
            "the advantage with the basic recipe - with the strong,",
            differences(basic, strong),
        ),
        positive(
            "the strong recipe itself helps plain CLIP",
            "CLIP strong - basic, mean of the scores,",
            differences(total["CLIP, strong"], total["CLIP, basic"]),
        ),
    ]
    verdicts = [together("the terms' advantage vanishes under a stronger recipe", parts), *parts]
    notes = [
        seeds_note(seeds, jobs),
        f"{samples} samples a run, the same for all: a step with strong views costs about three "
        "times a basic one. CLIP with the strong recipe is CLIP-Rocket; SLIP's heads are its own "
        "in both, its strong recipe is the augmentation of images and texts.",
    ]
    return write(folder, "Added terms and the recipe", rows, COLUMNS, notes, verdicts)
