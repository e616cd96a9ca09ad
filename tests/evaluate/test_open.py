"""Opening runs, open_clip's models with weights, and folders like repositories of the hub."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastclip.cli import main
from fastclip.models.clip import Model, create, describe
from fastclip.models.open import open_model
from fastclip.train.config import parse
from fastclip.train.loop import train
from tests.evaluate.test_evaluations import rounded
from tests.train.conftest import tiny_model, train_flags

__all__ = ["tiny_model", "train_flags"]  # fixtures


@pytest.fixture
def made(tiny_model: str) -> Model:
    """A tiny model as open_clip makes it, with weights of this seed."""
    torch.manual_seed(5)
    return create(tiny_model)


def same_features(one: Model, other: Model) -> bool:
    """Whether two models in evaluation mode encode alike, to the bit."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def encoded(model: Model) -> list[Tensor]:
        tokens = model.tokenizer(["red", "a blue circle"])
        return [model.model.encode_image(images), model.model.encode_text(tokens)]

    one.model.eval()
    return all(map(torch.equal, encoded(one), encoded(other)))


@pytest.mark.parametrize("ending", ["open_clip.pt", "bare.pt", "weights.safetensors"])
def test_a_checkpoint_of_open_clips(
    made: Model, tiny_model: str, tmp_path: Path, ending: str
) -> None:
    path, weights = tmp_path / ending, made.model.state_dict()
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(weights, path)
    else:
        torch.save({"state_dict": weights} if ending == "open_clip.pt" else weights, path)
    opened = open_model(tiny_model, "cpu", str(path))
    assert not opened.model.training
    assert same_features(made, opened)


@pytest.fixture
def folder(made: Model, tiny_model: str, tmp_path: Path) -> Path:
    """What a repository of the hub holds."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(describe(tiny_model, made)))
    torch.save(made.model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def test_a_folder_like_a_repository_of_the_hub(made: Model, folder: Path) -> None:
    opened = open_model(f"local-dir:{folder}")
    assert same_features(made, opened)
    image = Image.linear_gradient("L").resize((30, 20)).convert("RGB")
    assert torch.equal(opened.preprocess(image), made.preprocess(image))


def test_a_result_names_its_model(
    folder: Path,
    tiny_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--num-samples", "20", "--workers", "0"]
    assert main(["eval", "zeroshot", "--model", "local-dir:repository", *few]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "eval/local-dir_repository/zeroshot_scenes.json").read_text())
    assert written["model"] == "local-dir:repository" and written["pretrained"] == ""

    file = "repository/open_clip_pytorch_model.bin"
    flags = ["--model", "tiny.json", "--pretrained", file, "--output", "r.json"]
    assert main(["eval", "zeroshot", *flags, *few]) == 0
    again = json.loads((tmp_path / "r.json").read_text())
    assert again["model"] == "tiny.json" and again["pretrained"] == file
    # the same weights, found in two ways
    assert written["metrics"] == again["metrics"]
    assert rounded(written["metrics"]) == printed


def test_a_run_and_its_checkpoint(train_flags: list[str]) -> None:
    run = train(parse([*train_flags, "--epochs", "1", "--name", "r"]))
    assert same_features(open_model(str(run)), open_model(str(run / "checkpoints" / "epoch_1.pt")))


@pytest.mark.parametrize(
    ("name", "options", "written"),
    [
        ("ViT-B-23", {}, r"'ViT-B-23' is unknown; near names: ViT-B-32"),
        ("ViT-B-23", {"pretrained": "openai"}, r"near names: ViT-B-32"),
        ("RN50", {}, r"would be random: .* \(known: openai, yfcc15m, cc12m\)"),
        ("RN50", {"pretrained": "laion"}, r"neither a file nor weights of RN50"),
        ("RN50", {"pretrained": "openai", "average": True}, "--average: RN50 is not a run"),
        ("local-dir:/nowhere", {"pretrained": "openai"}, "brings its own weights"),
    ],
)
def test_refused(name: str, options: dict, written: str) -> None:
    with pytest.raises(ValueError, match=written):
        open_model(name, **options)


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a network, of which the tests make no use."""

    def unreachable(*arguments: object, **options: object) -> str:
        raise OSError("name or service not known")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"RN50 with .* openai cannot be loaded: .*not known"):
        open_model("RN50", pretrained="openai")


def test_folders_without_a_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        open_model(f"local-dir:{tmp_path}/nowhere")
    with pytest.raises(FileNotFoundError, match="is not a run directory of fastclip train"):
        open_model(f"{tmp_path}/nowhere")
    (folder / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"repository cannot be opened"):
        open_model(f"local-dir:{folder}")
