"""The papers' questions: what they train, and what their numbers are of features made by hand."""

import io
import tarfile
import threading
from pathlib import Path

import pytest
import torch

from fastclip.cli import main
from fastclip.cli import study as command
from fastclip.cli.study import QUESTIONS
from fastclip.study import collages, recipe, robustness, runs
from fastclip.study.question import Settings
from fastclip.study.runs import Outcome, Plan, run_all
from fastclip.train.config import parse


def outcome(name: str, scores: dict[str, float]) -> Outcome:
    return Outcome(name, (), 1.0, 4.0, 1.0, scores, {})


@pytest.mark.parametrize("name", QUESTIONS)
def test_arms_are_different_trainings(name: str, tmp_path: Path) -> None:
    question, settings = QUESTIONS[name], Settings(tmp_path, tmp_path / "cifar10")
    arms = question.arms(settings)
    configs = {label: parse(arm.flags) for label, arm in arms.items()}
    begun = {label: arm.begins_with for label, arm in arms.items()}
    assert len({(str(c), begun[label]) for label, c in configs.items()}) == len(arms)
    for contrast in question.contrasts:
        assert set(contrast.arms) <= set(arms)
        assert contrast.score is None or contrast.score in question.columns
    labels = list(arms)
    for label, first in begun.items():
        # what a run begins with is made before it
        assert first is None or labels.index(first) < labels.index(label)
    # a quick study trains a quarter
    quick = question.arms(Settings(tmp_path, tmp_path / "cifar10", quick=True))
    assert all(quick[label].flags != arm.flags for label, arm in arms.items())
    # at the spread that a pilot had, where there was one
    assert question.design.power is None or question.design.power >= 0.8


def test_the_recipes_see_equally_many_photographs(tmp_path: Path) -> None:
    arms = QUESTIONS["recipe"].arms(Settings(tmp_path, tmp_path))
    configs = [parse(arm.flags) for arm in arms.values()]
    assert len({(c.data.train_data, c.optim.epochs, c.optim.batch_size) for c in configs}) == 1
    assert all(c.data.aug_blur in (None, 0.0) for c in configs)
    # a template without its class would be a false caption
    assert all(c.data.strong_text_augment == "none" for c in configs if c.model.views[1] > 1)


def test_the_recipes_photographs_are_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "cifar10"
    data.mkdir()
    with tarfile.open(data / "train-00000.tar", "w") as tar:
        for name in (f"{i:06d}.{end}" for i in range(5) for end in ("jpg", "txt", "cls")):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    monkeypatch.setattr(recipe, "PHOTOGRAPHS", 3)
    settings = Settings(tmp_path / "out", data)
    # a second time what is there stays
    for _ in range(2):
        recipe.QUESTION.prepare(settings)
    (copy,) = (tmp_path / "out").glob("photographs-*.tar")
    with tarfile.open(copy) as tar:
        contents = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    assert list(contents) == [f"{i:06d}.{e}" for i in range(3) for e in ("jpg", "txt", "cls")]
    assert all(content == name.encode() for name, content in contents.items())


def test_the_factors_of_robustness(tmp_path: Path) -> None:
    arms = QUESTIONS["robustness"].arms(Settings(tmp_path / "out", tmp_path))
    for label, arm in arms.items():
        config = parse(arm.flags)
        # the line has to reach beyond what is compared
        seen = 108_000 if label == "labels, longer" else 54_000
        assert config.data.train_num_samples * config.optim.epochs == seen
        corrupted = str(tmp_path / "out") in config.data.train_data
        assert corrupted == (label in ("CLIP, diverse", "labels, diverse"))
        assert config.checkpoint.save_all == (arm.judge is not None) == (label in robustness._LINE)


def test_the_kinds_of_captions(tmp_path: Path) -> None:
    arms = QUESTIONS["captions"].arms(Settings(tmp_path))
    assert len(arms) == 5
    for arm in arms.values():
        config = parse(arm.flags)
        assert bool(config.model.hard_negatives) == (arm.begins_with is not None)
        # all begin with one image tower, if not with another arm
        begins = str(tmp_path / "photographs")
        assert config.model.finetune == (None if arm.begins_with else begins)


def shifted(accuracy: float, beyond: float = 0.0) -> dict[str, float]:
    """Scores on a line where accuracy under shift has half the odds of that without."""
    odds = accuracy / (1 - accuracy) / 2
    value = odds / (1 + odds) + beyond
    return {"accuracy": accuracy, "shifted": value, **dict.fromkeys(robustness.SHIFTS, value)}


def test_rho_is_beyond_the_line_of_the_same_seed() -> None:
    rows = []
    for i, label in enumerate(robustness._LINE):
        by_seed = []
        for seed in (0, 1):
            points = {}
            for epoch in (1, 2):
                # the other seed's classifiers are all less robust: their line lies lower
                own = shifted(0.3 + 0.1 * i + 0.05 * epoch, -0.1 * seed)
                points |= own | {f"{epoch}/{name}": value for name, value in own.items()}
            by_seed.append(outcome(label, points))
        rows.append((label, by_seed))
    rows.append(("CLIP, diverse", [outcome("c", shifted(0.45, 0.125))] * 2))
    rows.append(("weak", [outcome("w", shifted(0.2))] * 2))
    found = dict(robustness.with_rho(rows))
    for name in ("rho", "rho_trained", "rho_others"):
        first, second = (o.scores[name] for o in found["CLIP, diverse"])
        assert first == pytest.approx(0.125)
        assert second == pytest.approx(0.225, abs=0.02)
        # the last point of a line that is straight
        assert found["labels, all"][0].scores[name] == pytest.approx(0, abs=1e-12)
    # no line reaches down to it
    assert "rho" not in found["weak"][0].scores


def test_composition_counts_ties_as_wrong_kind_by_kind() -> None:
    images = torch.eye(2)
    # captions of both images, then three false texts
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.0], [0.0, 0.5]])
    cases = [(0, 2, "order"), (0, 3, "order"), (1, 4, "place")]
    assert collages.composition(images, texts, cases) == {"order": 0.5, "place": 1.0}


@pytest.mark.parametrize("split", ["val", "compositional"])
def test_false_captions_differ_from_the_true_ones(split: str) -> None:
    texts, cases = collages.composition_cases(None, split)
    assert len(texts) == collages.COMPOSED + len(cases)
    assert {kind for _, _, kind in cases} == {"noun", "place", "order"}
    assert all(texts[image] != texts[false] for image, false, _ in cases)
    # both kinds that take composition: a standard error of about one point
    assert sum(kind != "noun" for _, _, kind in cases) > 1800
    # what the captions of one split say of the first class, those of the other never do
    spoken = {texts[image].split(",")[0].removeprefix("there is ") for image, _, _ in cases}
    other, others = collages.composition_cases(None, "val" if split != "val" else "compositional")
    assert spoken.isdisjoint(
        other[image].split(",")[0].removeprefix("there is ") for image, _, _ in others
    )


def test_the_texts_of_a_collage_are_those_that_are_asked(tmp_path: Path) -> None:
    # the images come from a source, the false captions from the same collages
    source = collages.open_collages(None, "compositional", 20)
    texts, _ = collages.composition_cases(None, "compositional")
    assert [source.read(0, i).texts[0] for i in range(20)] == texts[:20]


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


def test_a_run_that_waits_keeps_no_other_from_beginning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun = threading.Event()

    def run(name: str, *rest: object) -> Outcome:
        if name == "a":
            assert begun.wait(timeout=60)
        if name == "c":
            begun.set()
        return outcome(name, {})

    monkeypatch.setattr(runs, "run", run)
    plans = [Plan("a", ()), Plan("b", (), after=("a",)), Plan("c", ())]
    assert list(run_all(plans, tmp_path, jobs=2)) == ["a", "b", "c"]


def test_a_failure_ends_the_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(name: str, *rest: object) -> Outcome:
        raise RuntimeError(f"run {name} ended")

    monkeypatch.setattr(runs, "run", run)
    with pytest.raises(RuntimeError, match="run a ended"):
        run_all([Plan("a", ()), Plan("b", (), after=("a",))], tmp_path, jobs=2)


def test_no_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["recipe"], ["cifar10", "x"], ["global", "x"]):
        assert main(["study", *words, "--seeds", "0"]) == 1
        assert "--seeds is 0" in capsys.readouterr().err


def test_flags_of_the_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Several, in one word, as the help has them."""
    asked: list[Settings] = []

    def noted(question: object, settings: Settings) -> str:
        asked.append(settings)
        return ""

    monkeypatch.setattr(command, "answer", noted)
    flags = "--flags=--lr 1e-3 --name 'a b'"
    assert main(["study", "recipe", "--output", str(tmp_path), flags]) == 0
    assert [settings.flags for settings in asked] == [("--lr", "1e-3", "--name", "a b")]


def test_a_run_that_fails_is_said_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--output", str(tmp_path), "--only", "clip", "--flags=--model nonsense"]
    assert main(["study", "systems", *given]) == 1
    said = capsys.readouterr().err
    assert "ended with status 1" in said and "Traceback" not in said
