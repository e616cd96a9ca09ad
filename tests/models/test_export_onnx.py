"""Encoders as ONNX: onnxruntime gives the run's features, for any batch; what is refused."""

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import fastclip
from fastclip.cli import main
from fastclip.models import export_onnx as module
from fastclip.models.export_onnx import export_onnx
from tests.models.language import make_language_model
from tests.models.test_hub import RESNET, make_encoder, make_run
from tests.train.conftest import TINY_MODEL

__all__ = ["make_run"]

TEXTS = ["a photo of a dog", "many words", "cat"]
LM = {"text_lm_unfrozen": 1}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "resnet": (RESNET, {}),
    "vit": (TINY_MODEL, {}),
    "bert": (TINY_MODEL, {"text_lm": "bert", **LM}),
    "gpt2": (TINY_MODEL, {"text_lm": "gpt2", "text_lm_pooling": "last", **LM}),
    "rocket": (TINY_MODEL, {"objective": "rocket", "head_hidden": 8}),
    "uniclip": (TINY_MODEL, {"objective": "uniclip"}),
}


def run_onnx(file: Path, given: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    ((name, *_),) = [[given.name] for given in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: given.numpy()})[0])


def require_features(run: Path, folder: Path) -> None:
    """onnxruntime gives those of the run, for batches of other sizes than were traced."""
    model, transform, tokenizer = fastclip.load(run)
    size = transform.transforms[1].size[0]
    images = torch.randn(3, 3, size, size, generator=torch.manual_seed(3))
    for rows in (slice(3), slice(1)):
        pairs = (("image", images[rows]), ("text", tokenizer(TEXTS)[rows]))
        for name, given in pairs:
            with torch.no_grad():
                wanted = getattr(model, f"encode_{name}")(given, normalize=True)
            found = run_onnx(folder / f"{name}.onnx", given)
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_gives_the_features_of_the_run(
    case: str, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    config, options = CASES[case]
    if family := options.get("text_lm"):
        make = make_encoder if family == "bert" else make_language_model
        options = {**options, "text_lm": make(tmp_path / "lm", family)}
    run, folder = make_run(config, **options), tmp_path / "onnx"
    assert main(["convert", "to-onnx", str(run), str(folder), "--no-check"]) == 0
    require_features(run, folder)


def test_siglip_has_a_bias_and_weights_beside_the_file(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_INSIDE", 0)
    run, folder = make_run(siglip=True), tmp_path / "onnx"
    export_onnx(run, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "image.onnx",
        "image.onnx.data",
        "text.onnx",
        "text.onnx.data",
    ]
    require_features(run, folder)
    model, transform, _ = fastclip.load(run)
    # each file has the weights of its tower alone
    weights = {name: value.nbytes for name, value in model.state_dict().items()}
    image = sum(size for name, size in weights.items() if name.startswith("visual."))
    assert (folder / "image.onnx.data").stat().st_size < 2 * image < sum(weights.values()) / 2
    found = onnxruntime.InferenceSession(folder / "text.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(found["logit_scale"]) == pytest.approx(10)
    assert json.loads(found["logit_bias"]) == -10
    assert json.loads(found["preprocess"])["size"] == [*transform.transforms[1].size]


def pretend(encoder: object, name: str, given: torch.Tensor, file: Path, *about: object) -> None:
    """Instead of an export, which takes seconds."""
    file.write_text(json.dumps(list(given.shape)))


@pytest.mark.parametrize("case", ["simclr", "uniclip", "gpt2"])
def test_what_a_model_has(
    case: str, make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "simclr": {"objective": "simclr", "projector_hidden": 8},
        "uniclip": {"objective": "uniclip"},
        "gpt2": {"text_lm": make_language_model(tmp_path / "lm", "gpt2"), **LM},
    }
    run = make_run(**given[case])
    seen: list[dict[str, str]] = []

    def export(*arguments: Any) -> None:
        seen.append(arguments[4])
        pretend(*arguments)

    monkeypatch.setattr(module, "_export", export)
    names = export_onnx(run, tmp_path / "onnx", check=False)
    files = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {f"{name}.onnx" for name in names} == {f for f in files if f.endswith(".onnx")}
    assert names == (["image"] if case == "simclr" else ["image", "text"])
    assert ("tokenizer.json" in files) == (case == "gpt2")
    facts = {name: json.loads(value) for name, value in seen[0].items() if name != "fastclip"}
    assert facts.get("padding") == (-1 if case == "gpt2" else None)
    assert ("logit_scale" in facts) == (case != "simclr")
    if case == "uniclip":
        # logits are (cosine - offset) / temperature
        criterion = fastclip.load(run).model.criterion
        temperature = criterion.log_temperature[criterion.pair[0, 1]].double().exp().item()
        offset = criterion.offset[criterion.pair[0, 1]].item()
        assert facts["logit_scale"] == pytest.approx(1 / temperature)
        assert facts["logit_bias"] == pytest.approx(-offset / temperature)


@pytest.mark.parametrize("kind", ["disk full", "other features", "fixed batch"])
def test_failures_leave_nothing(
    kind: str, make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    before = sorted(path.name for path in tmp_path.iterdir())

    class Other(torch.nn.Module):
        def __init__(self, model: object, name: str) -> None:
            super().__init__()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            rows = inputs.flatten(1)[:, :8]
            if kind == "fixed batch":
                return rows + torch.zeros(len(rows), 1)
            return rows if torch.compiler.is_exporting() else rows + 1

    def full(*about: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if kind == "disk full":
        monkeypatch.setattr(module, "_export", full)
    else:
        monkeypatch.setattr(module, "_Encoder", Other)
    message = {
        "disk full": "No space left",
        "other features": "the ONNX image tower of .* gives other features",
        "fixed batch": "cannot be exported to ONNX for batches of any size",
    }
    with pytest.raises((OSError, ValueError), match=message[kind]):
        export_onnx(run, tmp_path / "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["convert", "to-onnx", str(tmp_path / "no run"), str(tmp_path / "out")]) == 1
    assert "pip install 'fastclip-kernels[onnx]'" in capsys.readouterr().err
