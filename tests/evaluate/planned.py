"""A model whose features are planned: of images their colors, of texts what a table says."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastclip.models.clip import Model

Color = tuple[int, int, int]

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


class _Towers(nn.Module):
    """Counts what it encodes; the parameter says where the model is."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = nn.Parameter(features)
        self.images = 0
        self.texts = 0

    def encode_image(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return images

    def encode_text(self, rows: Tensor) -> Tensor:
        self.texts += len(rows)
        return self.features[rows[:, 0]]


def planned_model(features: dict[str, Sequence[float]]) -> Model:
    """An image's feature is its mean color, a text's the row of the table."""
    row_of = {text: row for row, text in enumerate(features)}

    def mean_color(image: Any) -> Tensor:
        return torch.from_numpy(np.asarray(image, dtype=np.float32)).mean(dim=(0, 1))

    return Model(
        _Towers(torch.tensor(list(features.values()), dtype=torch.float32)),
        mean_color,
        lambda texts: torch.tensor([[row_of[text]] for text in texts]),
    )


def paint(path: Path, *stripes: Color, height: int = 8) -> Path:
    """A PNG of vertical stripes, each 8 pixels wide (whatever the ending, PNG keeps colors)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = np.repeat(np.array(stripes, dtype=np.uint8), 8, axis=0)
    Image.fromarray(np.tile(columns, (height, 1, 1))).save(path, "PNG")
    return path


def write_json(path: Path, content: object) -> Path:
    """A JSON file; of lines where its ending says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        assert isinstance(content, list)
        path.write_text("".join(f"{json.dumps(entry)}\n" for entry in content))
    return path
