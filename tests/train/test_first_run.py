"""What a run says of itself: at its beginning, at its end, and when it is asked to stop."""

import json
import math
import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot

from fastclip import device
from fastclip.cli import main
from fastclip.messages import WIDTH
from fastclip.models import export_onnx
from fastclip.train import log
from fastclip.train.config import parse
from fastclip.train.describe import warn_of_batch, warn_of_precision
from fastclip.train.log import plot_loss, read_metrics
from fastclip.train.next_commands import next_commands
from fastclip.train.options import OptimOptions
from fastclip.train.stop import StopSignals
from tests.conftest import jpeg


def said(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["train", *flags]) == 0
    return capsys.readouterr().err


def test_a_run_says_what_it_is_and_how_it_went(
    train_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*train_flags, "--train-num-samples", "70", "--warmup", "200", "--name", "a"]
    text = said(capsys, *flags, "--val-data", "scenes", "--log-every-n-steps", "4")
    lines = text.splitlines()
    run = tmp_path / "logs" / "a"
    labels = [line.split()[0] for line in lines[:16] if not line.startswith(" ")]
    expected = [
        "run",
        "data",
        "model",
        "loss",
        "step",
        "length",
        "rate",
        "saves",
        "caption",
        "caption",
    ]
    assert labels[: len(expected)] == expected
    for part in (
        "scenes, 70 samples an epoch, loaded in this process",
        "M parameters, fp32 on cpu",
        "2 epochs of 8 steps (6 samples an epoch fill no step), 16 steps in all",
        "0.0005 after 1 step of warm-up (a tenth of the run, which --warmup",
    ):
        assert part in text
    # the configuration is in the file alone
    assert "aug_flip" not in text and "aug_flip" in (run / "config.yaml").read_text()
    assert [line.split()[1] for line in lines if line.startswith("step ")][1:] == [
        f"{step}/16" for step in (4, 8, 12, 16)
    ]
    assert "  lr 5.5e-06  " in text and " samples/s  0:00 left" in text
    assert "  scale 14." in text or "  data wait " in text

    metrics = read_metrics(run)
    last = [line for line in metrics if "loss" in line][-1]["loss"]
    scores = [line["val/loss"] for line in metrics if "val/loss" in line]
    assert "16 of 16 steps in 0:" in text and f"{last:.3f} (chance {math.log(8):.3f})" in text
    best = "" if scores[1] <= scores[0] else f" (best {scores[0]:.4f}, at step 8)"
    assert f"scores    loss {scores[1]:.4f}{best}\n" in text
    assert f"{run}: loss.png, metrics.jsonl" in text.replace("\n          ", " ")
    # paths are not broken, and notes are sentences
    wide = [line for line in lines if len(line) > WIDTH and str(tmp_path) not in line]
    assert not [line for line in wide if not line.startswith("note: ")]

    commands = text.partition("\nnext\n")[2].splitlines()[:3]
    assert [shlex.split(line)[:2] for line in commands] == [
        ["fastclip", "search"],
        ["fastclip", "eval"],
        ["fastclip", "convert"],
    ]
    # what is as by default is not printed
    assert "--csv" not in commands[0]
    arguments = [
        str(tmp_path / word) if word == "a-exported" else word
        for word in shlex.split(commands[2])[1:]
    ]
    assert main(arguments) == 0 and (tmp_path / "a-exported").is_dir()


@pytest.mark.parametrize("with_val", [False, True])
def test_the_search_that_is_printed_runs(
    with_val: bool,
    train_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a table with names, columns and folders that have to be quoted or said."""
    monkeypatch.chdir(tmp_path)
    folder = Path("my photos")
    for name in ("train", "val"):
        (folder / name).mkdir(parents=True)
        lines = ["where;what"]
        for number in range(9):
            (folder / name / f"{number}.jpg").write_bytes(jpeg((number * 20, 9, 9)))
            lines.append(f'{number}.jpg;- it\'s "{name}" number {number}, in many more words')
        Path(f"my {name}.csv").write_text("\n".join(lines))
    flags = ["--train-data", "my train.csv", "--image-root", str(folder / "train")]
    flags += "--csv-img-key where --csv-caption-key what --csv-separator ;".split()
    if with_val:
        flags += ["--val-data", "my val.csv", "--val-image-root", str(folder / "val")]
    flags += ["--train-num-samples", "9", "--epochs", "1", "--name", "a b"]
    text = said(capsys, *train_flags, *flags)
    command = shlex.split(text.partition("\nnext\n")[2].splitlines()[0])
    assert command[:2] == ["fastclip", "search"] and command[2].startswith(
        'it\'s "val" num' if with_val else 'it\'s "train" num'
    )
    # the score of the training's own images is not one of new images
    note = (
        "# of the images that were trained on; for a fair score give --data others\n  fastclip eval"
    )
    assert (note in text) != with_val
    assert main(command[1:]) == 0
    found = capsys.readouterr().out
    assert ('"val"' if with_val else '"train"') in found.partition("caption\n")[2]
    assert Path("search.png").is_file()


@pytest.mark.parametrize(
    ("objective", "commands"),
    [
        ("clip", ["search", "eval retrieval", "convert to-hub"]),
        ("uniclip", ["search", "eval retrieval", "convert to-onnx"]),
        ("classify", ["eval zeroshot", "convert to-onnx"]),
        # nothing was learned of texts
        ("simclr", ["embed images", "convert to-onnx"]),
    ],
)
def test_every_command_that_is_printed_runs(
    objective: str,
    commands: list[str],
    train_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the run's own data, in a directory whose name has to be quoted."""
    monkeypatch.chdir(tmp_path)
    flags = [*train_flags, "--objective", objective, "--epochs", "1", "--train-num-samples", "16"]
    text = said(capsys, *flags, "--logs", "my runs", "--name", "a b")
    lines = text.partition("\nnext\n")[2].splitlines()
    printed = [shlex.split(line) for line in lines if line.startswith("  fastclip ")]
    assert [" ".join(words[1:])[: len(c)] for words, c in zip(printed, commands, strict=True)] == (
        commands
    )
    assert all("scenes" in words for words in printed[:-1])
    exported: list[Path] = []
    # takes long, and tests of its own export every kind of model
    monkeypatch.setattr(
        export_onnx, "export_onnx", lambda run, target, **_: exported.append(run) or ["image"]
    )
    for words in printed:
        few = ["--num-samples", "20", "--workers", "0"] if "scenes" in words else []
        assert main([*words[1:], *few]) == 0, capsys.readouterr().err
    assert exported == ([Path("my runs/a b")] if "to-onnx" in commands[-1] else [])


@pytest.mark.parametrize(
    ("captions", "query"),
    [
        ([], "a photo"),
        (["- a dog\n on a sofa"], "a dog on a sofa"),
        (["many words " * 9, "a cat"], "a cat"),
        (
            ["a small red star, then " * 4],
            "a small red star, then a small red star, then a small red…",
        ),
        (["\u72ac" * 70], "\u72ac" * 59 + "…"),
        (["--", " "], "a photo"),
    ],
)
def test_what_is_searched_for_is_a_whole_caption_or_ends_at_a_word(
    captions: list[str], query: str
) -> None:
    command = shlex.split(next_commands(parse([]), Path("logs/a"), captions)[0])
    assert command[2] == query and len(query) <= 60


def test_a_name_that_has_nothing_to_resume_is_said_below_the_rest(
    train_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*train_flags, "--epochs", "1", "--name", "typo", "--resume", "latest"]
    text = said(capsys, *flags)
    note = text.index("holds no checkpoint: this is a new run; check --name")
    assert text.index("\nrate ") < note < text.index("\ncaption ")


@pytest.mark.parametrize(
    ("meant", "processes", "says"),
    [
        (None, 1, ""),
        (64, 4, ""),
        (64, 1, "note: the settings are meant for 64 samples a step, this run has 16; start 4 pro"),
        (16, 2, "for 16 samples a step, this run has 32; start 1 process, change --batch-size"),
        (
            65,
            1,
            "this run has 16; change --batch-size or --accum-freq, or choose --lr and --warmup",
        ),
    ],
)
def test_another_global_batch_than_the_recipes_is_said(
    meant: int | None, processes: int, says: str, logged: Callable[[], str]
) -> None:
    warn_of_batch(OptimOptions(batch_size=8, accum_freq=2, global_batch=meant), processes)
    text = logged()
    assert says in text and bool(text) == bool(says)


@pytest.mark.parametrize(
    ("precision", "device", "capabilities", "says"),
    [
        ("fp32", "cpu", {}, ""),
        ("amp_bf16", "cpu", {"avx512_bf16": True}, ""),
        ("amp_bf16", "cpu", {"avx512_f": True, "avx512_bf16": False}, "this processor emulates"),
        ("amp_bf16", "cpu", {}, "--precision fp32 is faster"),
        ("amp_bf16", "cuda", {"avx512_bf16": True}, "this GPU emulates bf16"),
        ("amp_bf16", "cuda", {}, "--precision amp is faster"),
        ("amp", "cuda", {}, ""),
    ],
)
def test_bf16_of_a_device_without_it_is_said(
    precision: str,
    device: str,
    capabilities: dict[str, bool],
    says: str,
    logged: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    # as of a GPU before the ones with bf16: torch emulates it there
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    warn_of_precision(precision, torch.device(device))
    text = logged()
    assert says in text and bool(text) == bool(says)


def test_a_run_that_is_complete_says_so_when_it_is_resumed(
    train_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*train_flags, "--name", "a", "--epochs", "1"]
    complete = "note: this run is complete, there is nothing left to train; more --epochs continue"
    assert complete not in said(capsys, *flags)
    assert complete in said(capsys, *flags, "--resume", "latest")
    assert complete not in said(capsys, *flags, "--resume", "latest", "--epochs", "2")


def test_steps_that_were_made_are_said(
    train_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, *train_flags, "--name", "a", "--epochs", "1")
    text = said(capsys, *train_flags, "--name", "a", "--resume", "latest")
    assert "16 steps in all, 8 of them made\n" in text and "16 of 16 steps, 8 of them in " in text


def test_steps_are_counted_whatever_an_epoch_was(
    train_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second epoch has half of the samples: 4 steps after 8."""
    said(capsys, *train_flags, "--name", "a", "--epochs", "1")
    resume = [*train_flags, "--name", "a", "--resume", "latest", "--train-num-samples", "32"]
    text = " ".join(said(capsys, *resume).split())
    assert "2 epochs of 4 steps, 12 steps in all, 8 of them made with other settings" in text
    assert re.findall(r" step (\d+/\d+) loss", text) == ["9/12", "10/12", "11/12", "12/12"]
    assert "12 of 12 steps, 4 of them in " in text
    # nothing is left of one that is made shorter than it is
    text = " ".join(said(capsys, *resume, "--epochs", "1").split())
    assert "12 steps in all, 12 of them made with other settings" in text
    assert "12 of 12 steps, 0 of them in " in text


@pytest.mark.parametrize("cores, share, expected", [(2, 1, 2), (64, 8, 4), (2, 8, 1), (8, 4, 2)])
def test_loader_processes_are_as_many_as_the_cores(
    cores: int, share: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(share))
    assert parse([]).data.loader_processes == expected
    assert parse(["--workers", "0"]).data.loader_processes == 0


def test_curves_are_labeled_with_the_batch_they_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 4.85, "chance_loss": math.log(128)} for step in (1, 2)
    ]
    lines.append({"step": 2, "val/loss": 3.4, "val/chance_loss": math.log(32)})
    (tmp_path / log.METRICS_FILE).write_text("\n".join(map(json.dumps, lines)) + "\n")
    drawn = []
    monkeypatch.setattr(pyplot, "close", lambda figure: drawn.append(figure.axes[0]))
    assert plot_loss(tmp_path) == tmp_path / "loss.png"
    (axes,) = drawn
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "training (batches of 128)",
        "validation (batches of 32)",
        "chance in batches of 128: 4.85",
        "chance in batches of 32: 3.47",
    ]
    *curves, first, second = axes.lines
    assert [line.get_ydata()[0] for line in (first, second)] == [math.log(128), math.log(32)]
    # of no curve's color or style
    looks = {(line.get_color(), line.get_linestyle()) for line in (first, second)}
    assert looks == {("gray", "--")}
    assert {line.get_linestyle() for line in curves} == {"-"}
    assert len({line.get_color() for line in curves} | {"gray"}) == 3


def test_ctrl_c_interrupts_until_there_is_something_to_save(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with StopSignals() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        stop.training = True
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
    assert "the run saves after this step; Ctrl-C again ends it now" in capfd.readouterr().err
