"""The registry's entries are whole, and what is missing of a benchmark is reported."""

from pathlib import Path

import pytest

from fastclip.cli import main
from fastclip.evaluate.registry import BENCHMARKS, describe, require


def lay_out(name: str, root: Path) -> None:
    """An empty file for everything that the benchmark needs."""
    for file in BENCHMARKS[name].files:
        path = root / file.replace("*", "1")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_is_missing_is_reported_with_where_to_get_it(name: str, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[name]
    with pytest.raises(FileNotFoundError) as message:
        require(name, tmp_path)
    assert all(file in str(message.value) for file in benchmark.files)
    assert benchmark.source in str(message.value)
    lay_out(name, tmp_path)
    assert require(name, tmp_path) == tmp_path
    first, *others = benchmark.files
    (tmp_path / first.replace("*", "1")).unlink()
    with pytest.raises(FileNotFoundError, match="lacks") as message:
        require(name, tmp_path)
    before_source = str(message.value).split("; get")[0]
    assert first in before_source and not any(other in before_source for other in others)


def test_the_home_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lay_out("docci", tmp_path / "docci")
    assert require("docci", Path("~/docci")) == tmp_path / "docci"


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "list"]) == 0
    # lines are broken between words
    printed = " ".join(capsys.readouterr().out.split())
    for name, benchmark in BENCHMARKS.items():
        assert f"{name}: {benchmark.title} files:" in printed
        assert all(file in printed for file in benchmark.files) and benchmark.source in printed
    # 1 of 4 images or captions is right by chance, and both pairs in 1 of 6 orders
    assert "text_score 0.25, image_score 0.25, group_score 0.1667" in " ".join(
        describe(BENCHMARKS["winoground"]).split()
    )


def test_what_guessing_scores() -> None:
    """By the definitions: of so many answers one is right."""
    assert {name: benchmark.chance for name, benchmark in BENCHMARKS.items()} == {
        # one of two captions; the true one beside four perturbations
        "aro": {"relation": 0.5, "attribution": 0.5, "coco_order": 0.2, "flickr30k_order": 0.2},
        "sugarcrepe": 0.5,
        # two images with one of two captions each; both, with a caption for each
        "winoground": {"text_score": 0.25, "image_score": 0.25, "group_score": 1 / 6},
        # 5,000 images and descriptions
        "docci": {"recall@1": 0.0002, "recall@5": 0.001, "recall@10": 0.002},
        # 1,000 classes; 200 in ImageNet-R and ImageNet-A, 113 in ObjectNet
        "robustness": {
            "imagenet": 0.001,
            "imagenetv2": 0.001,
            "imagenet-sketch": 0.001,
            "imagenet-r": 0.005,
            "imagenet-a": 0.005,
            "objectnet": 1 / 113,
        },
    }
