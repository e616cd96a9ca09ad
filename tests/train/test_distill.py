"""A teacher, live or stored: its term in the loss, micro-batches, ranks, resuming, ZeRO."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from fastclip.models import checkpoint
from fastclip.models.clip import create
from fastclip.train.config import TrainConfig, parse
from fastclip.train.distributed import World
from fastclip.train.log import read_metrics
from fastclip.train.loop import train
from fastclip.train.teacher import IMAGE, TEXT, StoredTeacher
from fastclip.train.torch_engine import TorchEngine
from tests.processes import train_pair
from tests.train.conftest import TINY_MODEL
from tests.train.test_loop import identical

CPU = torch.device("cpu")
SAMPLES = 32


@pytest.fixture
def teacher(tmp_path: Path) -> list[str]:
    """Flags of another model, wider and of longer texts."""
    text = {**TINY_MODEL["text_cfg"], "context_length": 20}
    path = tmp_path / "teacher.json"
    path.write_text(json.dumps({**TINY_MODEL, "embed_dim": 24, "text_cfg": text}))
    torch.manual_seed(7)
    torch.save(create(str(path)).model.state_dict(), tmp_path / "teacher.pt")
    return ["--distill-model", str(path), "--distill-pretrained", str(tmp_path / "teacher.pt")]


@pytest.fixture
def stored(tmp_path: Path) -> list[str]:
    """Flags of stored features, the images' in two files."""
    images, texts = (
        torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    )
    for part, rows in enumerate(images.split([20, 12])):
        np.save(tmp_path / f"images-{part}.npy", rows.half().numpy())
    np.save(tmp_path / "texts.npy", texts.numpy())
    names = f"{tmp_path}/images-{{0..1}}.npy {tmp_path}/texts.npy"
    return ["--distill-embeddings", *names.split(), "--distill-logit-scale", "20"]


@pytest.fixture
def flags(train_flags: list[str], tmp_path: Path) -> list[str]:
    """Two epochs of 4 steps of 8 samples, without dropout, which draws per rank."""
    model = tmp_path / "tiny.json"
    model.write_text(model.read_text().replace('"patch_dropout": 0.5', '"patch_dropout": 0.0'))
    return [*train_flags, "--train-num-samples", str(SAMPLES)]


def batch(rows: slice) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 400, (8, 12), generator=generator)
    tokens[:, -1] = 49407
    return {
        "images": [torch.randint(0, 256, (8, 3, 16, 16), generator=generator).byte()[rows]],
        "texts": [tokens[rows]],
        "index": (torch.arange(8) * 3)[rows],
        "key": [str(row) for row in range(8)][rows],
    }


@pytest.mark.parametrize("parts", [1, 4])
def test_the_engine_computes_open_clips_loss(
    parts: int, flags: list[str], teacher: list[str], tmp_path: Path
) -> None:
    config = parse([*flags, *teacher, "--distill-weight", "0.5", "--accum-freq", str(parts)])
    torch.manual_seed(0)
    model = create(config.model.model)
    before = torch.get_rng_state()
    engine = TorchEngine(model, config, World(0, 1, CPU), SAMPLES)
    assert before.equal(torch.get_rng_state()), "a teacher draws from the student's stream"
    size = 8 // parts
    loss = engine.backward([batch(slice(i, i + size)) for i in range(0, 8, size)])
    ours = {n: p.grad.clone() for n, p in model.model.named_parameters() if p.grad is not None}

    whole = batch(slice(None))
    mean, std = (
        torch.tensor(model.preprocess_config[name]).view(3, 1, 1) * 255 for name in ("mean", "std")
    )
    images = (whole["images"][0].float() - mean) / std
    theirs = create(str(tmp_path / "teacher.json"), pretrained=str(tmp_path / "teacher.pt")).model
    model.model.zero_grad()
    output = model.model(images, whole["texts"][0])
    with torch.no_grad():
        target = theirs(images, F.pad(whole["texts"][0], (0, 8)))
    contrastive, term = open_clip.loss.DistillClipLoss()(
        **output, **{f"dist_{name}": value for name, value in target.items()}
    )
    wanted = contrastive + 0.5 * term
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    # float32 sums in another order, through towers: of a tensor, not of each entry
    for name, parameter in model.model.named_parameters():
        assert parameter.grad is not None
        error = (ours[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error <= 1e-5, (name, error)
    # the teacher is no part of what is saved, and stays as it was
    assert not any("teacher" in name for name in model.model.state_dict())
    assert engine.objective.chance(8) is None


def test_stored_rows_are_found_by_the_samples_number(stored: list[str], tmp_path: Path) -> None:
    images = np.concatenate([np.load(tmp_path / f"images-{part}.npy") for part in range(2)])
    found = StoredTeacher(stored[1:3], 20.0, SAMPLES, CPU)({"index": torch.tensor([21, 0, 19, 20])})
    for name, rows in ((IMAGE, images), (TEXT, np.load(tmp_path / "texts.npy"))):
        wanted = F.normalize(torch.from_numpy(rows[[21, 0, 19, 20]]).float(), dim=-1)
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-7)


def test_a_run_resumes_with_its_stored_teacher(flags: list[str], stored: list[str]) -> None:
    flags = [*flags, *stored, "--accum-freq", "2", "--batch-size", "4", "--save-all"]
    whole = train(parse([*flags, "--name", "whole"]))
    source = whole / "checkpoints" / "epoch_1.pt"
    resumed = train(parse([*flags, "--name", "resumed", "--resume", str(source)]))
    ours, theirs = (checkpoint.read(run / "checkpoints" / "epoch_2.pt") for run in (resumed, whole))
    for key in ("state_dict", "optimizer", "rng", "step"):
        assert identical(ours[key], theirs[key]), key


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_equal_one_process(flags: list[str], stored: list[str], tmp_path: Path) -> None:
    flags = [*flags, *stored, "--epochs", "1"]
    alone = train(parse([*flags, "--name", "alone"]))
    train_pair(*flags, "--batch-size", "4", "--name", "pair")
    ours, theirs = (
        [line["loss"] for line in read_metrics(run)] for run in (tmp_path / "logs" / "pair", alone)
    )
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"distill_model": "a"}, "--distill-model and --distill-pretrained name a teacher togeth"),
        ({"distill_embeddings": ("a", "b")}, "--distill-embeddings needs --distill-logit-scale"),
        ({"distill_logit_scale": 3.0}, "--distill-embeddings needs --distill-logit-scale"),
        ({"distill_weight": 2.0}, "--distill-weight is for --distill-model and --distill-embed"),
        (
            {"distill_model": "a", "distill_pretrained": "b", "siglip": True},
            "--distill-model is for the softmax loss of --objective clip, without --siglip",
        ),
        (
            {
                "distill_embeddings": ("a", "b"),
                "distill_logit_scale": 3.0,
                "sentence_sampling": True,
            },
            "--distill-embeddings has one text a sample",
        ),
    ],
)
def test_what_is_no_teacher(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig.from_flat(**given)


def edited(path: Path, **changes: Any) -> None:
    config = json.loads(path.read_text())
    for section, values in changes.items():
        config[section] |= values
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_cfg": {"image_size": 32}}, "takes images of 32 pixels, the student of 16; store"),
        ({"text_cfg": {"context_length": 9}}, "reads other tokens than the student (9 and 12 a"),
    ],
)
def test_teachers_that_see_something_else(
    changes: dict[str, Any], message: str, flags: list[str], teacher: list[str], tmp_path: Path
) -> None:
    edited(tmp_path / "teacher.json", **changes)
    torch.save(create(str(tmp_path / "teacher.json")).model.state_dict(), tmp_path / "teacher.pt")
    config = parse([*flags, *teacher])
    with pytest.raises(ValueError, match=re.escape(message)):
        TorchEngine(create(config.model.model), config, World(0, 1, CPU), SAMPLES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: np.save(path, np.zeros((9, 6))), "has 9 rows, the training data 32 samples"),
        (lambda path: np.save(path, np.zeros(32)), "is no matrix of numbers, (rows, E)"),
        (lambda path: path.write_bytes(b"abc"), "texts.npy: "),
        (lambda path: path.unlink(), "do not exist"),
    ],
)
def test_files_that_are_no_features(
    change: Callable[[Path], Any], message: str, stored: list[str], tmp_path: Path
) -> None:
    change(tmp_path / "texts.npy")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        StoredTeacher(stored[1:3], 20.0, SAMPLES, CPU)
