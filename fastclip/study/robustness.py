"""What makes CLIP robust to distribution shift (Fang et al. 2022): five candidate causes.

The narrow distribution are the scenes as they are, one object each; a diverse one holds some of the
shifts as well. Classifiers trained by label on ever more of the narrow distribution give the
baseline line; effective robustness is accuracy under shift beyond it (Taori et al. 2020).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from fastclip.data.scenes import CLASSES, SHIFTS, TEMPLATES
from fastclip.data.sources import SceneSource
from fastclip.evaluate.effective_robustness import (
    Line,
    bootstrap_lines,
    clopper_pearson,
    effective_robustness,
    fit_line,
)
from fastclip.evaluate.features import embed_images
from fastclip.evaluate.robustness_plot import plot_robustness
from fastclip.evaluate.zeroshot import evaluate_zeroshot
from fastclip.models.clip import Model
from fastclip.models.simclr import SimCLR
from fastclip.study.report import Row, write
from fastclip.study.runs import Outcome, Plan, Scores, run_all
from fastclip.study.variants import (
    NO_VALIDATION,
    differences,
    outcomes_of,
    run_name,
    scores_of,
    seeds_note,
)
from fastclip.study.verdict import Verdict, negligible, positive, together

# of every test set
SCENES = 600
# samples of a run, whatever the number of different scenes: each sees as much
SAMPLES, QUICK_SAMPLES = 19200, 4800
# small batches: in so short a training the number of steps is what counts
STEPS = ("--batch-size", "32", "--warmup", "40", "--lr", "1e-3")
# of training sets: the share of these samples that are different scenes
SIZES = {"an eighth": 8, "a quarter": 4, "a half": 2, "all": 1}
TRAINED_SHIFTS = ("palette", "background", "corruption")
# differences of less count for nothing
MARGIN = 0.03

COLUMNS = {
    "accuracy": "accuracy",
    "shifted": "under shift",
    "rho": "ρ",
    "rho_trained": "ρ, shifts trained on",
    "rho_others": "ρ, other shifts",
}
NARROW = "scenes:objects=1"
DIVERSE = f"scenes:objects=1,shift={'+'.join(TRAINED_SHIFTS)}"

_CLIP = ("--config", "quickstart")
_CLASSIFY = ("--config", "classify_scenes")
_SIMCLR = ("--config", "simclr_scenes")


def _size(samples: int, passes: int) -> tuple[str, ...]:
    epochs = ("--epochs", str(passes), "--save-frequency", str(passes))
    return ("--train-num-samples", str(samples // passes), *epochs)


def variants(samples: int) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Flags by label, and the label of the run that one begins with."""
    narrow, diverse = ("--train-data", NARROW), ("--train-data", DIVERSE)
    sizes = {name: _size(samples, passes) for name, passes in SIZES.items()}
    whole = sizes["all"]
    baseline = {f"labels, {n}": ("", (*_CLASSIFY, *narrow, *size)) for n, size in sizes.items()}
    clip = {f"CLIP, {n}": ("", (*_CLIP, *narrow, *size)) for n, size in sizes.items()}
    tuned = (*_CLASSIFY, *narrow, *whole)
    return {
        **baseline,
        **clip,
        "CLIP, diverse": ("", (*_CLIP, *diverse, *whole)),
        "labels, diverse": ("", (*_CLASSIFY, *diverse, *whole)),
        "CLIP diverse, linear head": ("CLIP, diverse", (*tuned, "--lock-image")),
        "CLIP diverse, fine-tuned": ("CLIP, diverse", (*tuned, "--lr", "2e-4")),
        "SimCLR": ("", (*_SIMCLR, *narrow, *whole)),
        "SimCLR, labels": ("SimCLR", tuned),
        "SimCLR, diverse": ("", (*_SIMCLR, *diverse, *whole)),
        "SimCLR diverse, labels diverse": (
            "SimCLR, diverse",
            (*_CLASSIFY, *diverse, *whole),
        ),
    }


def study(
    folder: Path,
    seeds: int = 3,
    flags: Sequence[str] = (),
    jobs: int = 1,
    samples: int = SAMPLES,
) -> str:
    """Train the models of all five factors and measure their effective robustness; the report.

    Args:
        folder: for runs and report; runs that are there already are not made again.
        seeds: runs of each.
        flags: of `fastclip train`, for all of them.
        jobs: runs at a time.
        samples: of each run.
    """
    models = variants(samples)
    plans = []
    for seed in range(seeds):
        for label, (begun, own) in models.items():
            after = (run_name(begun, seed),) if begun else ()
            begins = ("--finetune", str(folder / after[0])) if after else ()
            given = (*STEPS, *own, *begins, "--seed", str(seed), *NO_VALIDATION, *flags)
            plans.append(Plan(run_name(label, seed), given, judge, after))
    outcomes = run_all(plans, folder, jobs)
    # what SimCLR alone has learned separates no classes
    labels = [label for label in models if not label.startswith("SimCLR") or "labels" in label]
    rows: list[Row] = [(label, outcomes_of(label, outcomes, seeds)) for label in labels]
    rows, line = with_rho(rows)
    _plot(folder / "robustness.png", rows, line)
    notes = [
        seeds_note(seeds, jobs),
        f"{SCENES} held-out scenes of one object and as many under each of the shifts "
        f"{', '.join(SHIFTS)}. The diverse distribution has {', '.join(TRAINED_SHIFTS)}. A run "
        f"sees {samples} samples, of as many different scenes or of the share named. ρ is beyond "
        "the line through the classifiers trained by label on the narrow distribution, in logits.",
        "![accuracy under shift against accuracy](robustness.png)",
    ]
    title = "Effective robustness, by factor"
    return write(folder, title, rows, COLUMNS, notes, verdicts_of(rows))


def judge(model: Model) -> Scores:
    """Accuracy on scenes as they are, under each shift, and the mean over the shifts."""
    if isinstance(model.model, SimCLR):
        return {}, {}
    scores = {}
    for shift in (None, *SHIFTS):
        images = embed_images(model, SceneSource("val", SCENES, objects=1, shift=shift))
        found = evaluate_zeroshot(model, images, list(CLASSES), list(TEMPLATES))
        scores[shift or "accuracy"] = found["acc1"]
    scores["shifted"] = mean(scores[shift] for shift in SHIFTS)
    return scores, {name: 1 / len(CLASSES) for name in ("accuracy", "shifted")}


def with_rho(rows: Sequence[Row]) -> tuple[list[Row], Line]:
    """The rows with ρ beyond the labeled classifiers' lines, and the line of all shifts' mean.

    Raises:
        ValueError: one of those got nothing right, or everything.
    """
    points = [o for label, outcomes in rows if label in _baseline() for o in outcomes]
    groups = {
        "rho_trained": TRAINED_SHIFTS,
        "rho_others": tuple(shift for shift in SHIFTS if shift not in TRAINED_SHIFTS),
        "rho": SHIFTS,
    }
    lines = {
        name: fit_line(
            [o.scores["accuracy"] for o in points],
            [mean(o.scores[shift] for shift in shifts) for o in points],
            names=[o.name for o in points],
        )
        for name, shifts in groups.items()
    }

    def extended(outcome: Outcome) -> Outcome:
        found = {
            name: effective_robustness(
                mean(outcome.scores[shift] for shift in shifts),
                outcome.scores["accuracy"],
                lines[name],
            )
            for name, shifts in groups.items()
        }
        return replace(outcome, scores={**outcome.scores, **found})

    done: list[Row] = [(label, list(map(extended, outcomes))) for label, outcomes in rows]
    return done, lines["rho"]


def _baseline() -> tuple[str, ...]:
    return tuple(f"labels, {name}" for name in SIZES)


def verdicts_of(rows: Sequence[Row]) -> list[Verdict]:
    """A verdict a factor, and the paper's finding as a whole."""

    def rho(label: str) -> list[float]:
        return scores_of(rows, label, "rho")

    clip, labels = "CLIP, all", "labels, all"
    distribution = positive(
        "a diverse training distribution makes CLIP robust",
        "ρ of CLIP diverse - narrow",
        differences(rho("CLIP, diverse"), rho(clip)),
        MARGIN,
    )
    others = [
        negligible(claim, what, differences(rho(first), rho(second)), MARGIN)
        for claim, what, first, second in (
            (
                "the size of the training set does little",
                "ρ of CLIP with all scenes - an eighth",
                clip,
                "CLIP, an eighth",
            ),
            (
                "language at training does little",
                "ρ of CLIP - labels, both narrow",
                clip,
                labels,
            ),
            (
                "language at test does little",
                "ρ of CLIP diverse, zero-shot - linear head",
                "CLIP, diverse",
                "CLIP diverse, linear head",
            ),
            (
                "the contrastive loss does little",
                "ρ of SimCLR, then labels - labels, both narrow",
                "SimCLR, labels",
                labels,
            ),
        )
    ]
    without_language = positive(
        "without any language a diverse distribution makes robust as well",
        "ρ of labels, diverse - narrow",
        differences(rho("labels, diverse"), rho(labels)),
        MARGIN,
    )
    whole = together(
        "data determine robustness: of five causes only the distribution",
        [distribution, without_language, *others],
    )
    return [whole, distribution, without_language, *others]


def _plot(path: Path, rows: Sequence[Row], line: Line) -> None:
    baseline = [o for label, outcomes in rows if label in _baseline() for o in outcomes]
    x = [o.scores["accuracy"] for o in baseline]
    y = [o.scores["shifted"] for o in baseline]
    points = []
    for label, outcomes in rows:
        if label not in _baseline():
            accuracy, shifted = (
                mean(o.scores[name] for o in outcomes) for name in ("accuracy", "shifted")
            )
            of_x, of_y = SCENES * len(outcomes), SCENES * len(SHIFTS) * len(outcomes)
            bar_x = clopper_pearson(round(accuracy * of_x), of_x)
            bar_y = clopper_pearson(round(shifted * of_y), of_y)
            points.append((label, accuracy, shifted, bar_x, bar_y))
    band = bootstrap_lines(x, y)
    names = "accuracy on scenes as trained on", "mean accuracy under shift"
    plot_robustness(path, list(zip(x, y, strict=True)), points, line, band, *names)
