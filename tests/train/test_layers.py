"""Other kernels under the towers' weights: --attention, --layer-norm, --optimizer."""

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastclip.cli import main
from fastclip.integrations import apex
from fastclip.integrations.patch import PatchHandle
from fastclip.train.config import TrainConfig, parse
from fastclip.train.log import read_metrics
from fastclip.train.loop import train
from fastclip.train.optim import build_optimizer
from fastclip.train.options import ModelOptions


def test_attention_changes_no_result(train_flags: list[str]) -> None:
    losses = {}
    for attention in ("tower", "reference", "sdpa"):
        flags = [*train_flags, "--name", attention, "--epochs", "1", "--precision", "fp32"]
        run = train(parse([*flags, "--attention", attention]))
        losses[attention] = [line["loss"] for line in read_metrics(run) if "loss" in line]
        assert parse(["--config", str(run / "config.yaml")]).model.attention == attention
    assert losses["sdpa"] == pytest.approx(losses["tower"], rel=1e-4)
    assert losses["reference"] == pytest.approx(losses["tower"], rel=1e-4)


def test_a_model_without_attention_is_refused() -> None:
    from fastclip.train.layers import replace_layers

    with pytest.raises(ValueError, match="no attention that could be replaced"):
        replace_layers(nn.Linear(3, 3), ModelOptions(attention="sdpa"))


@pytest.mark.skipif(apex.unavailable_reason() is None, reason="NVIDIA's apex is installed")
@pytest.mark.parametrize("flags", [["--layer-norm", "apex"], ["--optimizer", "apex-lamb"]])
def test_without_apex_the_flags_say_how_to_get_it(
    flags: list[str], train_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *train_flags, "--name", "x", *flags]) == 1
    said = capsys.readouterr().err
    assert flags[0] in said and "NVIDIA's apex is not installed; build it from" in said


def test_zero_keeps_torchs_optimizer() -> None:
    with pytest.raises(ValueError, match="ZeRO and FSDP2 shard torch's AdamW"):
        TrainConfig.from_flat(deepspeed=True, optimizer="apex-adamw")


def test_another_package_of_that_name_is_not_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's apex is a web framework's toolkit, without `apex.normalization`."""
    other = types.ModuleType("apex")
    other.__spec__ = types.SimpleNamespace(name="apex")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "apex", other)
    assert "not NVIDIA's" in (apex.unavailable_reason() or "")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules laid out as apex's, which remember what they are asked for."""
    asked: dict[str, Any] = {}

    def fused(tokens: torch.Tensor, weight: Any, bias: Any, shape: Any, eps: float) -> Any:
        asked["norms"] = asked.get("norms", 0) + 1
        return F.layer_norm(tokens, shape, weight, bias, eps)

    def lamb(groups: Any, **options: Any) -> torch.optim.Optimizer:
        asked["options"] = options
        return torch.optim.SGD(groups, lr=options["lr"])

    layout = {
        "apex": {},
        "apex.normalization": {"FusedLayerNorm": nn.LayerNorm},
        "apex.normalization.fused_layer_norm": {"fused_layer_norm_affine": fused},
        "apex.optimizers": {"FusedLAMB": lamb},
    }
    for name, content in layout.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["apex"].optimizers = sys.modules["apex.optimizers"]  # type: ignore[attr-defined]
    return asked


def test_what_apex_is_asked_for(stand_in: dict[str, Any]) -> None:
    """apex runs on CUDA only: that the right layers and numbers reach it."""
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8, bias=False))
    tokens = torch.randn(3, 8)
    want = model(tokens)
    with PatchHandle() as handle:
        assert apex.replace_layer_norms(model, handle) == 1
        torch.testing.assert_close(model(tokens), want)
        half = model[0](tokens.bfloat16())
    assert stand_in["norms"] == 2 and half.dtype == torch.bfloat16
    assert type(model[0]) is nn.LayerNorm
    config = parse(["--optimizer", "apex-lamb", "--lr", "0.01", "--wd", "0.3"])
    built = build_optimizer(model, config.optim)
    assert stand_in["options"] == {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6}
    assert len(built.param_groups[0]["params"]) == 1 and len(built.param_groups[1]["params"]) == 4


def test_a_layer_norm_with_another_forward_is_not_apexs(stand_in: dict[str, Any]) -> None:
    from open_clip.transformer import LayerNormFp32
    from timm.layers import LayerNorm2d

    model = nn.Sequential(LayerNorm2d(8), LayerNormFp32(8))
    images = torch.randn(2, 8, 3, 8)
    want = model(images)
    with PatchHandle() as handle:
        assert apex.replace_layer_norms(model, handle) == 1
        torch.testing.assert_close(model(images), want)
    assert stand_in["norms"] == 1
