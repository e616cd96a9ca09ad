"""The choice of a device: a GPU that cannot be used is said, not silently passed over."""

import pytest
import torch

from fastclip import device


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(device, "driver_is_installed", lambda: True)


def test_an_old_driver_is_an_error(old_driver: None) -> None:
    for name in ("auto", "cuda"):
        with pytest.raises(ValueError, match=r"driver on your system is too old"):
            device.choose_device(name)
    with pytest.raises(ValueError, match=r"--device cpu"):
        device.choose_device("auto")
    assert device.choose_device("cpu").type == "cpu"


def test_no_gpu_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "driver_is_installed", lambda: False)
    assert device.choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="--device cuda:"):
        device.choose_device("cuda")


def test_a_gpu_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.choose_device("auto") == torch.device("cuda", 1)
    assert device.choose_device("cuda:0").index == 0
    with pytest.raises(ValueError, match="there are 2 GPUs"):
        device.choose_device("cuda:2")


def test_unknown_devices() -> None:
    with pytest.raises(ValueError, match="device 'gpu' is unknown"):
        device.choose_device("gpu")
