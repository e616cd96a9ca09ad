"""Which implementation serves which device."""

import pytest
import torch

from fastclip.ops import backend


@pytest.mark.parametrize(
    "capability, installed, served",
    [((9, 0), "3.6.0", True), ((10, 0), "3.7.1", False), ((10, 0), "3.8.0", True)],
)
def test_a_triton_too_old_for_a_gpu_is_not_chosen(
    capability: tuple[int, int], installed: str, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_is_installed", lambda name: True)
    monkeypatch.setattr(backend, "_compiler", lambda: "cc")
    monkeypatch.setattr(backend, "version", lambda name: installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    backend._old_triton.cache_clear()
    device = torch.device("cuda", 0)
    reason = backend.unavailable_reason("similarity", "triton", device, torch.bfloat16)
    backend._old_triton.cache_clear()
    if served:
        assert reason is None
    else:
        assert reason is not None and reason.startswith("Triton 3.7.1 cannot compile")
