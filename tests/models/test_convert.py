"""Checkpoints to open_clip and back, tensor by tensor."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch

import fastclip
from fastclip.cli import main
from fastclip.models import checkpoint
from fastclip.models.clip import CONFIG_FILE, create, describe
from fastclip.models.convert import export_open_clip, import_open_clip
from fastclip.train.config import parse
from fastclip.train.loop import train
from tests.train.conftest import TINY_MODEL
from tests.train.test_loop import identical


@pytest.fixture
def model_config(tmp_path: Path) -> str:
    path = tmp_path / "tiny-convert.json"
    path.write_text(json.dumps(TINY_MODEL))
    return str(path)


@pytest.fixture
def run(model_config: str, tmp_path: Path) -> Path:
    flags = f"--model {model_config} --logs {tmp_path}/logs --name a --epochs 1 --workers 0 "
    flags += "--train-num-samples 32 --batch-size 16 --device cpu --report-to none"
    return train(parse(flags.split()))


def test_round_trip_is_tensor_equal(run: Path, model_config: str, tmp_path: Path) -> None:
    exported = tmp_path / "out" / "exported.pt"
    export_open_clip(run, exported)
    ours = dict(fastclip.load(run).model.state_dict())
    assert sorted(path.name for path in exported.parent.iterdir()) == [
        "exported.json",
        "exported.pt",
    ]
    # open_clip itself loads it by its own door
    open_clip.add_model_config(exported.with_suffix(".json"))
    theirs = open_clip.create_model("exported", pretrained=str(exported))
    assert identical(ours, dict(theirs.state_dict()))

    back = tmp_path / "back"
    import_open_clip(exported, model_config, back)
    model, _, tokenizer = fastclip.load(back)
    assert identical(dict(model.state_dict()), ours)
    assert tokenizer(["x"]).shape == (1, TINY_MODEL["text_cfg"]["context_length"])


def test_shipped_towers_are_loaded_by_open_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    weights = {}
    for name in ("RN10t-64", "TinyNet-E-align", "ViT-mini-16px"):
        built = create(name)
        run = tmp_path / name
        (run / "checkpoints").mkdir(parents=True)
        (run / CONFIG_FILE).write_text(json.dumps(describe(name, built)))
        weights[name] = built.model.state_dict()
        checkpoint.write(run / "checkpoints" / "a.pt", {"step": 1, "state_dict": weights[name]})
        export_open_clip(run, tmp_path / "out" / f"{name}-trained.pt")
    assert not list((tmp_path / "here").iterdir())
    # in a process that has never seen fastclip's names
    script = """
import sys, open_clip, torch
for name in sys.argv[2:]:
    stem = f"{sys.argv[1]}/{name}-trained"
    open_clip.add_model_config(f"{stem}.json")
    model = open_clip.create_model(f"{name}-trained", pretrained=f"{stem}.pt")
    torch.save(model.state_dict(), f"{name}.pt")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out"), *weights], check=True)
    for name, content in weights.items():
        assert identical(dict(content), torch.load(f"{name}.pt")), name


@pytest.mark.parametrize("form", ["trainer", "bare", "safetensors"])
def test_every_form_of_open_clip_weights(form: str, model_config: str, tmp_path: Path) -> None:
    open_clip.add_model_config(model_config)
    weights = dict(open_clip.create_model("tiny-convert").state_dict())
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "trainer":
        prefixed = {f"module.{name}": value for name, value in weights.items()}
        torch.save({"epoch": 3, "name": "x", "state_dict": prefixed, "optimizer": {}}, path)
    elif form == "bare":
        torch.save(weights, path)
    else:
        from safetensors.torch import save_file

        save_file(weights, path)
    import_open_clip(path, model_config, tmp_path / "run")
    assert identical(dict(fastclip.load(tmp_path / "run").model.state_dict()), weights)


def test_command_line(
    run: Path, model_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, back = str(tmp_path / "o.pt"), str(tmp_path / "back")
    assert main(["convert", "to-open-clip", str(run), out]) == 0
    assert main(["convert", "from-open-clip", out, back, "--model", model_config]) == 0
    assert main(["eval", "zeroshot", "--model", back, "--num-samples", "30"]) == 0
    assert main(["convert", "from-open-clip", out, back + "2"]) == 1
    assert "needs --model" in capsys.readouterr().err


def test_mistakes(run: Path, model_config: str, tmp_path: Path) -> None:
    exported = tmp_path / "o.pt"
    export_open_clip(run / "checkpoints" / "epoch_1.pt", exported)
    with pytest.raises(FileExistsError, match="choose another name"):
        export_open_clip(run, exported)
    with pytest.raises(ValueError, match="does not fit the model"):
        import_open_clip(exported, "RN10t-64", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(FileExistsError, match="choose another folder"):
        import_open_clip(exported, model_config, run)
    torch.save({"epoch": 1}, tmp_path / "no.pt")
    with pytest.raises(ValueError, match="holds no state dictionary"):
        checkpoint.read_weights(tmp_path / "no.pt")


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_what_open_clip_needs_is_printed(
    ending: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / f"printed-{ending}.{ending}"
    assert main(["convert", "to-open-clip", str(run), str(target)]) == 0
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("open_clip.")]
    scope = {"open_clip": open_clip}
    exec("\n".join([*lines[:-1], f"model = {lines[-1]}[0]"]), scope)
    model, preprocess, _ = fastclip.load(run)
    assert identical(dict(scope["model"].state_dict()), dict(model.state_dict()))
    if ending == "safetensors":
        # without the run
        alone, again, tokenizer = fastclip.load(target)
        assert identical(dict(alone.state_dict()), dict(model.state_dict()))
        assert repr(again.transforms) == repr(preprocess.transforms)
        assert tokenizer(["x"]).shape == (1, TINY_MODEL["text_cfg"]["context_length"])


def test_weights_that_do_not_describe_themselves(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "run" / "checkpoints" / "w.safetensors"
    path.parent.mkdir(parents=True)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(FileNotFoundError, match="is not a run directory"):
        fastclip.load(path)
    save_file({"a": torch.ones(1)}, path, {CONFIG_FILE: '{"model_cfg": {"embed_dim": 1}}'})
    with pytest.raises(ValueError, match="describes no model"):
        fastclip.load(path)
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        fastclip.load(path)
