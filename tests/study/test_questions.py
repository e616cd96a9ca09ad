"""The papers' questions: what their numbers are, of outcomes and features made by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastclip.cli import main
from fastclip.data.scenes import SHIFTS
from fastclip.study import captions, recipe, robustness, runs, uniclip
from fastclip.study.runs import Outcome, Plan, run_all
from fastclip.train.config import parse


def outcome(name: str, scores: dict[str, float]) -> Outcome:
    return Outcome(name, (), 1.0, 4.0, 1.0, scores, {})


@pytest.mark.parametrize("study", [recipe, uniclip], ids=["recipe", "uniclip"])
def test_variants_are_trainings(study: object) -> None:
    given = [(*own, *study.STEPS) for own in study.VARIANTS.values()]
    configs = [parse(flags) for flags in given]
    # no two are the same training
    assert len({str(config) for config in configs}) == len(configs)
    assert {config.optim.epochs for config in configs} == {1}


def planned(study: Callable[..., str], monkeypatch: pytest.MonkeyPatch, path: Path) -> list[Plan]:
    """What a study wants to be run."""
    plans: list[Plan] = []

    def record(wanted: list[Plan], folder: Path, jobs: int) -> dict[str, Outcome]:
        plans.extend(wanted)
        raise InterruptedError

    module = __import__(study.__module__, fromlist=["run_all"])
    monkeypatch.setattr(module, "run_all", record)
    with pytest.raises(InterruptedError):
        study(path, 2)
    return plans


def test_the_factors_of_robustness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plans = planned(robustness.study, monkeypatch, tmp_path)
    names = [plan.name for plan in plans]
    assert len(set(names)) == len(names) == 2 * 16
    for plan in plans:
        config = parse(plan.flags)
        # all see as much, however many scenes there are
        assert config.data.train_num_samples * config.optim.epochs == robustness.SAMPLES, plan.name
        assert ("shift=" in config.data.train_data) == (
            plan.name.startswith(("clip_diverse-", "labels_diverse", "simclr_diverse"))
        ), plan.name
        for name in plan.after:
            assert names.index(name) < names.index(plan.name)
            assert config.model.finetune == str(tmp_path / name)


def test_the_captions_and_towers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(captions, "teach", lambda folder: 0.0)
    plans = planned(captions.study, monkeypatch, tmp_path)
    assert len({plan.name for plan in plans}) == len(plans) == 2 * 5 * 2
    for plan in plans:
        config = parse(plan.flags)
        assert (
            bool(config.model.hard_negatives)
            == bool(plan.after)
            == (config.model.pretrained is not None)
        )
        assert (config.model.text_lm is not None) == ("pretrained" in plan.name)


def test_rho_is_beyond_the_labeled_classifiers() -> None:
    # on the line accuracy under shift is a half of the odds without
    def shifted(accuracy: float, beyond: float = 0.0) -> dict[str, float]:
        odds = accuracy / (1 - accuracy) / 2
        value = odds / (1 + odds) + beyond
        return {"accuracy": accuracy, "shifted": value, **dict.fromkeys(SHIFTS, value)}

    rows = [
        (f"labels, {size}", [outcome("b", shifted(0.2 + 0.1 * i))])
        for i, size in enumerate(robustness.SIZES)
    ]
    rows.append(("CLIP, diverse", [outcome("c", shifted(0.45, 0.125))]))
    found, line = robustness.with_rho(rows)
    assert line.slope == pytest.approx(1) and line.predict(0.5) == pytest.approx(1 / 3)
    for name in ("rho", "rho_trained", "rho_others"):
        assert found[-1][1][0].scores[name] == pytest.approx(0.125)
        assert found[1][1][0].scores[name] == pytest.approx(0, abs=1e-12)


def test_composition_counts_ties_as_wrong_and_kinds_alike() -> None:
    images = torch.eye(2)
    # captions of both images, then three false texts
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.0], [0.0, 0.5]])
    cases = [(0, 2, "order"), (0, 3, "order"), (1, 4, "relation")]
    assert captions.composition(images, texts, cases) == pytest.approx((0.5 + 1) / 2)


def test_false_captions_differ_from_the_true_ones() -> None:
    texts, cases = captions._cases()
    assert len(texts) == captions.SCENES + len(cases)
    assert {kind for _, _, kind in cases} == {"attribute", "relation", "order"}
    assert all(texts[image] != texts[false] for image, false, _ in cases)


def test_runs_side_by_side_wait_for_what_they_begin_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun: list[str] = []
    ended: list[str] = []

    def run(name: str, *rest: object) -> Outcome:
        begun.append(name)
        if name == "c":
            assert "a" in ended
        ended.append(name)
        return outcome(name, {})

    monkeypatch.setattr(runs, "run", run)
    plans = [Plan("a", ()), Plan("b", ()), Plan("c", (), after=("a",))]
    assert list(run_all(plans, tmp_path, jobs=2)) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="--jobs is 0"):
        run_all(plans, tmp_path, jobs=0)


def test_a_failure_ends_the_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(name: str, *rest: object) -> Outcome:
        raise RuntimeError(f"run {name} ended")

    monkeypatch.setattr(runs, "run", run)
    with pytest.raises(RuntimeError, match="run a ended"):
        run_all([Plan("a", ()), Plan("b", (), after=("a",))], tmp_path, jobs=2)


def test_no_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "recipe", "--seeds", "0"]) == 1
    assert "--seeds is 0" in capsys.readouterr().err
