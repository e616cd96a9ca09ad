"""How a question is asked: which runs, which sums of scores, and what may not be compared."""

import math
from pathlib import Path

import pytest

from fastclip.study import question
from fastclip.study.question import Arm, Contrast, Question, Settings, answer, judge_contrast
from fastclip.study.runs import Outcome, Plan
from fastclip.study.verdict import Design

COLUMNS = {"accuracy": "zero-shot", "recall": "recall @5"}


def outcomes(name: str, *pairs: tuple[float, ...]) -> tuple[str, list[Outcome]]:
    """A row: a seed's accuracy and recall each; chance is 0.1 and 0.02."""
    chance = {"accuracy": 0.1, "recall": 0.02}
    return name, [
        Outcome(name, (), 1.0, 4.0, 1.0, dict(zip(COLUMNS, pair, strict=False)), chance)
        for pair in pairs
    ]


ROWS = [
    outcomes("a", (0.50, 0.30), (0.52, 0.34), (0.54, 0.32)),
    outcomes("b", (0.40, 0.30), (0.41, 0.30), (0.45, 0.33)),
    outcomes("c", (0.60, 0.02), (0.58, 0.03), (0.59, 0.01)),
    outcomes("d", (0.29, 0.30), (0.30, 0.30), (0.31, 0.30)),
]


def judged(*arms: tuple[str, ...], score: str | None = "accuracy", smallest: float = 0.02) -> str:
    return str(judge_contrast(Contrast("it helps", *arms, score), ROWS, COLUMNS, smallest))


def test_a_difference_is_paired_over_seeds() -> None:
    # 0.10, 0.11, 0.09: mean 0.10, deviation 0.01
    half = 4.30265 * 0.01 / math.sqrt(3)
    assert judged(("a",), ("b",)) == (
        f'**shows, as in the paper**: it helps ("a" − "b"; zero-shot: +10.0 ± '
        f"{100 * half:.1f} points; smallest effect of interest: 2.0)"
    )


def test_a_difference_of_differences() -> None:
    # (a - b) - (c - a): 0.10 - 0.10, 0.11 - 0.06, 0.09 - 0.05
    assert '"a" + "a" − "b" − "c"; zero-shot: +3.0' in judged(("a", "a"), ("b", "c"))


def test_without_a_score_the_mean_of_the_columns_counts() -> None:
    # accuracy by 0.10, 0.11, 0.09, recall by 0, 0.04, -0.01: the mean of all six
    assert '"a" − "b"; mean of the scores: +5.5' in judged(("a",), ("b",), score=None)


def test_an_arm_near_chance_is_not_compared() -> None:
    # the best has 0.59, half-way from chance is 0.345
    assert judged(("a",), ("d",)) == ("**too weak to compare**: it helps (too near to chance: d)")
    # by recall it is c that learned nothing
    assert "too near to chance: c)" in judged(("a",), ("c",), score="recall")


def test_a_score_that_is_missing_is_said() -> None:
    rows = [*ROWS, outcomes("e", (0.5,), (0.5,), (0.5,))]
    contrast = Contrast("it helps", ("a",), ("e",), "recall", strength="accuracy")
    assert str(judge_contrast(contrast, rows, COLUMNS, 0.02)) == (
        "**too weak to compare**: it helps (cannot be scored: e)"
    )


def ask(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> tuple[list[Plan], str]:
    """The runs that a question of three arms wants, and its report."""
    plans: list[Plan] = []

    def run_all(wanted: list[Plan], folder: Path, jobs: int) -> dict[str, Outcome]:
        plans.extend(wanted)
        scores = {plan.name: 0.5 + 0.01 * place for place, plan in enumerate(wanted)}
        return {
            name: Outcome(name, (), 60.0, 4.0, 1.0, {"accuracy": score}, {"accuracy": 0.1})
            for name, score in scores.items()
        }

    monkeypatch.setattr(question, "run_all", run_all)
    asked = Question(
        title="A and B",
        columns={"accuracy": "zero-shot"},
        design=Design(seeds=3, smallest=0.03, spread=0.01),
        contrasts=[Contrast("B helps", ("B",), ("A",)), Contrast("C helps", ("C, late",), ("A",))],
        arms=lambda settings: {
            "A": Arm(("--lr", "1")),
            "B": Arm(("--lr", str(settings.share(8)))),
            "C, late": Arm((), "A", "--pretrained"),
        },
        judge=lambda settings: lambda path: ({}, {}),
        notes=lambda settings: ["Notes."],
    )
    return plans, answer(asked, settings)


def test_every_arm_runs_with_every_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plans, report = ask(monkeypatch, Settings(tmp_path, seeds=(4, 5), flags=("--wd", "0")))
    assert [plan.name for plan in plans] == [
        *("a-4", "b-4", "c_late-4"),
        *("a-5", "b-5", "c_late-5"),
    ]
    late = plans[-1]
    assert late.after == ("a-5",)
    assert late.flags[:2] == ("--pretrained", str(tmp_path / "a-5"))
    assert late.flags[-2:] == ("--wd", "0") and "5" in late.flags
    # +0.01 in both seeds
    assert "**no larger effect, unlike the paper**: B helps" in report
    assert "3 seeds find a difference of 3.0 points" in report and "2 seeds: mean" in report


def test_a_part_of_the_arms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plans, report = ask(monkeypatch, Settings(tmp_path, seeds=(0,), only=("A", "B"), quick=True))
    assert [plan.name for plan in plans] == ["a-0", "b-0"]
    assert plans[1].flags[:2] == ("--lr", "2")
    assert "B helps" in report and "C helps" not in report and "One seed" in report
    with pytest.raises(ValueError, match="--only 'D': no such arm; there are A, B, C, late"):
        ask(monkeypatch, Settings(tmp_path, only=("D",)))
    with pytest.raises(ValueError, match="--only 'C, late': it begins with 'A'; name that arm too"):
        ask(monkeypatch, Settings(tmp_path, only=("C, late",)))
