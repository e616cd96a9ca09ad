"""A tiny model and helpers to run training as a user does."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import Forked, start_command

ROOT = Path(__file__).parents[2]

TINY_MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def tiny_model(tmp_path: Path) -> str:
    """Path of a config that trains in milliseconds a step; patch dropout draws random numbers."""
    model = json.loads(json.dumps(TINY_MODEL))
    model["vision_cfg"]["patch_dropout"] = 0.5
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(model))
    return str(path)


@pytest.fixture
def train_flags(tiny_model: str, tmp_path: Path) -> list[str]:
    """Flags of a short run on scenes: 8 steps of 8 samples an epoch, two epochs."""
    flags = f"--model {tiny_model} --logs {tmp_path}/logs --train-num-samples 64 --batch-size 8 "
    flags += "--epochs 2 --warmup 2 --workers 0 --log-every-n-steps 1 --device cpu "
    return (flags + "--precision fp32 --report-to none").split()


@pytest.fixture
def start_training() -> Callable[..., Forked]:
    """Start `fastclip train` in a process of its own."""

    def start(*flags: str, own_group: bool = False) -> Forked:
        return start_command("train", *flags, own_group=own_group)

    return start
