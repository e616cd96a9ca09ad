"""Training end to end in this process."""

import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

import fastclip
from fastclip.cli import main
from fastclip.data.index import Fault
from fastclip.models import checkpoint
from fastclip.train import engine, meter, start, validate
from fastclip.train.config import parse
from fastclip.train.health import NonFiniteError
from fastclip.train.log import read_metrics
from fastclip.train.loop import train
from tests.conftest import jpeg


def state_of(run: Path, name: str) -> dict[str, Any]:
    return checkpoint.read(run / "checkpoints" / name)


def identical(a: Any, b: Any) -> bool:
    """Equality to the bit through nested containers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


def test_a_run_leaves_what_it_promises(train_flags: list[str]) -> None:
    flags = [*train_flags, "--name", "a", "--val-data", "scenes", "--log-sample-ids"]
    run = train(parse([*flags, "--report-to", "tensorboard"]))
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "open_clip_config.json", "metrics.jsonl", "loss.png"} <= names
    assert list((run / "tensorboard").iterdir())
    metrics = read_metrics(run)
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert len(losses) == 16 and all(map(math.isfinite, losses))
    validated = [line for line in metrics if "val/loss" in line]
    assert len(validated) == 2
    assert {"val/acc1", "val/text_retrieval_recall@1"} <= validated[0].keys()
    assert {"samples_per_second", "data_wait", "lr", "logit_scale"} <= metrics[0].keys()
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [len(line["keys"]) for line in samples] == [8] * 16
    # one epoch sees each of its samples once
    assert len({key for line in samples[:8] for key in line["keys"]}) == 64
    assert parse(["--config", str(run / "config.yaml")]).log.name == "a"


def test_a_run_loads_as_model_preprocess_tokenizer(train_flags: list[str]) -> None:
    run = train(parse([*train_flags, "--name", "a", "--save-all"]))
    model, preprocess, tokenizer = fastclip.load(run)
    assert not model.training
    saved = state_of(run, "epoch_2.pt")["state_dict"]
    assert identical(dict(model.state_dict()), dict(saved))
    from PIL import Image

    image = preprocess(Image.new("RGB", (40, 30)))
    features = model.encode_image(image[None], normalize=True)
    assert features.shape == (1, 16)
    assert tokenizer(["a red circle"]).shape == (1, 12)
    earlier = fastclip.load(run / "checkpoints" / "epoch_1.pt")
    assert not identical(dict(earlier.model.state_dict()), dict(saved))


@pytest.mark.parametrize(("precision", "schedule"), [("fp32", "cosine"), ("amp_bf16", "wsd")])
def test_resumed_equals_uninterrupted(
    train_flags: list[str], precision: str, schedule: str
) -> None:
    """From a step inside the first epoch and from an epoch's end, in one process."""
    flags = [*train_flags, "--precision", precision, "--save-every-steps", "6", "--save-all"]
    flags += ["--lr-scheduler", schedule]
    whole = train(parse([*flags, "--name", "whole", "--log-sample-ids"]))
    for cut in ("step_00000006.pt", "epoch_1.pt"):
        source = whole / "checkpoints" / cut
        name = f"from_{cut.split('.')[0]}"
        resumed = train(
            parse([*flags, "--name", name, "--resume", str(source), "--log-sample-ids"])
        )
        ours, theirs = state_of(resumed, "epoch_2.pt"), state_of(whole, "epoch_2.pt")
        for key in ("state_dict", "optimizer", "rng", "data", "step"):
            assert identical(ours[key], theirs[key]), key
        rates = [[line["lr"] for line in read_metrics(run)] for run in (whole, resumed)]
        assert rates[1] and rates[0][-len(rates[1]) :] == rates[1]
        tail = (resumed / "samples.jsonl").read_text()
        assert tail and (whole / "samples.jsonl").read_text().endswith(tail)


def test_workers_do_not_change_a_run(train_flags: list[str]) -> None:
    alone = train(parse([*train_flags, "--name", "alone"]))
    helped = train(parse([*train_flags, "--name", "helped", "--workers", "2"]))
    assert identical(
        state_of(alone, "epoch_2.pt")["state_dict"], state_of(helped, "epoch_2.pt")["state_dict"]
    )


def test_the_loss_falls(train_flags: list[str]) -> None:
    """Eight pairs seen again and again are learnt by heart."""
    flags = "--train-num-samples 8 --epochs 150 --lr 3e-3 --save-frequency 150".split()
    run = train(parse([*train_flags, *flags, "--name", "overfit"]))
    losses = [line["loss"] for line in read_metrics(run)]
    assert losses[0] > 1.5 and sum(losses[-10:]) / 10 < 0.5


@pytest.mark.slow
def test_torchcompile_gives_the_same_losses(train_flags: list[str], tmp_path: Path) -> None:
    # dropout draws its numbers in other places of a compiled graph
    model = tmp_path / "tiny.json"
    model.write_text(model.read_text().replace('"patch_dropout": 0.5', '"patch_dropout": 0.0'))
    flags = [*train_flags, "--epochs", "1"]
    plain = train(parse([*flags, "--name", "plain"]))
    compiled = train(parse([*flags, "--name", "compiled", "--torchcompile"]))
    first, second = ([line["loss"] for line in read_metrics(run)] for run in (plain, compiled))
    assert first == pytest.approx(second, rel=1e-5)
    # checkpoints of a compiled run load into a plain one
    names = [state_of(run, "epoch_1.pt")["state_dict"].keys() for run in (plain, compiled)]
    assert names[0] == names[1]


def test_checkpoints_are_kept_as_asked(train_flags: list[str]) -> None:
    flags = [*train_flags, "--name", "a", "--epochs", "3", "--save-every-steps", "3"]
    run = train(parse([*flags, "--delete-previous-checkpoint"]))
    kept = sorted(path.name for path in (run / "checkpoints").glob("*.pt"))
    assert kept == ["epoch_3.pt", "step_00000018.pt", "step_00000021.pt"]
    assert len(list((run / "checkpoints").iterdir())) == 6


def test_a_checkpoint_is_kept_between_saves(train_flags: list[str]) -> None:
    """An epoch that is not saved must not cost the one that was."""
    flags = [*train_flags, "--name", "a", "--epochs", "3", "--save-frequency", "2"]
    seen = []
    save = engine.checkpoint.write

    def watch(path: Path, content: dict[str, Any]) -> None:
        seen.append(sorted(p.name for p in path.parent.glob("*.pt")))
        save(path, content)

    engine.checkpoint.write = watch
    try:
        train(parse([*flags, "--delete-previous-checkpoint"]))
    finally:
        engine.checkpoint.write = save
    # when epoch 3, the last, is written, that of epoch 2 is still there
    assert seen == [[], ["epoch_2.pt"]]


def test_an_existing_run_is_not_overwritten(
    train_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*train_flags, "--name", "a", "--epochs", "1"]
    assert main(["train", *flags]) == 0
    assert main(["train", *flags]) == 1
    assert "choose another --name, or resume it: --resume latest" in capsys.readouterr().err
    assert main(["train", *flags, "--resume", "latest"]) == 0
    assert main(["train", *flags, "--resume", "latest", "--seed", "1"]) == 0
    assert "--seed 0 -> 1; the resumed run differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "before"),
    [
        ("--attention", "reference", "tower"),
        ("--layer-norm", "apex", "torch"),
        ("--grad-checkpointing", "True", "False"),
    ],
)
def test_a_resume_that_changes_the_run_is_noted(
    train_flags: list[str],
    capsys: pytest.CaptureFixture[str],
    flag: str,
    value: str,
    before: str,
) -> None:
    flags = [*train_flags, "--name", "a", "--epochs", "1"]
    assert main(["train", *flags]) == 0
    # where apex is not installed it goes no further
    main(["train", *flags, "--resume", "latest", flag, *([] if value == "True" else [value])])
    note = f"note: {flag} {before} -> {value}; the resumed run differs from the original"
    assert note in capsys.readouterr().err


def test_a_resume_without_the_runs_data_is_refused(
    train_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It would continue on the embedded data, which nobody asked for."""
    flags = [*train_flags, "--name", "a", "--epochs", "1"]
    assert main(["train", *flags, "--train-data", "synthetic"]) == 0
    # with it, what is not given is as it was
    (Path(parse(flags).log.logs) / "a" / "config.yaml").unlink()
    assert main(["train", *flags, "--resume", "latest"]) == 1
    says = capsys.readouterr().err
    assert "--train-data was synthetic and is now scenes, the default; give the run's" in says


def test_a_run_without_a_checkpoint_begins_anew(
    train_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job's first start and its restarts can have the same command line."""
    (tmp_path / "logs" / "a" / "checkpoints").mkdir(parents=True)
    flags = [*train_flags, "--name", "a", "--epochs", "1"]
    assert main(["train", *flags, "--resume", "latest"]) == 0
    assert "holds no checkpoint: this is a new run" in capsys.readouterr().err


def test_branching_off_an_earlier_checkpoint_needs_another_name(
    train_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(parse([*train_flags, "--name", "a", "--save-all"]))
    early = str(run / "checkpoints" / "epoch_1.pt")
    assert main(["train", *train_flags, "--name", "a", "--resume", early]) == 1
    assert "has continued to epoch_2.pt" in capsys.readouterr().err
    assert main(["train", *train_flags, "--name", "b", "--resume", early, "--wd", "0.5"]) == 0
    decay = state_of(run.parent / "b", "epoch_2.pt")["optimizer"]["param_groups"][0]
    assert decay["weight_decay"] == 0.5


def test_a_failing_evaluation_does_not_cost_the_epoch(
    train_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise ValueError("labels out of range")

    monkeypatch.setattr(validate.Validator, "__call__", fail)
    flags = [*train_flags, "--name", "a", "--val-data", "scenes"]
    with pytest.raises(ValueError, match="out of range"):
        train(parse(flags))
    assert state_of(Path(parse(flags).log.logs) / "a", "epoch_1.pt")["epoch"] == 1


def test_pretrained_weights_begin_a_run(
    train_flags: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = train(parse([*train_flags, "--name", "first"]))
    weights = str(first / "checkpoints" / "epoch_2.pt")
    flags = [*train_flags, "--epochs", "1", "--lr", "0", "--wd", "0", "--pretrained", weights]
    second = train(parse([*flags, "--name", "second"]))
    assert identical(
        state_of(first, "epoch_2.pt")["state_dict"], state_of(second, "epoch_1.pt")["state_dict"]
    )
    assert main(["train", *train_flags, "--name", "third", "--pretrained", "laion9b"]) == 1
    assert "neither a file nor weights of" in capsys.readouterr().err

    def unreachable(*arguments: object, **options: object) -> str:
        raise OSError("name or service not known")

    # as without a network, of which the tests make no use
    monkeypatch.setattr(open_clip.factory, "download_pretrained", unreachable)
    flags = [*train_flags, "--name", "fourth", "--model", "RN50", "--pretrained", "openai"]
    assert main(["train", *flags]) == 1
    assert "RN50 with the weights openai cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--grad-checkpointing", "--deterministic"])
def test_switches_that_leave_the_numbers_alone(train_flags: list[str], flag: str) -> None:
    flags = [*train_flags, "--epochs", "1", "--report-to", "none"]
    plain = train(parse([*flags, "--name", "plain"]))
    switched = train(parse([*flags, "--name", "switched", flag]))
    first, second = ([line["loss"] for line in read_metrics(run)] for run in (plain, switched))
    assert first == pytest.approx(second, rel=1e-5)


def test_float16_trains_with_a_loss_scale(train_flags: list[str]) -> None:
    run = train(parse([*train_flags, "--name", "a", "--precision", "amp"]))
    losses = [line["loss"] for line in read_metrics(run)]
    assert len(losses) == 16 and all(map(math.isfinite, losses))
    assert state_of(run, "epoch_2.pt")["scaler"]["scale"] > 0


def test_wandb_is_asked_for_by_name(
    train_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logged = []
    finished = []
    asked = {}

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values["loss"]))

        def finish(self) -> None:
            finished.append(True)

    # a stand-in: the package itself wants an account and a network
    standin = types.SimpleNamespace(init=lambda **options: asked.update(options) or Run())
    monkeypatch.setitem(sys.modules, "wandb", standin)
    flags = [*train_flags, "--epochs", "1", "--report-to", "tensorboard,wandb"]
    run = train(parse([*flags, "--name", "b", "--wandb-project-name", "p", "--wandb-notes", "n"]))
    assert (asked["project"], asked["notes"], asked["name"]) == ("p", "n", "b")
    assert logged == [(line["step"], line["loss"]) for line in read_metrics(run)]
    assert finished and list((run / "tensorboard").iterdir())

    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", *train_flags, "--name", "a", "--report-to", "wandb"]) == 1
    assert "pip install wandb" in capsys.readouterr().err
    # before anything was built
    assert not (tmp_path / "logs" / "a").exists()


def test_a_checkpoint_of_another_model_is_refused(
    train_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *train_flags, "--name", "a", "--epochs", "1"]) == 0
    model = json.loads((tmp_path / "tiny.json").read_text())
    model["embed_dim"] = 24
    (tmp_path / "other.json").write_text(json.dumps(model))
    flags = [*train_flags, "--name", "a", "--resume", "latest"]
    assert main(["train", *flags, "--model", str(tmp_path / "other.json")]) == 1
    assert "does not fit the model: 2 of another shape: text_projection" in capsys.readouterr().err
    # and the run's own description was left alone
    assert fastclip.load(tmp_path / "logs" / "a")


def test_unknown_models_and_folders_of_shards(
    train_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *train_flags, "--model", "ViT-B-33"]) == 1
    assert "near names: ViT-B-32" in capsys.readouterr().err
    assert main(["train", *train_flags, "--train-data", str(tmp_path)]) == 1
    assert "it holds shards, name them" in capsys.readouterr().err
    assert main(["train", *train_flags, "--train-data", f"{tmp_path}/x-{{0..2}}.tar"]) == 1
    assert "3 of 3 shards do not exist" in capsys.readouterr().err


def test_damaged_data_is_skipped_and_reported(
    train_flags: list[str],
    make_shard: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    members = []
    for i in range(30):
        members += [(f"{i:02d}.jpg", b"no image" if i == 7 else jpeg()), (f"{i:02d}.txt", b"text")]
    bad, cut = make_shard("0.tar", members=members), make_shard("1.tar", samples=20)
    cut.write_bytes(cut.read_bytes()[:40_000])
    flags = [*train_flags, "--name", "a", "--train-data", f"{bad}::{cut}"]
    assert main(["train", *flags]) == 0
    errors = capsys.readouterr().err
    assert "skipped corrupt image" in errors and ":07" in errors
    summary = errors.split("skipped samples and shards: ")[1]
    assert "1 corrupt image" in summary and "1 cut inside" in summary


def test_a_non_finite_loss_stops_before_the_update(
    train_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in one weight's path at the fifth step: the tensor is named, the weights are intact."""
    made: list[torch.nn.Module] = []
    build = start.build

    def spoiled(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        made.append(model.model)
        calls = [0]

        def hook(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            return output * torch.nan if calls[0] >= 5 else output

        model.model.transformer.resblocks[0].mlp.c_fc.register_forward_hook(hook)
        return model

    monkeypatch.setattr(start, "build", spoiled)
    flags = [*train_flags, "--name", "a", "--save-every-steps", "4"]
    with pytest.raises(NonFiniteError, match=r"step 5: .*'transformer.resblocks.0.mlp.c_fc'"):
        train(parse(flags))
    run = Path(parse(flags).log.logs) / "a"
    saved = state_of(run, "step_00000004.pt")["state_dict"]
    assert identical(dict(made[0].state_dict()), dict(saved))
    assert (run / "loss.png").exists()


def test_non_finite_gradients_are_named(
    train_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = start.build

    def spoiled(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        model.model.text_projection.register_hook(lambda gradient: gradient * torch.inf)
        return model

    monkeypatch.setattr(start, "build", spoiled)
    assert main(["train", *train_flags, "--name", "a"]) == 3
    assert "gradient of 'text_projection'" in capsys.readouterr().err


def test_texts_that_are_cut_are_reported_once(
    train_flags: list[str], logged: Callable[[], str]
) -> None:
    train(parse([*train_flags, "--name", "a", "--captions", "dense"]))
    message = logged()
    assert message.count("a text is longer than the context of 12 tokens, and is cut") == 1
    # every dense caption is longer: two epochs of 64
    assert "note: 128 of 128 texts were cut to the context, each counted as often" in message
    train(parse([*train_flags, "--name", "b", "--train-data", "synthetic"]))
    assert "were cut" not in logged()


def test_faults_are_values() -> None:
    assert str(Fault("corrupt image", "a.tar:1", "cut")) == "corrupt image: a.tar:1 (cut)"


def test_an_evaluation_is_no_part_of_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now)
    clock = meter.Meter(batch_size=8)
    clock.step()
    now = 2.0
    clock.pause()
    now = 100.0
    clock.resume()
    clock.step()
    now = 102.0
    assert clock.read(torch.device("cpu"))["samples_per_second"] == 4


def test_the_clock_is_paused_during_an_evaluation(
    train_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("pause", "resume"):
        original = getattr(meter.Meter, name)

        def noting(self: object, name: str = name, original: Any = original) -> None:
            calls.append(name)
            original(self)

        monkeypatch.setattr(meter.Meter, name, noting)

    def judge(_: object) -> dict[str, float]:
        calls.append("evaluation")
        return {"val/loss": 0.0}

    monkeypatch.setattr(validate.Validator, "__call__", judge)
    train(parse([*train_flags, "--name", "a", "--val-data", "scenes"]))
    assert calls == ["pause", "evaluation", "resume"] * 2


def test_more_samples_asked_for_than_there_are(
    train_flags: list[str], tmp_path: Path, logged: Callable[[], str]
) -> None:
    for key in range(16):
        (tmp_path / f"{key}.jpg").write_bytes(jpeg())
    rows = "".join(f"{key}.jpg\ta\n" for key in range(16))
    (tmp_path / "t.tsv").write_text("filepath\ttitle\n" + rows)
    data = ["--train-data", str(tmp_path / "t.tsv"), "--epochs", "1"]
    note = "note: --train-num-samples is 64 and the data have 16 samples: an epoch is these"
    train(parse([*train_flags, *data, "--name", "a"]))
    assert note in logged()
    train(parse([*train_flags, *data, "--name", "b", "--train-num-samples", "16"]))
    assert "note: --train-num-samples" not in logged()
