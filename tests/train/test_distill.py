"""A teacher, live or stored: its term in the loss, micro-batches, ranks, resuming, ZeRO."""

import io
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
from fastclip.train.engine import Engine
from fastclip.train.health import NonFiniteError
from fastclip.train.log import read_metrics
from fastclip.train.loop import train
from fastclip.train.teacher import IMAGE, TEXT, StoredTeacher
from fastclip.train.torch_engine import TorchEngine
from tests.conftest import jpeg
from tests.processes import train_pair
from tests.train.teachers import live_teacher, make_teachers
from tests.train.test_loop import identical

CPU = torch.device("cpu")
SAMPLES = 32


@pytest.fixture
def teacher(tmp_path: Path) -> list[str]:
    """Flags of another model, wider and of longer texts."""
    make_teachers(tmp_path, SAMPLES)
    names = live_teacher(tmp_path)
    model, weights = names["distill_model"], names["distill_pretrained"]
    return ["--distill-model", model, "--distill-pretrained", weights]


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


@pytest.fixture
def shard(stored: list[str], make_shard: Callable[..., Path], tmp_path: Path) -> str:
    """A shard that holds the features that are stored too."""
    images = np.concatenate([np.load(tmp_path / f"images-{part}.npy") for part in range(2)])
    members = []
    for i, (image, text) in enumerate(zip(images, np.load(tmp_path / "texts.npy"), strict=True)):
        members.append((f"{i}.jpg", jpeg((i * 37 % 256, i * 91 % 256, i * 13 % 256))))
        members.append((f"{i}.txt", f"caption number {i}".encode()))
        for side, features in (("image", image), ("text", text)):
            file = io.BytesIO()
            np.save(file, features)
            members.append((f"{i}.teacher_{side}.npy", file.getvalue()))
    return str(make_shard(members=members))


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


def test_features_in_shards_are_those_in_files(
    flags: list[str], stored: list[str], shard: str, tmp_path: Path
) -> None:
    """In micro-batches, and resumed in the middle of an epoch."""
    flags = [*flags, "--train-data", shard, "--batch-size", "4", "--accum-freq", "2"]
    by_row = train(parse([*flags, *stored, "--name", "by-row"]))
    flags += ["--distill-shards", "--distill-logit-scale", "20"]
    whole = train(parse([*flags, "--name", "whole", "--save-every-steps", "3"]))
    assert losses(whole) == losses(by_row)
    source = whole / "checkpoints" / "step_00000006.pt"
    resumed = train(parse([*flags, "--name", "resumed", "--resume", str(source)]))
    ours, theirs = (checkpoint.read(run / "checkpoints" / "epoch_2.pt") for run in (resumed, whole))
    for key in ("state_dict", "optimizer", "rng", "step"):
        assert identical(ours[key], theirs[key]), key


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_read_them(flags: list[str], shard: str, tmp_path: Path) -> None:
    flags = [*flags, "--train-data", shard, "--epochs", "1", "--distill-shards"]
    flags += ["--distill-logit-scale", "20", "--group-duplicates", "excluded"]
    alone = train(parse([*flags, "--name", "alone"]))
    train_pair(*flags, "--batch-size", "4", "--name", "pair", "--workers", "1", "--fsdp")
    found = losses(tmp_path / "logs" / "pair")
    assert len(found) == 4 and found == pytest.approx(losses(alone), rel=1e-5)


def test_a_teacher_that_is_not_finite_is_named(
    flags: list[str], teacher: list[str], tmp_path: Path
) -> None:
    weights = torch.load(tmp_path / "teacher.pt")
    weights["text_projection"][0, 0] = torch.inf
    torch.save(weights, tmp_path / "teacher.pt")
    config = parse([*flags, *teacher])
    engine = TorchEngine(create(config.model.model), config, World(0, 1, CPU), SAMPLES)
    with pytest.raises(NonFiniteError, match="rank 0: input 'teacher_text_features'"):
        engine.backward([batch(slice(None))])


def test_a_row_that_is_not_finite_is_named(stored: list[str], tmp_path: Path) -> None:
    texts = np.load(tmp_path / "texts.npy")
    texts[19] = np.nan
    np.save(tmp_path / "texts.npy", texts)
    teacher = StoredTeacher(stored[1:3], 20.0, SAMPLES, CPU)
    teacher({"index": torch.tensor([18, 20])})
    with pytest.raises(ValueError, match=r"texts\.npy: row 19 .from 0 on. is not finite"):
        teacher({"index": torch.tensor([18, 19])})


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_equal_one_process(flags: list[str], stored: list[str], tmp_path: Path) -> None:
    flags = [*flags, *stored, "--epochs", "1"]
    alone = train(parse([*flags, "--name", "alone"]))
    train_pair(*flags, "--batch-size", "4", "--name", "pair")
    ours, theirs = losses(tmp_path / "logs" / "pair"), losses(alone)
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"distill_model": "a"}, "--distill-model and --distill-pretrained name a teacher togeth"),
        ({"distill_embeddings": ("a", "b")}, "--distill-embeddings needs --distill-logit-scale"),
        ({"distill_logit_scale": 3.0}, "--distill-logit-scale is for --distill-embeddings and"),
        ({"distill_weight": 2.0}, "--distill-weight is for --distill-model, --distill-embed"),
        ({"distill_shards": True}, "--distill-shards needs --distill-logit-scale"),
        (
            {"distill_shards": True, "distill_model": "a", "distill_pretrained": "b"},
            "--distill-model and --distill-shards are several teachers; give one",
        ),
        (
            {"distill_shards": True, "distill_logit_scale": 3.0, "text_augment": "weak"},
            "--distill-shards has one text a sample",
        ),
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


@pytest.mark.parametrize("kind", ["rows", "shards"])
def test_stored_features_need_no_copy_of_the_images(
    kind: str, flags: list[str], stored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's is the only one."""
    given = batch(slice(None))
    if kind == "shards":
        stored = ["--distill-shards", *stored[-2:]]
        given |= {name: torch.ones(8, 6) for name in (IMAGE, TEXT)}
    config = parse([*flags, *stored])
    engine = TorchEngine(create(config.model.model), config, World(0, 1, CPU), SAMPLES)
    inputs = Engine._inputs
    made = []

    def counted(self: Engine, batch: dict[str, Any]) -> dict[str, Any]:
        made.append(1)
        return inputs(self, batch)

    monkeypatch.setattr(Engine, "_inputs", counted)
    engine.backward([given])
    assert len(made) == 1
