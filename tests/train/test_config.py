"""Configuration: recipes, files, flags, and what is said of mistakes."""

import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from fastclip.cli import main
from fastclip.data.options import DataOptions
from fastclip.flags import GROUPS, help_texts, ordered
from fastclip.models.options import SystemOptions
from fastclip.train.config import RECIPES, TrainConfig, from_dict, parse, to_yaml


def test_flags_are_open_clips() -> None:
    flags = (
        "--train-data /d/{0..1}.tar --batch-size 64 --lr 1e-3 --wd 0.1 --epochs 3 --warmup 10 "
        "--precision amp_bf16 --workers 0 --beta2 0.95 --grad-clip-norm 1 --seed 5 "
        "--lr-scheduler const --save-frequency 2 --name x --logs l --resume latest"
    )
    config = parse(flags.split())
    assert (config.batch_size, config.lr, config.beta2, config.seed) == (64, 1e-3, 0.95, 5)
    assert (config.resume, config.grad_clip_norm, config.workers) == ("latest", 1.0, 0)


def test_a_file_and_flags_that_win(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    # 1e-3 without a dot is text to YAML 1.1, and still a number here; dashes are welcome
    path.write_text("lr: 1e-3\nbatch-size: 32\naug_scale: [0.5, 1]\ntorchcompile: true\n")
    config = parse(["--config", str(path), "--batch-size", "16"])
    assert (config.lr, config.batch_size, config.aug_scale) == (1e-3, 16, (0.5, 1.0))
    assert config.torchcompile
    assert not parse([f"--config={path}", "--no-torchcompile"]).torchcompile


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    flags = "--lr 3e-4 --train-num-samples 100 --aug-scale 0.3 0.9 --torchcompile"
    config = parse(flags.split())
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert parse(["--config", str(path)]) == config
    keys = [line.partition(":")[0] for line in to_yaml(config).splitlines() if line[0].isalpha()]
    assert keys[0] == "train_data" and keys == [field.name for field in ordered(TrainConfig)]


# what a recipe leaves to its user
GIVEN = {
    "classify_text": ["--classes", "names.txt"],
    "semantic_scenes": ["--text-lm", "folder"],
    "semantic_negatives_scenes": ["--text-lm", "folder"],
}


@pytest.mark.parametrize("recipe", [path.stem for path in RECIPES.glob("*.yaml")])
def test_recipes_are_valid(recipe: str) -> None:
    assert parse(["--config", recipe, *GIVEN.get(recipe, [])]) != TrainConfig()


def test_unknown_keys_are_reported_with_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("batchsize: 3\n")
    with pytest.raises(ValueError, match=r"unknown key 'batchsize'; did you mean 'batch_size'\?"):
        parse(["--config", str(path)])
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="key: value"):
        parse(["--config", str(path)])
    path.write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        parse(["--config", str(path)])
    with pytest.raises(FileNotFoundError, match=r"neither a file nor a recipe .*cifar10"):
        parse(["--config", "cifar11"])


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("train", "--data-backend torchvision", "--data-backend cpu"),
        ("train", "--data_backend=torchvision", "--data-backend cpu"),
        ("bench attention", "--lines 50", "--lengths"),
        ("bench attention", "--lines=50", "--lengths"),
    ],
)
def test_a_renamed_flag_is_refused_with_its_new_name(
    command: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), *old.split()]) == 1
    assert f"has been renamed; write {new}\n" in capsys.readouterr().err


def test_files_with_old_names_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data_backend: torchvision\n")
    assert parse(["--config", str(path)]).data_backend == "cpu"
    # as a checkpoint holds it
    assert from_dict(asdict(TrainConfig()) | {"data_backend": "torchvision"}).data_backend == "cpu"


def test_unknown_flags_and_wrong_types_end_in_usage_errors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for flags in (["--batchsize", "3"], ["--batch-size", "x"], ["--precision", "int4"]):
        with pytest.raises(SystemExit) as stop:
            parse(flags)
        assert stop.value.code == 2
    assert "--batch-size" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--batch-size", "--epochs", "--log-every-n-steps"])
def test_impossible_values(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", flag, "0"]) == 1
    error = f"fastclip train: error: {flag} is 0; give at least 1\n"
    assert capsys.readouterr().err == error
    with pytest.raises(ValueError, match="--save-every-steps is 0; give a positive"):
        TrainConfig(save_every_steps=0)


def test_what_is_said_of_data_is_checked_before_anything_is_built() -> None:
    with pytest.raises(ValueError, match="--csv-separator is 'ab'; give one character"):
        parse(["--csv-separator", "ab"])
    assert parse(["--csv-separator", "\\t"]).csv_separator == "\t"


def test_every_field_is_explained() -> None:
    """The string under a field is its help text; its metadata say the rest."""
    texts = help_texts(TrainConfig)
    for kind in (TrainConfig, DataOptions, SystemOptions):
        for field in fields(kind):
            assert texts[field.name].endswith((".", ".'")), field.name
            assert field.metadata["group"] in GROUPS, field.name
            assert field.metadata["defines_run"] in (True, False), field.name


def test_flags_need_no_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr("fastclip.flags.inspect.getsource", missing)
    assert parse(["--batch-size", "3"]).batch_size == 3


def shown(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """`train --help` on a terminal so wide; without one, boxes have no sides."""
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        parse(["--help"])
    return capsys.readouterr().out


def test_help_is_grouped_and_begins_with_data_and_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(100, monkeypatch, capsys)
    headings = re.findall(r"^ (\w+) options$", re.sub(r" +$", "", text, flags=re.M), flags=re.M)
    assert headings == list(GROUPS)
    for heading, first in (
        ("data", "--train-data"),
        ("model", "--model"),
        ("optim", "--batch-size"),
    ):
        after = text[text.index(f" {heading} options") :]
        assert re.search(r"^  (--[a-z]\S+)", after, flags=re.M)[1] == first
    for field in fields(TrainConfig):
        place = re.search(rf"^  --{field.name.replace('_', '-')}[ ,]", text, flags=re.M)
        heading = re.findall(r"^ (\w+) options", text[: place.start()], flags=re.M)[-1]
        assert heading == field.metadata["group"], field.name


@pytest.mark.parametrize("width", [50, 80, 100])
def test_help_is_wrapped_once(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line is broken only where the next word would not fit."""
    lines = shown(width, monkeypatch, capsys).splitlines()
    texts = [line.startswith("      ") and not line.isspace() for line in lines]
    for number in range(1, len(lines)):
        if texts[number - 1] and texts[number]:
            word = lines[number].split()[0]
            assert len(lines[number - 1].rstrip()) + 1 + len(word) > width - 2, lines[number - 1]
    assert max(map(len, lines[5:])) <= width
