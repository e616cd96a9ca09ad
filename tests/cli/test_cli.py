"""The command line as a user meets it."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import fastclip
from fastclip import native
from fastclip.cli import COMMANDS, main
from fastclip.flags import flatten
from fastclip.models import checkpoint
from fastclip.train.config import parse
from tests.train.conftest import TINY_MODEL


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """A trained tiny model's folder."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    flags = f"--model {tmp_path}/tiny.json --logs {tmp_path}/logs --name a --epochs 1 --workers 0 "
    flags += "--train-num-samples 64 --batch-size 16 --device cpu --report-to none"
    assert main(["train", *flags.split()]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/logs/a"
    return f"{tmp_path}/logs/a"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--version", "--help"):
        with pytest.raises(SystemExit) as stop:
            main([flag])
        assert stop.value.code == 0
    output = capsys.readouterr().out
    assert f"fastclip {fastclip.__version__}" in output
    assert all(command in output for command in COMMANDS)


def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["trian"], ["train", "--no-such-flag"], ["eval", "zeroshot"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "fastclip: error: command 'trian' is unknown; did you mean 'train'?"),
        ("xyzzy", "command 'xyzzy' is unknown; use one of train, eval, "),
        (
            "train --batchsize=3",
            "--batchsize is unknown; did you mean --batch-size? (fastclip train",
        ),
        ("train -lr -1", "-lr is unknown; did you mean --lr?"),
        ("train --lock-img --no-lock-txt", "--no-lock-txt is unknown; did you mean --no-lock-"),
        ("eval zeroshot --modle x", "--modle is unknown; did you mean --model?"),
        ("eval zeroshot --csv-imgkey x", "--csv-imgkey is unknown; did you mean --csv-img-key?"),
        ("bench losses --qqq 3", "fastclip bench: error: --qqq is unknown (fastclip bench"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_alone_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    text = capsys.readouterr().err
    assert "commands:" in text and all(f"\n  {command} " in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval zeroshot --model x --csv-separator ab", "--csv-separator is 'ab'"),
        ("embed images scenes --model x -o a.npy --cache-bytes 0", "--cache-bytes is 0"),
        ("data preview scenes --captions short=0", "--captions 'short=0'"),
        ("data preview scenes --count 0", "--count is 0"),
        ("convert recaption a b --model x --batch-size 0", "--batch-size is 0"),
    ],
)
def test_a_bad_value_of_a_known_flag_is_a_sentence(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_reader_that_leaves_is_no_error() -> None:
    """As in `fastclip info | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fastclip.cli", "info"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_broken_pipe_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: list[str]) -> int:
        raise BrokenPipeError("a worker has ended")

    monkeypatch.setattr("fastclip.cli.info.main", broken)
    assert main(["info"]) == 1
    assert "a worker has ended" in capsys.readouterr().err


def test_info_names_versions_devices_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert "open_clip_torch" in output and "cuda" in output
    used = "torch" if native.unavailable_reason() else "cpp"
    # where there is a GPU, its implementation comes first
    first, *lines = output.splitlines()
    assert first == f"losses on this machine use: {used}" or torch.cuda.is_available()
    assert "  similarity, symmetric, sigmoid\n    triton " in output
    assert f"    {used:19}used (" in output and "    sdpa               used (" in output
    assert [line for line in lines if len(line) > 80] == []
    output = " ".join(output.split())
    assert "native library" in output and "apex" in output
    assert f" cuda {native.cuda_unavailable_reason() or 'built'} " in output
    assert " cuda not available: it runs on CUDA devices" in output
    assert "reference on request" in output


def test_eval_on_shards(
    run: str,
    make_shard: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shard = make_shard(samples=9)
    # without class names there is an error that says where they go
    arguments = ["eval", "zeroshot", "--model", run, "--data", str(shard), "--workers", "0"]
    assert main(arguments) == 1
    assert "put classes.txt beside" in capsys.readouterr().err
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    result = json.loads((Path(run) / "eval" / "zeroshot_shard-00000.json").read_text())
    assert result["task"] == "zeroshot_classification"
    assert json.dumps(printed) == json.dumps(result["metrics"] | printed)
    chance = printed.pop("chance")
    assert chance == {"acc1": 0.3333, "acc5": 1.0, "mean_per_class_recall": 0.3333}
    assert set(printed) == set(chance)

    output = tmp_path / "r.json"
    arguments = ["eval", "retrieval", "--model", run, "--data", str(shard), "--workers", "0"]
    assert main([*arguments, "--output", str(output), "--recall-k", "1", "3"]) == 0
    metrics = json.loads(output.read_text())["metrics"]
    assert metrics["images"] == 9 and "image_retrieval_recall@3" in metrics


def test_a_run_directory_of_before_is_evaluated_and_resumed(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config.yaml is flat; the configuration in a checkpoint always is."""
    file = Path(run) / "config.yaml"
    config = parse(["--config", str(file)])
    state = checkpoint.read(Path(run) / "checkpoints" / "epoch_1.pt")
    assert state["config"] == flatten(config)
    file.write_text(yaml.safe_dump(flatten(config)))

    result = tmp_path / "r.json"
    flags = ["--num-samples", "40", "--workers", "0", "--output", str(result)]
    assert main(["eval", "zeroshot", "--model", run, *flags]) == 0
    assert json.loads(result.read_text())["model"] == config.model.model
    capsys.readouterr()
    flags = ["--config", str(file), "--resume", "latest", "--epochs", "2"]
    assert main(["train", *flags]) == 0
    noted = [line for line in capsys.readouterr().err.splitlines() if " -> " in line]
    assert len(noted) == 1 and "--epochs 1 -> 2" in noted[0]
    assert parse(["--config", str(file)]).optim.epochs == 2


def test_eval_on_scenes_and_what_it_says_of_mistakes(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "zeroshot", "--model", run, "--num-samples", "40", "--workers", "0"]) == 0
    assert main(["eval", "zeroshot", "--model", str(tmp_path)]) == 1
    assert "is not a run directory of fastclip train" in capsys.readouterr().err
    (tmp_path / "t.txt").write_text("no place for a name\n")
    arguments = ["eval", "zeroshot", "--model", run, "--num-samples", "40", "--workers", "0"]
    assert main([*arguments, "--templates", str(tmp_path / "t.txt")]) == 1
    assert "has no {} or {c}" in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tenth of the real one: every file is there, and the scores leave chance behind."""
    assert main(["quickstart", "--logs", str(tmp_path), "--samples", "2560"]) == 0
    output = capsys.readouterr().out
    assert "zero-shot top-1, 64 classes" in output and "chance" in output
    (folder,) = tmp_path.iterdir()
    assert (folder / "loss.png").stat().st_size > 5000
    assert (folder / "retrieval.png").stat().st_size > 20_000
    result = json.loads((folder / "eval" / "zeroshot_retrieval_scenes.json").read_text())
    assert result["metrics"]["image_retrieval_recall@5"] > 0.02
    monkeypatch.chdir(tmp_path)
    command = output.partition("search it")[2].splitlines()[0]
    assert main(shlex.split(command)[1:]) == 0 and Path("search.png").is_file()


def test_bench_prints_ratios_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "b.json"
    flags = f"losses --n 64 128 --width 16 --rounds 3 --device cpu --no-compiled --output {output}"
    assert main(["bench", *flags.split()]) == 0
    content = json.loads(output.read_text())
    rows = {(r["operator"], r["n"], r["baseline"]): r for r in content["results"]}
    measured = [row for row in rows.values() if row["status"] == "ok"]
    assert all(0 < row["p20"] <= row["p50"] <= row["p80"] for row in measured)
    for loss in ("clip", "info_nce", "siglip", "nt_xent", "mp_nce", "sup_con"):
        for n in (64, 128):
            ours, bare = rows[loss, n, "fastclip"], rows[loss, n, "bare products"]
            assert ours["ratio"] == 1 and ours["repeatable"] and ours["error"] < 1e-5
            assert bare["matmul_share"] == 1
    # every baseline agrees with the truth, those that normalize inside along the sphere
    baselines = {row["baseline"] for row in measured} - {"fastclip", "bare products"}
    assert {"open_clip", "lightly", "pytorch_metric_learning", "dense"} <= baselines
    assert all(row["error"] < 1e-5 for row in measured if row["baseline"] in baselines)
    assert rows["siglip", 64, "siglip_kernel"]["status"].startswith("missing")
    assert rows["clip", 64, "open_clip compiled"]["status"] == "left out"
    assert content["environment"]["torch"] and content["settings"]["rounds"] == 3
    assert "not tried" not in capsys.readouterr().out


def test_bench_times_nothing_that_fails_its_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    import fastclip.bench.losses as losses

    flags = "losses --loss clip siglip --n 64 --width 16 --rounds 1 --device cpu --no-compiled"
    honest = losses.OPERATORS["clip"]

    def wrong(*inputs, **options):
        # a loss whose gradient is a tenth too large; the oracle stays
        loss = honest.ours(*inputs, **options)
        return loss if options.get("backend") == "reference" else 1.1 * loss

    for precision in ([], ["--autocast"], ["--dtype", "bfloat16"]):
        assert main(["bench", *flags.split(), *precision]) == 0
        monkeypatch.setitem(losses.OPERATORS, "clip", replace(honest, ours=wrong))
        capsys.readouterr()
        assert main(["bench", *flags.split(), *precision]) == 1
        captured = capsys.readouterr()
        assert "clip fails its quick check" in captured.err
        assert "\nsiglip " in captured.out and "\nclip " not in captured.out
        monkeypatch.setitem(losses.OPERATORS, "clip", honest)


def test_a_baseline_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastclip.bench.losses as losses
    from fastclip.bench import screen
    from fastclip.bench.runner import Baseline, Operator, Settings, measure

    def no_memory(inputs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried too much")

    def broken(inputs):
        return lambda *leaves: 1 / 0

    baselines = (
        Baseline("hungry", no_memory),
        Baseline("broken", broken),
        Baseline("small", broken, 8),
    )
    clip = losses.OPERATORS["clip"]
    operator = Operator("clip", clip.make, clip.ours, baselines, clip.products)
    rows = measure(operator, 16, 4, Settings(rounds=1))
    status = {row.baseline: row.status for row in rows}
    assert status["fastclip"] == status["bare products"] == "ok"
    assert status["hungry"] == "out of memory"
    assert status["broken"].startswith("failed: ZeroDivisionError")
    assert status["small"] == "not tried beyond 8"
    assert screen.lines(*screen.grouped("losses", Settings(), rows))


def test_a_baseline_that_fails_later_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastclip.bench.losses as losses
    from fastclip.bench.runner import Baseline, Operator, Settings, measure

    clip = losses.OPERATORS["clip"]

    def tiring(inputs):
        calls = iter(range(4))

        def loss(*leaves):
            if next(calls, None) is None:
                raise torch.OutOfMemoryError("enough")
            return clip.ours(*leaves)

        return loss

    operator = Operator("clip", clip.make, clip.ours, (Baseline("tiring", tiring),), clip.products)
    rows = measure(operator, 16, 4, Settings(rounds=3))
    assert [row.status for row in rows] == ["ok", "out of memory", "ok"]
    assert rows[0].p50 is not None and rows[1].p50 is None


def test_a_wrong_gradient_at_a_measured_size_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    import fastclip.bench.losses as losses

    honest = losses.OPERATORS["clip"]

    def wrong_when_large(*inputs, **options):
        # right at the size of the quick check
        exact = "backend" in options or len(inputs[0]) <= 512
        return honest.ours(*inputs, **options) * (1.0 if exact else 1.1)

    monkeypatch.setitem(losses.OPERATORS, "clip", replace(honest, ours=wrong_when_large))
    flags = "losses --loss clip --n 516 --width 8 --rounds 1 --device cpu --no-compiled"
    assert main(["bench", *flags.split()]) == 1
    assert "clip at n = 516 is wrong" in capsys.readouterr().err


def test_bench_refuses_sizes_that_make_no_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "losses", "--n", "64", "66"]) == 1
    assert "--n is 64 66; give multiples of 4" in capsys.readouterr().err
    assert main(["bench", "losses", "--keep-bytes", "-1"]) == 1
    assert "keep_bytes is -1; give a whole number of bytes" in capsys.readouterr().err


def test_a_mistyped_flag_is_answered_before_torchs_compiler_is_loaded() -> None:
    """Which takes longer to import than everything else together."""
    code = """
import sys
from fastclip.cli import main
try:
    main(["train", "--batchsize", "4"])
except SystemExit:
    print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "did you mean --batch-size?" in done.stderr
    assert done.stdout.strip() == "False"
