"""Result files read back, and the table that compares them."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastclip.cli import main
from fastclip.evaluate.results import read_result, write_result


def result(folder: Path, name: str, dataset: str, metrics: dict[str, Any], **model: str) -> str:
    path = folder / f"{name}.json"
    message = {"model": "ViT-B-32", "pretrained": "openai", **model}
    write_result(path, dataset=dataset, task="t", metrics=metrics, **message)
    return str(path)


def test_rows_are_models_and_columns_data_sets_with_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        result(
            tmp_path, "a", "scenes", {"acc1": 0.63254, "images": 1000.0, "chance": {"acc1": 0.1}}
        ),
        result(tmp_path, "b", "crepe", {"swap": {"att": 1.0}, "average": 0.5}),
        result(tmp_path, "c", "scenes", {"acc1": 0.0, "note": "of|two"}, model="RN|50"),
    ]
    assert main(["eval", "table", *files]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| model | scenes acc1 | scenes images | crepe swap att | crepe average |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| ViT-B-32 openai | 0.6325 | 1000 | 1.0000 | 0.5000 |",
        "| RN&#124;50 openai | 0.0000 |  |  |  |",
    ]


def test_only_the_metrics_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shifts = {"acc1": 0.5, "count": 9, "v2": {"acc1": 0.25, "rho": -0.1}}
    file = result(tmp_path, "a", "d", shifts)
    assert main(["eval", "table", file, "--metrics", "acc1"]) == 0
    assert capsys.readouterr().out.startswith("| model | d acc1 | d v2 acc1 |\n")
    assert main(["eval", "table", file, "--metrics", "v2 rho", "count"]) == 0
    assert capsys.readouterr().out.endswith("| ViT-B-32 openai | 9 | -0.1000 |\n")
    assert main(["eval", "table", file, "--metrics", "acc5"]) == 1
    assert "has --metrics acc5; they have acc1, count, v2 acc1, v2 rho" in capsys.readouterr().err


def test_two_values_of_the_same_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = result(tmp_path, "a", "scenes", {"acc1": 0.5})
    other = result(tmp_path, "b", "scenes", {"acc1": 0.25})
    assert main(["eval", "table", one, one]) == 0
    assert main(["eval", "table", one, other]) == 1
    message = capsys.readouterr().err
    assert "ViT-B-32 openai differ in scenes acc1: 0.5 and 0.25; leave one out" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not an evaluation result"),
        ("\x80", "is not an evaluation result"),
        ("[1]", "lacks dataset, model, pretrained, task, metrics"),
        (json.dumps({"dataset": "d", "model": "m", "task": "t", "metrics": {}}), "pretrained"),
        (
            json.dumps(dict.fromkeys(("dataset", "model", "pretrained", "task", "metrics"), "x")),
            "lacks metrics",
        ),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match=message) as error:
        read_result(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "table", f"{tmp_path}/no.json"]) == 1
    assert f"{tmp_path}/no.json" in capsys.readouterr().err


def test_a_score_that_was_not_computed_is_equal_to_itself(tmp_path: Path) -> None:
    file = result(tmp_path, "a", "scenes", {"acc1": 0.5, "validation": float("nan")})
    assert main(["eval", "table", file, file]) == 0


def test_results_from_elsewhere_cannot_write_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = result(tmp_path, "a", "two\nlines", {"acc\x1b[2J": 0.5}, model="m\x1b]0;t\x07")
    assert main(["eval", "table", file]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown
    assert shown.splitlines()[0] == r"| model | two lines acc\x1b[2J |"
