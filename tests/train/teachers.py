"""Teachers of the tiny model: a live one and stored features."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastclip.models.clip import create
from tests.train.conftest import TINY_MODEL


def make_teachers(folder: Path, samples: int) -> None:
    """A model of a wider embedding and longer texts, and features of each sample of the data."""
    text = {**TINY_MODEL["text_cfg"], "context_length": 20}
    path = folder / "teacher.json"
    path.write_text(json.dumps({**TINY_MODEL, "embed_dim": 24, "text_cfg": text}))
    torch.manual_seed(7)
    torch.save(create(str(path)).model.state_dict(), folder / "teacher.pt")
    for side in ("images", "texts"):
        np.save(folder / f"{side}.npy", torch.randn(samples, 6).numpy())


def live_teacher(folder: Path) -> dict[str, Any]:
    """Flags of the model."""
    return {
        "distill_model": str(folder / "teacher.json"),
        "distill_pretrained": str(folder / "teacher.pt"),
    }


def stored_teacher(folder: Path) -> dict[str, Any]:
    """Flags of the features."""
    return {
        "distill_embeddings": (str(folder / "images.npy"), str(folder / "texts.npy")),
        "distill_logit_scale": 20.0,
        "distill_weight": 0.5,
    }
