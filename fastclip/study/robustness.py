"""What makes CLIP robust to distribution shift (Fang et al. 2022): five candidate causes.

The narrow distribution are photographs of CIFAR-10 as they are; in the diverse one half of them are
corrupted, by noise or by blur. The shifts are ImageNet-C's fifteen corruptions. Classifiers trained
by label on the narrow distribution, of three sizes and at several times of training, give a line
from accuracy to accuracy under shift; effective robustness ρ is what a model has beyond it (Taori
et al. 2020). Every seed has its own line, so the spread over seeds has the line's uncertainty in
it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from fastclip.data.corrupt import corrupt_shards
from fastclip.data.options import DataOptions
from fastclip.data.sources import open_source
from fastclip.evaluate.effective_robustness import (
    bootstrap_lines,
    effective_robustness,
    fit_line,
)
from fastclip.evaluate.features import embed_images
from fastclip.evaluate.robustness_plot import Interval, plot_robustness
from fastclip.evaluate.zeroshot import evaluate_zeroshot
from fastclip.models.build import load
from fastclip.models.clip import Model
from fastclip.models.simclr import SimCLR
from fastclip.study.cifar10 import TEST, embed_test, prompts_of, shards_of
from fastclip.study.question import Arm, Contrast, Question, Settings
from fastclip.study.report import Row
from fastclip.study.runs import Judge, Outcome, Scores
from fastclip.study.verdict import Answer, Design, half_width

# ImageNet-C's families; the first two are in the diverse distribution
FAMILIES: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
TRAINED_FAMILIES = ("noise", "blur")
SHIFTS = tuple(kind for kinds in FAMILIES.values() for kind in kinds)
SEVERITY = 3
# what the third and the fourth shard of the diverse distribution are corrupted by
TRAINED_KINDS = ("gaussian_noise", "defocus_blur")
# photographs of each test set under shift; the original has as many for each of four
PHOTOS = 1000

# of a run, each of SAMPLES photographs, however many different ones there are
EPOCHS, SAMPLES = 6, 9000
# of the line's longest run: no model that is compared may be more accurate than all of the line
LONGER = 12
# shards of the training sets, 9,000 photographs each
SIZES = {"a quarter": 1, "a half": 2, "all": 4}

_COMMON = (
    *("--model", "RN10t-32", "--batch-size", "128", "--lr", "1e-3", "--wd", "0.1"),
    *("--warmup", "50", "--grad-clip-norm", "1", "--workers", "1"),
    *("--train-num-samples", str(SAMPLES)),
)
_WEAK = ("--aug-scale", "0.5", "1", "--aug-flip", "0.5")
_CLASSIFY = ("--objective", "classify", *_WEAK)
_SIMCLR = (
    *("--objective", "simclr", "--strong-scale", "0.2", "1", "--aug-blur", "0"),
    *("--projector-hidden", "512", "--projector-width", "128"),
)

COLUMNS = {
    "accuracy": "accuracy",
    "shifted": "under shift",
    "rho": "ρ",
    "rho_trained": "ρ, families trained on",
    "rho_others": "ρ, other families",
}
_GROUPS = {
    "rho": SHIFTS,
    "rho_trained": tuple(kind for name in TRAINED_FAMILIES for kind in FAMILIES[name]),
    "rho_others": tuple(
        kind for name, kinds in FAMILIES.items() if name not in TRAINED_FAMILIES for kind in kinds
    ),
}


def _prepare(settings: Settings) -> None:
    """Corrupt two training shards, and the test photographs by every kind."""
    data, folder = shards_of(settings.data), settings.folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for shard, kind in zip(("train-00002", "train-00003"), TRAINED_KINDS, strict=True):
        _corrupt(str(data / f"{shard}.tar"), folder / "train", (kind,))
    _corrupt(str(data / TEST), folder / "test", SHIFTS, PHOTOS)


def _corrupt(shard: str, folder: Path, kinds: Sequence[str], number: int | None = None) -> None:
    missing = [kind for kind in kinds if not (folder / f"{kind}-{SEVERITY}.tar").exists()]
    if missing:
        corrupt_shards(shard, folder, missing, SEVERITY, number)


def _arms(settings: Settings) -> Mapping[str, Arm]:
    data = shards_of(settings.data)
    narrow = {
        name: ("--train-data", str(data / f"train-{{00000..{shards - 1:05d}}}.tar"))
        for name, shards in SIZES.items()
    }
    corrupted = [settings.folder / "data" / "train" / f"{k}-{SEVERITY}.tar" for k in TRAINED_KINDS]
    patterns = (data / "train-{00000..00001}.tar", *corrupted)
    diverse = ("--train-data", "::".join(map(str, patterns)))
    epochs = ("--epochs", str(settings.share(EPOCHS)))
    common = (*_COMMON, *epochs)
    line = (*common, *_CLASSIFY, "--save-all")
    longer = (*_COMMON, "--epochs", str(settings.share(LONGER)), *_CLASSIFY, "--save-all")
    tuned = (*common, *_CLASSIFY, *narrow["all"])
    times, late = line_epochs(settings)
    return {
        **{
            f"labels, {name}": Arm((*line, *narrow[name]), judge=_judge_epochs(settings, times))
            for name in SIZES
        },
        "labels, longer": Arm((*longer, *narrow["all"]), judge=_judge_epochs(settings, late)),
        "CLIP, a quarter": Arm((*common, *_WEAK, *narrow["a quarter"])),
        "CLIP, all": Arm((*common, *_WEAK, *narrow["all"])),
        "CLIP, diverse": Arm((*common, *_WEAK, *diverse)),
        "labels, diverse": Arm((*common, *_CLASSIFY, *diverse)),
        "CLIP diverse, linear head": Arm((*tuned, "--lock-image"), "CLIP, diverse"),
        "CLIP diverse, fine-tuned": Arm((*tuned, "--lr", "2e-4"), "CLIP, diverse"),
        "SimCLR": Arm((*common, *_SIMCLR, *narrow["all"])),
        "SimCLR, then labels": Arm(tuned, "SimCLR"),
    }


def _judge(settings: Settings) -> Judge:
    data, shifted = shards_of(settings.data), settings.folder / "data" / "test"

    def judge(path: Path) -> Scores:
        scores = score(load(path), data, shifted)
        return scores, dict.fromkeys(("accuracy", "shifted"), 0.1) if scores else {}

    return judge


def line_epochs(settings: Settings) -> tuple[Sequence[int], Sequence[int]]:
    """When the line's runs are judged, and when its longest one is: later, and at its end.

    Args:
        settings: of the study.
    """
    end, last = settings.share(EPOCHS), settings.share(LONGER)
    return range(1, end + 1), sorted(range(last, end, -2))


def _judge_epochs(settings: Settings, epochs: Sequence[int]) -> Judge:
    """As `_judge`, and `EPOCH/NAME` for the line's further points."""
    data, shifted = shards_of(settings.data), settings.folder / "data" / "test"

    def judge(path: Path) -> Scores:
        scores: dict[str, float] = {}
        for epoch in epochs:
            own = score(load(path / "checkpoints" / f"epoch_{epoch}.pt"), data, shifted)
            scores |= own | {f"{epoch}/{name}": value for name, value in own.items()}
        return scores, dict.fromkeys(("accuracy", "shifted"), 0.1)

    return judge


def score(model: Model, data: Path, shifted: Path) -> dict[str, float]:
    """Accuracy on photographs as they are, under each shift, and the mean over the shifts."""
    if isinstance(model.model, SimCLR):
        return {}
    prompts, (_, rest) = prompts_of(data), embed_test(model, data)
    scores = {"accuracy": evaluate_zeroshot(model, rest, *prompts)["acc1"]}
    for kind in SHIFTS:
        source = open_source(str(shifted / f"{kind}-{SEVERITY}.tar"), DataOptions(), split="val")
        found = embed_images(model, source)
        scores[kind] = evaluate_zeroshot(model, found, *prompts)["acc1"]
    scores["shifted"] = mean(scores[kind] for kind in SHIFTS)
    return scores


def line_points(rows: Sequence[Row], place: int) -> list[dict[str, float]]:
    """The scores of a seed's line: of its labeled classifiers of all sizes and times.

    Args:
        rows: all of them.
        place: of the seed among the outcomes.
    """
    points = []
    for label, outcomes in rows:
        if label in _LINE:
            scores = outcomes[place].scores
            epochs = sorted({name.split("/")[0] for name in scores if "/" in name})
            for epoch in epochs:
                names = ("accuracy", "shifted", *SHIFTS)
                points.append({name: scores[f"{epoch}/{name}"] for name in names})
    return points


def with_rho(rows: Sequence[Row]) -> list[Row]:
    """The rows with ρ beyond the line of the same seed, where a model's accuracy is in its range.

    Raises:
        ValueError: one of the line's models got nothing right, or everything.
    """
    return [
        (label, [_beyond(o, line_points(rows, place)) for place, o in enumerate(outcomes)])
        for label, outcomes in rows
    ]


def _beyond(outcome: Outcome, points: Sequence[Mapping[str, float]]) -> Outcome:
    x = [point["accuracy"] for point in points]
    accuracy = outcome.scores["accuracy"]
    # a line says nothing of what it was not fitted on
    if not points or not min(x) <= accuracy <= max(x):
        return outcome
    found = {}
    for name, shifts in _GROUPS.items():
        line = fit_line(x, [mean(point[shift] for shift in shifts) for point in points])
        shifted = mean(outcome.scores[shift] for shift in shifts)
        found[name] = effective_robustness(shifted, accuracy, line)
    return replace(outcome, scores={**outcome.scores, **found})


def _finish(rows: Sequence[Row], settings: Settings) -> Sequence[Row]:
    if all(label in dict(rows) for label in _LINE):
        rows = with_rho(rows)
        _plot(settings.folder / "robustness.png", rows, len(settings.seeds))
    return rows


def _notes(settings: Settings) -> list[str]:
    shared = ", ".join(TRAINED_KINDS)
    times, late = (", ".join(map(str, epochs)) for epochs in line_epochs(settings))
    return [
        f"A run sees {settings.share(EPOCHS) * SAMPLES:,} photographs, of 36,000 different ones or "
        "of the share named; the diverse distribution has a half of them corrupted, by "
        f"{shared}. Accuracy is on 4,000 others; under shift on {PHOTOS:,} for each of "
        f"ImageNet-C's {len(SHIFTS)} corruptions at severity {SEVERITY}. ρ is beyond the line, in "
        "logits, through the classifiers trained by label on the narrow distribution: of three "
        f"sizes, after {times} epochs of {SAMPLES:,}, and in a longer run after {late}. A row "
        "without ρ has an accuracy outside the line's.",
        "![accuracy under shift against accuracy](robustness.png)",
    ]


_LINE = (*(f"labels, {name}" for name in SIZES), "labels, longer")


def _does(claim: str, first: str, second: str, *, little: bool = True) -> Contrast:
    expected: Answer = "no larger effect" if little else "shows"
    return Contrast(claim, (first,), (second,), "rho", "accuracy", expected)


QUESTION = Question(
    title="Effective robustness, by cause",
    columns=COLUMNS,
    # in a pilot with two other seeds, differences varied by 0.0 to 0.5 points
    design=Design(seeds=3, smallest=0.02, spread=0.006),
    contrasts=[
        _does(
            "a diverse training distribution makes CLIP robust",
            *("CLIP, diverse", "CLIP, all"),
            little=False,
        ),
        _does(
            "a diverse distribution makes robust without any language",
            *("labels, diverse", "labels, all"),
            little=False,
        ),
        _does("a larger training set makes CLIP robust", "CLIP, all", "CLIP, a quarter"),
        _does("language at training makes robust", "CLIP, all", "labels, all"),
        _does("language at test makes robust", "CLIP, diverse", "CLIP diverse, linear head"),
        _does("a contrastive loss makes robust", "SimCLR, then labels", "labels, all"),
    ],
    arms=_arms,
    judge=_judge,
    notes=_notes,
    prepare=_prepare,
    finish=_finish,
)


def _plot(path: Path, rows: Sequence[Row], seeds: int) -> None:
    """Each mean with its 95 % interval over seeds, and the line through all seeds' classifiers."""
    runs = [line_points([row], place) for row in rows if row[0] in _LINE for place in range(seeds)]
    of_run = [(run, p["accuracy"], p["shifted"]) for run, own in enumerate(runs) for p in own]
    numbers, x, y = zip(*of_run, strict=True)
    points = []
    for label, outcomes in rows:
        if label not in _LINE:
            values = [[o.scores[name] for o in outcomes] for name in ("accuracy", "shifted")]
            bars = [_bar(own) for own in values]
            points.append((label, mean(values[0]), mean(values[1]), bars[0], bars[1]))
    names = "photographs as they are", "mean over the corruptions"
    band, line = bootstrap_lines(x, y, runs=numbers), fit_line(x, y)
    plot_robustness(path, list(zip(x, y, strict=True)), points, line, band, *names)


def _bar(values: Sequence[float]) -> Interval:
    """The 95 % interval of a mean over seeds; of one seed the value alone."""
    half = half_width(values) if len(values) > 1 else 0.0
    return mean(values) - half, mean(values) + half
