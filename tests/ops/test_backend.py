"""Which implementation serves which device."""

from pathlib import Path

import pytest
import torch
import triton

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
    monkeypatch.setattr(backend, "_build_reason", lambda: None)
    monkeypatch.setattr(triton, "__version__", installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    backend._old_triton.cache_clear()
    device = torch.device("cuda", 0)
    reason = backend.unavailable_reason("similarity", "triton", device, torch.bfloat16)
    backend._old_triton.cache_clear()
    if served:
        assert reason is None
    else:
        assert reason is not None and reason.startswith("Triton 3.7.1 cannot compile")


def test_what_tritons_launcher_is_built_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without it, the first loss on a GPU would end in a compiler's error."""
    find = backend._build_reason.__wrapped__
    assert find() is None
    with monkeypatch.context() as patch:
        patch.setenv("CC", str(tmp_path / "nowhere"))
        assert "install gcc or clang, or set CC" in find()
    with monkeypatch.context() as patch:
        patch.setattr(backend.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
        assert f"needs Python.h, which {tmp_path} lacks" in find()
