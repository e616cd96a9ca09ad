"""The way from a loss to a kernel is short: each layer is entered once."""

import itertools
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip import ClipLoss
from tests.ops.cases import unit
from tests.test_repo_shape import ROOT


def test_few_files_lie_between_a_loss_and_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("fastclip.kernels.lean", reason="triton is not installed")
    stacks = []
    original = kernels.launch

    def launch(*arguments: Any, **options: Any) -> None:
        stacks.append([Path(frame.filename) for frame in traceback.extract_stack()])
        original(*arguments, **options)

    monkeypatch.setattr(kernels, "launch", launch)
    features = [unit(8, 4, seed).float().requires_grad_() for seed in (0, 1)]
    ClipLoss(backend="triton")(*features, torch.tensor(5.0))
    assert stacks
    for stack in stacks:
        ours = [
            path.relative_to(ROOT)
            for path in stack
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] != "tests"
        ]
        ours = [path for path in ours if path.suffix == ".py" and path.parts[0] != ".venv"]
        entered = [str(path) for path, _ in itertools.groupby(ours)]
        # with launch.py, in whose place this test stands
        assert len(entered) + 1 <= 8 and len(set(entered)) == len(entered), entered
        assert entered[0] == "fastclip/losses/clip.py"
        assert entered[-1] == "kernels/lean.py"
