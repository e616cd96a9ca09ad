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


@pytest.mark.parametrize("name", ["RN10t-64", "TinyNet-E-align", "ViT-mini-16px"])
def test_shipped_towers_are_loaded_by_open_clip(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = create(name)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / CONFIG_FILE).write_text(json.dumps(describe(name, built)))
    weights = built.model.state_dict()
    checkpoint.write(run / "checkpoints" / "a.pt", {"step": 1, "state_dict": weights})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_open_clip(run, tmp_path / "out" / f"{name}-trained.pt")
    assert not list((tmp_path / "here").iterdir())
    # in a process that has never seen fastclip's names
    script = "import sys, open_clip, torch; open_clip.add_model_config(sys.argv[1] + '.json'); "
    script += "model = open_clip.create_model(sys.argv[2], pretrained=sys.argv[1] + '.pt'); "
    script += "torch.save(model.state_dict(), 'found.pt')"
    stem = str(tmp_path / "out" / f"{name}-trained")
    subprocess.run([sys.executable, "-c", script, stem, f"{name}-trained"], check=True)
    assert identical(dict(weights), torch.load("found.pt"))


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
