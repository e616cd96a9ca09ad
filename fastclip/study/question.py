"""A paper's question in miniature: its arms, what is compared, what was decided beforehand."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

from fastclip.study.report import Row, write
from fastclip.study.runs import Judge, Plan, run_all
from fastclip.study.verdict import Answer, Design, Verdict, compare, is_strong

# a run's own validation costs time and is not what a study judges by
NO_VALIDATION = ("--val-frequency", "1000000")


@dataclass(frozen=True)
class Settings:
    """How a question is asked this time.

    Attributes:
        folder: for runs and report; runs that are there already are not made again.
        data: folder that `fastclip convert cifar10` wrote; None where a question can do without.
        seeds: a run of each arm with each of these.
        jobs: runs at a time.
        quick: a quarter of the training.
        only: labels of the arms to train; all if empty.
        flags: of `fastclip train`, for all runs, after an arm's own.
    """

    folder: Path
    data: Path | None = None
    seeds: Sequence[int] = (0, 1, 2)
    jobs: int = 1
    quick: bool = False
    only: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def share(self, number: int) -> int:
        """A number of steps, epochs or samples; of a quick study a quarter, at least one."""
        return max(1, number // 4) if self.quick else number


@dataclass(frozen=True)
class Arm:
    """What is trained with several seeds.

    Attributes:
        flags: of `fastclip train`.
        begins_with: label of the arm whose run of the same seed this one starts from, or None.
        by: the flag that names that run.
        judge: see `Question`, where it differs.
    """

    flags: tuple[str, ...]
    begins_with: str | None = None
    by: str = "--finetune"
    judge: Judge | None = None


@dataclass(frozen=True)
class Contrast:
    """A signed sum of arms' scores, positive if a claim is true.

    Attributes:
        claim: a statement.
        plus, minus: labels of arms.
        score: its name in `Question.columns`; None for the mean of all columns.
        strength: the score that says whether an arm has learned enough; by default the same.
        expected: what the paper finds.

    Examples:
        >>> from fastclip.study.question import Contrast
        >>> Contrast("SLIP is better", ("SLIP",), ("CLIP",)).formula
        '"SLIP" − "CLIP"'
    """

    claim: str
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    score: str | None = None
    strength: str | None = None
    expected: Answer = "shows"

    @property
    def arms(self) -> tuple[str, ...]:
        """All of them."""
        return self.plus + self.minus

    @property
    def formula(self) -> str:
        """The sum, as it is read."""
        # names have signs and commas of their own
        plus, minus = ([f'"{arm}"' for arm in arms] for arms in (self.plus, self.minus))
        return " − ".join([" + ".join(plus), *minus])


@dataclass(frozen=True)
class Question:
    """A study.

    Attributes:
        title: of its report.
        columns: scores by name, with their headings.
        design: what was decided before the full run.
        contrasts: what is judged.
        arms: by label, what is trained.
        judge: what scores a run.
        notes: what a reader of the table has to know.
        prepare: makes what the runs need and is not there yet.
        finish: adds scores that need all rows, and draws what only this study has.
    """

    title: str
    columns: Mapping[str, str]
    design: Design
    contrasts: Sequence[Contrast]
    arms: Callable[[Settings], Mapping[str, Arm]]
    judge: Callable[[Settings], Judge]
    notes: Callable[[Settings], Sequence[str]]
    prepare: Callable[[Settings], None] = field(default=lambda settings: None)
    finish: Callable[[Sequence[Row], Settings], Sequence[Row]] = field(
        default=lambda rows, settings: rows
    )


def answer(question: Question, settings: Settings) -> str:
    """Train every arm with every seed, judge, and write the report, which is returned.

    Raises:
        ValueError: an arm of `only` is unknown, or begins with one that is left out.
    """
    arms = _chosen(question.arms(settings), settings.only)
    judge = question.judge(settings)
    question.prepare(settings)
    # seed by seed, so that a study that is stopped has all arms
    plans = [
        _plan(label, arm, seed, settings, arm.judge or judge)
        for seed in settings.seeds
        for label, arm in arms.items()
    ]
    outcomes = run_all(plans, settings.folder, settings.jobs)
    rows: Sequence[Row] = [
        (label, [outcomes[run_name(label, seed)] for seed in settings.seeds]) for label in arms
    ]
    rows = question.finish([row for row in rows if any(o.scores for o in row[1])], settings)
    contrasts = [c for c in question.contrasts if set(c.arms) <= set(dict(rows))]
    verdicts = [
        judge_contrast(contrast, rows, question.columns, question.design.smallest)
        for contrast in contrasts
    ]
    notes = [_seeds_note(settings), f"Decided beforehand: {question.design}"]
    return write(
        settings.folder,
        question.title,
        rows,
        question.columns,
        [*notes, *question.notes(settings)],
        verdicts,
        {"design": {**asdict(question.design), "power": question.design.power}},
    )


def judge_contrast(
    contrast: Contrast, rows: Sequence[Row], columns: Mapping[str, str], smallest: float
) -> Verdict:
    """What the rows say of a contrast; too weak where an arm of it has learned too little.

    Args:
        rows: label and outcomes, one a seed, of all arms.
        columns: scores by name, with their headings.
        smallest: the smallest effect of interest, a share.
    """
    strength = contrast.strength or contrast.score
    weak = [arm for arm in contrast.arms if not _learned(arm, strength, rows, columns)]
    unscored = [arm for arm in contrast.arms if not _has(arm, contrast.score, rows, columns)]
    for arms, why in ((weak, "too near to chance"), (unscored, "cannot be scored")):
        if arms:
            because = f"{why}: {', '.join(arms)}"
            return Verdict(contrast.claim, "too weak to compare", because, contrast.expected)
    signs = [1] * len(contrast.plus) + [-1] * len(contrast.minus)
    scores = [arm_scores(rows, arm, contrast.score, columns) for arm in contrast.arms]
    values = [
        sum(sign * value for sign, value in zip(signs, by_arm, strict=True))
        for by_arm in zip(*scores, strict=True)
    ]
    heading = columns[contrast.score] if contrast.score else "mean of the scores"
    what = f"{contrast.formula}; {heading}:"
    return compare(contrast.claim, what, values, smallest, contrast.expected)


def arm_scores(
    rows: Sequence[Row], arm: str, score: str | None, columns: Mapping[str, str]
) -> list[float]:
    """An arm's values of a score, or of the mean of all columns, one a seed."""
    names = [score] if score else list(columns)
    return [mean(outcome.scores[name] for name in names) for outcome in dict(rows)[arm]]


def _has(arm: str, score: str | None, rows: Sequence[Row], columns: Mapping[str, str]) -> bool:
    names = [score] if score else list(columns)
    return all(name in outcome.scores for outcome in dict(rows)[arm] for name in names)


def _learned(arm: str, score: str | None, rows: Sequence[Row], columns: Mapping[str, str]) -> bool:
    names = [score] if score else list(columns)
    chance = mean(dict(rows)[arm][0].chance.get(name, 0.0) for name in names)
    means = {
        label: mean(arm_scores(rows, label, score, columns))
        for label, _ in rows
        if _has(label, score, rows, columns)
    }
    return is_strong(means[arm], chance, max(means.values()))


def _chosen(arms: Mapping[str, Arm], only: Sequence[str]) -> Mapping[str, Arm]:
    unknown = [label for label in only if label not in arms]
    if unknown:
        raise ValueError(f"--only {unknown[0]!r}: no such arm; there are {', '.join(arms)}")
    chosen = {label: arm for label, arm in arms.items() if not only or label in only}
    for label, arm in chosen.items():
        if arm.begins_with is not None and arm.begins_with not in chosen:
            raise ValueError(
                f"--only {label!r}: it begins with {arm.begins_with!r}; name that arm too"
            )
    return chosen


def _plan(label: str, arm: Arm, seed: int, settings: Settings, judge: Judge) -> Plan:
    after = () if arm.begins_with is None else (run_name(arm.begins_with, seed),)
    begins = (arm.by, str(settings.folder / after[0])) if after else ()
    ends = ("--seed", str(seed), *NO_VALIDATION, *settings.flags)
    return Plan(run_name(label, seed), (*arm.flags, *begins, *ends), judge, after)


def run_name(label: str, seed: int) -> str:
    """Of an arm's run: its label in small letters and underscores, and the seed."""
    return f"{re.sub(r'[^a-z0-9]+', '_', label.lower()).strip('_')}-{seed}"


def _seeds_note(settings: Settings) -> str:
    several = len(settings.seeds) > 1
    spread = (
        f"{len(settings.seeds)} seeds: mean ± standard deviation. Intervals of differences are "
        "95 %, by Student's t over the seeds, whose runs are paired."
        if several
        else "One seed: no intervals, no verdicts."
    )
    beside = f" Minutes are of {settings.jobs} runs side by side." if settings.jobs > 1 else ""
    return spread + beside
