"""Every flag of the open_clip trainer is parsed: taken, renamed, without effect, or refused."""

import argparse
import importlib.util
import itertools
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastclip.cli import main
from fastclip.flags import flatten
from fastclip.train.config import TrainConfig, parse
from fastclip.train.open_clip_flags import FLAGS, Flag
from tests.test_repo_shape import ROOT

# values that are not any of their type
VALUES = {
    "device": "cpu",
    "opt": "adamw",
    "lr-scheduler": "const-cooldown",
    "lr-cooldown-end": "0.25",
    "report-to": "wandb",
    "loss-dist-impl": "ring",
    "csv-separator": ",",
    "dataset-type": "csv",
    "precision": "amp",
}


@cache
def theirs() -> dict[str, argparse.Action]:
    """The actions of the open_clip trainer's own parser, by flag."""
    from open_clip_train import params

    class Seen(Exception):
        pass

    parsers = []

    def stop(self: argparse.ArgumentParser, arguments: object) -> None:
        parsers.append(self)
        raise Seen

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Seen):
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        params.parse_args([])
    actions = {a.option_strings[0].removeprefix("--"): a for a in parsers[0]._actions}
    return {name: action for name, action in actions.items() if name != "-h"}


def given(flag: Flag, action: argparse.Action) -> list[str]:
    """The flag with a value as open_clip takes it."""
    if action.nargs == 0:
        return [f"--{flag.name}"]
    number = {int: "3", float: "0.5"}.get(action.type, "x")
    return [f"--{flag.name}", VALUES.get(flag.name, number)]


def of_status(status: str) -> list[Flag]:
    return [flag for flag in FLAGS if flag.status == status]


@cache
def with_all_of_the_same_name(joined: bool) -> dict[str, Any]:
    """The flags' values by name; reading a command line takes its time, so all at once."""
    words = [given(flag, theirs()[flag.name]) for flag in of_status("same")]
    # a teacher's softmax is no target of a sigmoid
    words.remove(["--siglip"])
    arguments = ["=".join(one) for one in words] if joined else list(itertools.chain(*words))
    siglip = parse(["--siglip"]).loss.siglip
    return flatten(parse([*arguments, "--optimizer", "timm/sgd"])) | {"siglip": siglip}


def test_the_table_has_every_flag_once() -> None:
    assert [flag.name for flag in FLAGS] == list(theirs())


def test_defaults_that_differ_are_said() -> None:
    # what None and the empty text stand for is the same in both
    alike = {"logs", "lr-cooldown-power", "wandb-notes"}
    ours = flatten(TrainConfig())
    differ = {
        flag.name
        for flag in of_status("same")
        if str(theirs()[flag.name].default) != str(ours[flag.name.replace("-", "_")])
    }
    silent = {flag.name for flag in FLAGS if not flag.text}
    assert "batch-size" in differ and differ & silent == alike


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("flag", of_status("same"), ids=lambda flag: flag.name)
def test_it_is_taken(flag: Flag, joined: bool) -> None:
    _, *value = given(flag, theirs()[flag.name])
    found = with_all_of_the_same_name(joined)[flag.name.replace("-", "_")]
    assert str(found) == value[0] if value else found is True


@pytest.mark.parametrize("flag", of_status("renamed"), ids=lambda flag: flag.name)
def test_it_is_renamed(flag: Flag) -> None:
    words = given(flag, theirs()[flag.name])
    assert parse(words) == parse([*flag.becomes, *words[1:]])


def test_they_have_no_effect(logged: Callable[[], str]) -> None:
    flags = of_status("no effect")
    assert parse([f"--{flag.name}" for flag in flags]) == TrainConfig()
    noted = logged()
    for flag in flags:
        assert f"note: --{flag.name} has no effect here: " in noted


@pytest.mark.parametrize("flag", of_status("refused"), ids=lambda flag: flag.name)
def test_it_is_refused(flag: Flag) -> None:
    with pytest.raises(ValueError, match=f"^--{flag.name} is open_clip's and not a flag"):
        parse(given(flag, theirs()[flag.name]))
    assert flag.text and flag.name.replace("-", "_") not in flatten(TrainConfig())


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--precision amp_bfloat16", {"precision": "amp_bf16"}),
        ("--precision=amp_bfloat16", {"precision": "amp_bf16"}),
        ("--report-to all", {"report_to": "tensorboard,wandb"}),
        # what it stands for wins, wherever it is
        ("--skip-scheduler --warmup 7", {"lr_scheduler": "const", "warmup": 0}),
    ],
)
def test_values_and_switches(words: str, wanted: dict[str, object]) -> None:
    found = flatten(parse(words.split()))
    assert {name: found[name] for name in wanted} == wanted


def test_empty_values() -> None:
    config = parse(["--pretrained", "", "--report-to="])
    assert config.model.pretrained is None and not config.log.reporters


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--precision pure_bf16", "--precision pure_bf16 is open_clip's: parameters stay float32"),
        ("--logs None", "--logs None is open_clip's: a run is always written"),
        ("--force_image_size 224", "--force-image-size is open_clip's"),
    ],
)
def test_refused_values(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words.split()]) == 1
    text = capsys.readouterr().err
    assert message in text and "`" not in text


def test_all_that_is_refused_is_said_at_once() -> None:
    words = "--horovod --lr 1e-3 --image-mean 0.5 0.5 0.5 --precision fp16 --horovod"
    with pytest.raises(ValueError) as error:
        parse(words.split())
    lines = str(error.value).splitlines()
    assert [line.split(" is ")[0] for line in lines] == [
        "--horovod",
        "--image-mean",
        "--precision fp16",
    ]


def test_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("opt: apex-lamb\nskip_scheduler: true\nhorovod: false\nlr: 1e-3\n")
    optim = parse(["--config", str(path), "--warmup", "9"]).optim
    assert (optim.optimizer, optim.lr_scheduler, optim.lr) == ("apex-lamb", "const", 1e-3)
    # by hand wins over the file
    assert optim.warmup == 9
    path.write_text("horovod: true\n")
    with pytest.raises(ValueError, match="--horovod is open_clip's"):
        parse(["--config", str(path)])


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_open_clip", ROOT / "docs/make_open_clip.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_open_clip"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table() -> None:
    made = _generator()
    assert made.PAGE.read_text() == made.page(), "run python docs/make_open_clip.py"
    named = re.findall(r"(?m)^\| `--([\w-]+)` ", made.PAGE.read_text())
    assert named == [flag.name for flag in FLAGS]
