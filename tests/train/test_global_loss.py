"""`--loss global`: what it remembers is saved, resumed and the same on any number of processes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.functional import global_contrastive_loss
from fastclip.models import checkpoint
from fastclip.models.clip import create
from fastclip.train.config import TrainConfig, parse
from fastclip.train.distributed import World
from fastclip.train.log import read_metrics
from fastclip.train.loop import train
from fastclip.train.objective import ClipObjective, GlobalObjective, objective_of
from fastclip.train.torch_engine import TorchEngine
from tests.processes import finish, train_pair
from tests.train.test_loop import identical

RATE = ("--global-temperature-lr", "0.01")


@pytest.fixture
def flags(train_flags: list[str], tmp_path: Path) -> list[str]:
    """Two epochs of 4 steps of 8 samples, without dropout, which draws per rank."""
    model = tmp_path / "tiny.json"
    model.write_text(model.read_text().replace('"patch_dropout": 0.5', '"patch_dropout": 0.0'))
    flags = [*train_flags, "--train-num-samples", "32", "--loss", "global"]
    return [*flags, *RATE]


def last_of(run: Path) -> dict[str, Any]:
    return checkpoint.read(run / "checkpoints" / "epoch_2.pt")


def test_resumed_equals_uninterrupted(flags: list[str]) -> None:
    flags = [*flags, "--save-every-steps", "6"]
    whole = train(parse([*flags, "--name", "whole"]))
    source = whole / "checkpoints" / "step_00000006.pt"
    half = checkpoint.read(source)[checkpoint.MEMORY]["log_u"]
    assert half.shape == (2, 32) and half.isfinite().all()
    resumed = train(parse([*flags, "--name", "resumed", "--resume", str(source)]))
    ours, theirs = last_of(resumed), last_of(whole)
    for key in ("state_dict", "optimizer", "rng", "data", "step", checkpoint.MEMORY):
        assert identical(ours[key], theirs[key]), key
    assert not torch.equal(theirs[checkpoint.MEMORY]["log_u"], half)

    with pytest.raises(ValueError, match=r"sample counts have changed .*\(40 samples now\)"):
        more = ["--train-num-samples", "40", "--epochs", "3"]
        train(parse([*flags, *more, "--name", "more", "--resume", str(source)]))
    without = [*flags, RATE[0], "None"]
    with pytest.raises(ValueError, match="has 3 groups of parameters, this run's 2: give --global"):
        train(parse([*without, "--name", "without", "--resume", str(source)]))


def test_micro_batches_are_one_batch(flags: list[str]) -> None:
    runs = [
        train(parse([*flags, "--name", name, "--batch-size", size, "--accum-freq", parts]))
        for name, size, parts in (("whole", "8", "1"), ("parts", "2", "4"))
    ]
    whole, parts = ([line["loss"] for line in read_metrics(run)] for run in runs)
    assert len(whole) == 8 and whole == pytest.approx(parts, rel=1e-5)
    whole, parts = (last_of(run)[checkpoint.MEMORY]["log_u"] for run in runs)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_equal_one_process_and_one_resumes_from_them(
    flags: list[str], tmp_path: Path
) -> None:
    """An average is of the sample, on whichever rank it comes."""
    alone = train(parse([*flags, "--name", "alone"]))
    train_pair(*flags, "--batch-size", "4", "--save-every-steps", "6", "--name", "pair")
    pair = tmp_path / "logs" / "pair"
    source = pair / "checkpoints" / "step_00000006.pt"
    one = train(parse([*flags, "--name", "one", "--resume", str(source)]))
    ours, theirs = ([line["loss"] for line in read_metrics(run)] for run in (pair, alone))
    assert ours == pytest.approx(theirs, rel=1e-5)
    for run in (pair, one):
        found, wanted = (last_of(each)[checkpoint.MEMORY]["log_u"] for each in (run, alone))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_under_deepspeed_it_is_as_without(
    flags: list[str], tmp_path: Path, stage: int, start_training: Callable[..., Any]
) -> None:
    """And resumes; and, with sharded parameters, a temperature that is frozen."""
    pytest.importorskip("deepspeed")
    if stage == 3:
        flags = [flag for flag in flags if flag not in RATE]
        flags += ["--global-variant", "v1", "--global-temperature", "0.05"]
    plain = train(parse([*flags, "--name", "plain"]))
    zero = [*flags, "--deepspeed", "--deepspeed-config", f"ds_zero{stage}"]
    zero += ["--save-every-steps", "6", "--trust-checkpoint"]
    source = tmp_path / "logs" / "zero" / "checkpoints" / "step_00000006"
    runs = {"zero": [], "resumed": ["--resume", str(source)]} if stage == 1 else {"zero": []}
    for name, more in runs.items():
        finish([start_training(*zero, "--name", name, *more)])
    theirs = read_metrics(plain)
    for name in runs:
        run, first = tmp_path / "logs" / name, 6 if name == "resumed" else 0
        for key in ("loss", "logit_scale"):
            ours = [line[key] for line in read_metrics(run)]
            assert ours == pytest.approx([line[key] for line in theirs[first:]], rel=1e-5)
        log_u = checkpoint.read(run / "checkpoints" / "epoch_2")[checkpoint.MEMORY]["log_u"]
        wanted = last_of(plain)[checkpoint.MEMORY]["log_u"]
        torch.testing.assert_close(log_u, wanted, rtol=1e-4, atol=1e-4)


def engine(flags: dict[str, Any], folder: Path, samples: int = 12) -> TorchEngine:
    torch.manual_seed(0)
    config = TrainConfig.from_flat(model=str(folder / "tiny.json"), precision="fp32", **flags)
    model = create(str(folder / "tiny.json"))
    return TorchEngine(model, config, World(0, 1, torch.device("cpu")), samples)


def batch(rows: int = 6) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "images": [torch.randint(0, 256, (rows, 3, 16, 16), generator=generator).byte()],
        "texts": [torch.randint(1, 400, (rows, 12), generator=generator)],
        "index": torch.arange(rows) * 2,
        "key": [str(row) for row in range(rows)],
    }


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize(
    ("variant", "rho", "gammas"),
    [("v3", 6.5, (1.0, 0.65, 0.3)), ("v1", None, (1.0, 0.65, 0.3)), ("sogclr", None, (0.3,) * 3)],
)
def test_the_engine_computes_the_functions_loss(
    variant: str, rho: float | None, gammas: tuple[float, ...], tmp_path: Path
) -> None:
    flags = {"loss": "global", "global_variant": variant, "global_gamma": 0.3}
    made = engine({**flags, "epochs": 4, "lr": 1e-3}, tmp_path)
    assert isinstance(made.objective, GlobalObjective)
    log_u = torch.full((2, 12), -torch.inf)
    for epoch, gamma in enumerate(gammas):
        made.objective.begin_epoch(epoch)
        with torch.no_grad():
            output = made.objective.outputs(made.model, made._inputs(batch()))
        features = (output["image_features"], output["text_features"], output["logit_scale"])
        wanted = global_contrastive_loss(*features, output["index"], log_u, gamma, rho=rho)
        torch.testing.assert_close(made.backward([batch()]), wanted)
        torch.testing.assert_close(made.objective.memory.log_u, log_u)
        made.update(1e-3)


@pytest.mark.usefixtures("flags")
def test_the_temperature_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    """Adam's first step is as long as the rate."""
    moved = {}
    for rate in (None, 0.02):
        made = engine({"loss": "global", "lr": 1e-3, "global_temperature_lr": rate}, tmp_path)
        before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
        made.backward([batch()])
        made.update(5e-4)
        after = dict(made.model.named_parameters())
        moved[rate] = {name: (after[name] - p).abs().max().item() for name, p in before.items()}
    assert moved[None]["logit_scale"] == pytest.approx(5e-4, rel=1e-2)
    assert moved[0.02]["logit_scale"] == pytest.approx(1e-2, rel=1e-2)
    assert moved[None]["visual.proj"] == pytest.approx(moved[0.02]["visual.proj"], rel=1e-3)


@pytest.mark.parametrize("variant", ["v1", "sogclr"])
def test_a_constant_temperature_stays(flags: list[str], variant: str) -> None:
    flags = [flag for flag in flags if flag not in RATE]
    flags += ["--epochs", "1", "--global-variant", variant, "--global-temperature", "0.05"]
    run = train(parse([*flags, "--name", "a"]))
    assert [line["logit_scale"] for line in read_metrics(run)] == [pytest.approx(20.0)] * 4


@pytest.mark.usefixtures("flags")
def test_where_nothing_is_trained_nothing_is_remembered(tmp_path: Path) -> None:
    config = TrainConfig.from_flat(loss="global")
    made = objective_of(create(str(tmp_path / "tiny.json")).model, config)
    assert type(made) is ClipObjective and made.memory is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--global-rho 3", "--global-rho is for --loss global; leave it out"),
        ("--loss global --global-variant v2", "'v2', a temperature for each sample, is not supp"),
        ("--loss global --global-variant v5", "variant is 'v5'; use one of sogclr, v1, v3"),
        (
            "--loss global --global-variant sogclr --global-gamma-epochs 3",
            "--global-gamma-epochs is for v1, v3, not sogclr; leave it out",
        ),
        ("--loss global --global-full-first-epoch", "is for sogclr, not v3"),
        ("--loss global --global-gamma 0", "gamma is 0.0; give a number in (0, 1]"),
        ("--loss global --global-rho -1", "rho is -1.0; give a number of at least 0"),
        ("--loss global --global-gamma-epochs 0", "--global-gamma-epochs is 0; give a positive"),
        ("--loss global --global-temperature 2", "--global-temperature is 2.0; give one from 0.01"),
        ("--loss global --siglip", "--loss global does not go with --siglip; leave one of them"),
        ("--loss global --objective slip", "does not go with --objective slip"),
        ("--loss global --hard-negatives 1", "does not go with --hard-negatives"),
        ("--loss global --label-smoothing 0.1", "does not go with --label-smoothing"),
        ("--loss global --global-temperature-lr 0.1 --lr 0", "the schedule of --lr, which is 0"),
    ],
)
def test_what_cannot_be_is_refused(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(flags.split())
