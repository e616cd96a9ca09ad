"""Features in bfloat16: near those in float32, and not the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastclip.data.faults import FaultLog
from fastclip.data.sources import SceneSource
from fastclip.evaluate.embed import image_batches
from fastclip.evaluate.features import (
    Encoding,
    ImageFile,
    embed_files,
    embed_images,
    embed_pictures,
    embed_texts,
)
from fastclip.models.clip import Model, create
from tests.conftest import jpeg
from tests.train.conftest import tiny_model

__all__ = ["tiny_model"]  # fixtures

# bfloat16 has eight bits of a number; a tower rounds after each of its products
ROUNDED = 8 * 2**-8
SOURCE = SceneSource("val", 6)


def of_source(model: Model, precision: str, folder: Path) -> Tensor:
    return embed_images(model, SOURCE, precision=precision).features


def of_pictures(model: Model, precision: str, folder: Path) -> Tensor:
    pictures = [SOURCE.read(0, index).image for index in range(6)]
    return embed_pictures(model, pictures, precision=precision)


def of_files(model: Model, precision: str, folder: Path) -> Tensor:
    paths = [folder / f"{number}.jpg" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(jpeg((80 * number, 30, 200)))
    return embed_files(model, list(map(ImageFile, paths)), Encoding(precision=precision))


def of_texts(model: Model, precision: str, folder: Path) -> Tensor:
    return embed_texts(model, ["a red circle", "a star", "two cats"], precision=precision)


def of_rows(model: Model, precision: str, folder: Path) -> Tensor:
    options = {"batch_size": 4, "workers": 0, "precision": precision, "faults": FaultLog()}
    return torch.cat([rows for _, rows in image_batches(model, SOURCE, 0, **options)])


@pytest.mark.parametrize("embed", [of_source, of_pictures, of_files, of_texts, of_rows])
def test_it_is_the_towers(
    embed: Callable[[Model, str, Path], Tensor], tiny_model: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = create(tiny_model)
    exact, low = (embed(model, precision, tmp_path) for precision in ("fp32", "amp_bf16"))
    assert exact.dtype == low.dtype == torch.float32
    # more than float32 would round
    assert 2**-16 < (exact - low).abs().max() < ROUNDED
