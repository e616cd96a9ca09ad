"""Commands with a model whose features are planned: which data and precision they hand on."""

import json
import random
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip.cli import main, model_flags
from fastclip.data.sources import open_source
from fastclip.evaluate.features import Encoding, ImageFeatures, embed_images
from fastclip.evaluate.linear_probe import linear_probe
from fastclip.evaluate.winoground import evaluate_winoground
from fastclip.models.clip import Model
from tests.evaluate import test_docci, test_winoground
from tests.evaluate.planned import BLUE, GREEN, RED, Color, paint, planned_model

COLORS = {"blue": BLUE, "green": GREEN, "red": RED}
PROMPTS = {f"a photo of a {name}.": color for name, color in COLORS.items()}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Model], None]:
    """Make this the model that commands open."""

    def opened(model: Model) -> None:
        monkeypatch.setattr(model_flags, "open_model", lambda *_: model)

    return opened


def evaluate(*words: str) -> dict[str, Any]:
    flags = "--model planned --workers 0 --device cpu --output result.json".split()
    assert main(["eval", *words, *flags]) == 0
    return json.loads(Path("result.json").read_text())["metrics"]


def folders(name: str, images: dict[str, list[Color]]) -> str:
    """A folder of one-color images for each class."""
    for label, colors in images.items():
        for number, color in enumerate(colors):
            paint(Path(name, label, f"{number}.png"), color)
    return name


def embedded(model: Model, data: str) -> ImageFeatures:
    return embed_images(model, open_source(data, split="val"), classify=False)


def test_a_probe_is_tested_on_the_test_images(use: Callable[[Model], None]) -> None:
    """Blue and red have changed places there, so that one class alone is right."""
    model = planned_model(PROMPTS)
    use(model)
    train = folders("train", {name: [color] * 6 for name, color in COLORS.items()})
    test = folders("test", {"blue": [RED], "green": [GREEN], "red": [BLUE]})
    metrics = evaluate("linear-probe", "--train-data", train, "--data", test)
    assert metrics["lp_acc1"] == pytest.approx(1 / 3) and metrics["validation_acc1"] == 1
    assert metrics == linear_probe(embedded(model, train), embedded(model, test))


def test_the_seed_of_a_probe(use: Callable[[Model], None]) -> None:
    """Of images without any order it decides what the held-out fifth scores."""
    model, stream = planned_model(PROMPTS), random.Random(0)
    use(model)

    def draw() -> Color:
        return stream.randrange(256), stream.randrange(256), stream.randrange(256)

    train, test = (
        folders(name, {label: [draw() for _ in range(10)] for label in COLORS})
        for name in ("train", "test")
    )
    found = [
        evaluate("linear-probe", "--train-data", train, "--data", test, "--seed", str(seed))
        for seed in (0, 1)
    ]
    assert found[0] != found[1]
    for seed, metrics in enumerate(found):
        expected = linear_probe(embedded(model, train), embedded(model, test), seed=seed)
        assert metrics == expected


def test_winoground_as_a_command(use: Callable[[Model], None]) -> None:
    rows = [
        ("red", "blue", "red", "blue", "Object"),
        ("red", "blue", "blue", "red", "Object"),
        ("green", "red", "green", "red", "Both"),
    ]
    model = test_winoground.lay_out(Path("data"), rows)
    use(model)
    metrics = evaluate("winoground", "--root", "data")
    assert metrics == evaluate_winoground(model, Path("data"), Encoding())
    assert metrics["group_score"] == pytest.approx(2 / 3) and metrics["Object"]["ties"] == 0


def test_docci_at_the_ranks_asked_for(use: Callable[[Model], None]) -> None:
    rows = [
        ("test", "test_0", "A red wall.", RED),
        ("test", "test_1", "A green wall.", GREEN),
        ("test", "test_2", "A blue wall.", BLUE),
    ]
    use(test_docci.lay_out(Path("data"), rows))
    metrics = evaluate("docci", "--root", "data", "--recall-k", "2", "3")
    # of `test_docci.test_by_hand`
    wanted = {
        f"{name}_retrieval_recall@{k}": pytest.approx(value)
        for name in ("image", "text")
        for k, value in ((2, 2 / 3), (3, 1))
    }
    assert {name: value for name, value in metrics.items() if "@" in name} == wanted
    assert metrics["chance"].keys() == wanted.keys()


@pytest.fixture
def dtypes(use: Callable[[Model], None], monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """What autocast makes of products, each time that one of the towers is called."""
    model, noted = planned_model(PROMPTS), list[torch.dtype]()
    for name in ("encode_image", "encode_text"):
        encode = getattr(model.model, name)

        def noting(rows: Tensor, encode: Callable[[Tensor], Tensor] = encode) -> Tensor:
            enabled = torch.is_autocast_enabled("cpu")
            noted.append(torch.get_autocast_dtype("cpu") if enabled else torch.float32)
            return encode(rows)

        monkeypatch.setattr(model.model, name, noting)
    use(model)
    return noted


@pytest.mark.parametrize(
    ("words", "calls"),
    [
        # a batch of images, and one of texts
        ("eval zeroshot --data photos", 2),
        ("eval retrieval --data photos", 2),
        ("eval linear-probe --train-data photos --data others", 2),
        # an image of zeros comes before the first batch
        ("embed images photos -o images.npy", 2),
        ("embed texts texts.txt -o texts.npy", 1),
        # the query is a text, or an image
        ("search 'a photo of a red.' --data photos", 3),
        ("search --image photos/red/0.png --data photos", 3),
    ],
)
def test_precision(words: str, calls: int, dtypes: list[torch.dtype]) -> None:
    for name, count in (("photos", 5), ("others", 1)):
        folders(name, {label: [color] * count for label, color in COLORS.items()})
    Path("texts.txt").write_text("".join(f"{text}\n" for text in PROMPTS))
    command = shlex.split(words)
    flags = "--model planned --workers 0 --device cpu --precision".split()
    for precision, dtype in (("amp_bf16", torch.bfloat16), ("fp32", torch.float32)):
        for made in Path().glob("*.npy"):
            made.unlink()
        assert main([*command, *flags, precision]) == 0
        assert dtypes == [dtype] * calls
        dtypes.clear()
