"""Systems in training: micro-batches, ranks, ZeRO and resuming leave the numbers as they are."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastclip
from fastclip.cli import main
from fastclip.models import checkpoint
from fastclip.models.build import build
from fastclip.models.clip import load_weights
from fastclip.models.system import System
from fastclip.train.config import TrainConfig, parse
from fastclip.train.distributed import World, world
from fastclip.train.loop import train
from fastclip.train.torch_engine import TorchEngine
from tests.processes import finish, start_ranks
from tests.train.conftest import TINY_MODEL

BATCH = 8
STEPS = 4
RATE = 1e-3
COMMON: dict[str, Any] = {"grad_clip_norm": 0.5, "wd": 0.1}
PROJECTED = {**COMMON, "projector_hidden": 12, "projector_width": 8}
CROSSED = {**COMMON, "strong_views": 1, "head_hidden": 12}
SYSTEMS = {
    "uniclip": {**COMMON, "strong_views": 1},
    "byolip": {**CROSSED, **PROJECTED, "label_smoothing": 0.1},
    "rocket": CROSSED,
    "slip": PROJECTED,
    "siamlip": {**CROSSED, **PROJECTED},
    "barlip": {**CROSSED, **PROJECTED},
    "swalip": {**COMMON, "head_hidden": 12},
    "simclr": PROJECTED,
    "classify": COMMON,
    # with false captions
    "clip": {**COMMON, "hard_negatives": 2},
}
# those that also go through ZeRO-3, bfloat16 and a resumed run
THOROUGH = ("uniclip", "byolip")
CLASSES = ["red", "green", "blue"]
# sums in another order, through a few updates
SAME_DOUBLE, SAME_FLOAT = 1e-12, 1e-5


def make(objective: str, folder: Path, here: World, double: bool, **flags: Any) -> Any:
    """An engine in float64 or float32."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"batch_size": BATCH, "precision": "fp32", **SYSTEMS[objective]}
    config = TrainConfig.from_flat(
        model=str(folder / "tiny.json"), objective=objective, **{**options, **flags}
    )
    classes = CLASSES if objective == "classify" else []
    model = build(config.model.model, config.model, here.device, classes=classes)
    # the residual blocks begin at zero, behind which nothing has a gradient yet
    for name, parameter in model.model.named_parameters():
        if ".leave." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if double:
        model.model.double()
    if config.distributed.deepspeed:
        from fastclip.train.zero import DeepSpeedEngine

        return DeepSpeedEngine(model, config, here)
    if config.distributed.fsdp:
        from fastclip.train.fsdp import FSDPEngine

        return FSDPEngine(model, config, here)
    engine = TorchEngine(model, config, here)
    if double:
        engine._mean, engine._std = engine._mean.double(), engine._std.double()
    return engine


def batches(step: int, here: World, cuts: int, model: Any) -> list[dict[str, Any]]:
    """A step's samples, 16 over all ranks, in this rank's micro-batches."""
    stream = torch.Generator().manual_seed(step)
    views, texts = getattr(model, "image_views", 1), getattr(model, "text_views", 1)
    images = torch.randint(0, 256, (views, 2 * BATCH, 3, 16, 16), generator=stream).byte()
    tokens = torch.randint(1, 49_000, (texts, 2 * BATCH, 12), generator=stream)
    params = torch.rand(2 * BATCH, views, 18, generator=stream)
    negatives = torch.randint(1, 49_000, (2 * BATCH, 2, 12), generator=stream)
    label = torch.randint(-1, len(CLASSES), (2 * BATCH,), generator=stream)
    first, share = here.rank * 2 * BATCH // here.size, 2 * BATCH // here.size
    size = share // cuts
    parts = (slice(start, start + size) for start in range(first, first + share, size))
    return [
        {
            "images": list(images[:, part]),
            "texts": list(tokens[:, part]),
            "params": params[part],
            "label": label[part],
            **({} if isinstance(model, System) else {"negatives": negatives[part]}),
            "key": ["sample"] * size,
        }
        for part in parts
    ]


def steps(engine: Any, here: World, cuts: int = 1, count: int = STEPS) -> list[float]:
    losses = []
    for step in range(count):
        losses.append(engine.backward(batches(step, here, cuts, engine.model)).item())
        engine.update(RATE)
    return losses


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of any entry; batch normalization's running statistics included."""
    assert found.keys() == wanted.keys()
    return max((found[n].double() - wanted[n].double()).abs().max().item() for n in wanted)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    return tmp_path


ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("objective", SYSTEMS)
def test_micro_batches_are_the_full_batch(objective: str, folder: Path) -> None:
    whole = make(objective, folder, ALONE, True, batch_size=2 * BATCH)
    cut = make(objective, folder, ALONE, True, batch_size=BATCH // 2, accum_freq=4)
    assert steps(cut, ALONE, 4) == pytest.approx(steps(whole, ALONE), rel=SAME_DOUBLE)
    assert furthest(cut.model.state_dict(), whole.model.state_dict()) < SAME_DOUBLE
    if objective == "byolip":
        averages = cut.average.state_dict(), whole.average.state_dict()
        assert furthest(*averages) < SAME_DOUBLE
        # a teacher of its own, not the student
        assert furthest(averages[0], cut.model.state_dict()) > 1e-4


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_and_zero_are_one_process(folder: Path) -> None:
    pytest.importorskip("deepspeed")
    finish(start_ranks(2, work, folder))
    for objective in SYSTEMS:
        found = torch.load(folder / f"{objective}.pt")
        alone = make(objective, folder, ALONE, True, batch_size=2 * BATCH)
        losses = steps(alone, ALONE)
        assert found["ranks"] == pytest.approx(losses, rel=SAME_DOUBLE)
        assert furthest(found["weights"], alone.model.state_dict()) < SAME_DOUBLE
        plain = make(objective, folder, ALONE, False, batch_size=2 * BATCH)
        losses = steps(plain, ALONE)
        for stage in found["zero"]:
            assert found["zero"][stage] == pytest.approx(losses, rel=SAME_FLOAT), stage
        if objective != "byolip":
            assert found["fsdp"] == pytest.approx(losses, rel=SAME_FLOAT)
        assert 2 in found["zero"] and (3 in found["zero"]) == (objective == "uniclip")
        if objective not in THOROUGH:
            continue
        # bfloat16 towers: two decimals
        assert found["rounded"] == pytest.approx(losses, rel=0.05)
        # with float32 scales, held in their bounds at a rate that throws them far out
        exact, used = found["scales"]
        assert used == pytest.approx(exact, rel=1e-6)
    refused = torch.load(folder / "byolip.pt")["refused"]
    assert "byolip's teacher averages whole parameters, which ZeRO-3 shards" in refused[0]
    assert "byolip's teacher is a whole model, which --fsdp has not" in refused[1]
    averaged = torch.load(folder / "byolip.pt")["average"]
    alone = make("byolip", folder, ALONE, False, batch_size=2 * BATCH)
    steps(alone, ALONE)
    assert furthest(averaged, alone.average.state_dict()) < SAME_FLOAT


def work(folder: Path) -> None:
    """What a rank finds of every system, in a file of its name."""
    with world("cpu") as here:
        for objective in SYSTEMS:
            found = work_on(objective, folder, here)
            if here.is_first:
                torch.save(found, folder / f"{objective}.pt")
        here.barrier()


def work_on(objective: str, folder: Path, here: World) -> dict[str, Any]:
    result: dict[str, Any] = {"zero": {}, "refused": []}
    engine = make(objective, folder, here, True, batch_size=BATCH // 2, accum_freq=2)
    result["ranks"] = steps(engine, here, 2)
    result["weights"] = engine.model.state_dict()
    micro = {"batch_size": BATCH // 2, "accum_freq": 2, "deepspeed": True}
    for stage in (2, 3) if objective in THOROUGH else (2,):
        sharded = {**micro, "deepspeed_config": f"ds_zero{stage}"}
        try:
            engine = make(objective, folder, here, False, **sharded)
        except ValueError as error:
            result["refused"].append(str(error))
            continue
        result["zero"][stage] = steps(engine, here, 2)
        if engine.average is not None:
            result["average"] = engine.average.state_dict()
            check_saved(engine, here, folder)
    try:
        engine = make(objective, folder, here, False, **{**micro, "deepspeed": False, "fsdp": True})
        result["fsdp"] = steps(engine, here, 2)
    except ValueError as error:
        result["refused"].append(str(error))
    if objective not in THOROUGH:
        return result
    rounded = {**micro, "deepspeed_config": "ds_zero2", "precision": "amp_bf16"}
    engine = make(objective, folder, here, False, **rounded)
    result["rounded"] = steps(engine, here, 2)
    result["scales"] = check_scales(engine, here)
    return result


def check_saved(engine: Any, here: World, folder: Path) -> None:
    """The average comes back with the checkpoint."""
    engine.save(folder / "step_00000004", {"step": STEPS})
    before = {name: value.clone() for name, value in engine.average.state_dict().items()}
    content = checkpoint.read(folder / "step_00000004")
    engine.average.load_state_dict({name: value * 0 for name, value in before.items()})
    engine.load(folder / "step_00000004", content)
    assert furthest(engine.average.state_dict(), before) == 0
    whole = engine.weights()
    if here.is_first:
        # what `fastclip.load` reads: heads and running statistics too, in their own shapes
        exported = checkpoint.read_weights(folder / "step_00000004", trust=True)
        assert furthest(exported, whole) == 0
        load_weights(build_again(folder), exported, "the export")


def build_again(folder: Path) -> System:
    config = TrainConfig.from_flat(
        model=str(folder / "tiny.json"), objective="byolip", **SYSTEMS["byolip"]
    )
    model = build(config.model.model, config.model).model
    assert isinstance(model, System)
    return model


def check_scales(engine: Any, here: World) -> tuple[list[float], list[float]]:
    """The float32 parameters, and what the loss saw of them."""
    engine.backward(batches(8, here, 2, engine.model))
    engine.update(50.0)
    names = list(engine.objective.bounds)
    exact = [engine._full(engine.model.get_parameter(name)).flatten() for name in names]
    for name, values in zip(names, exact, strict=True):
        least, greatest = engine.objective.bounds[name]
        # as bfloat16 can hold the bound
        assert least <= values.min() and values.max() <= greatest, name
    seen: list[dict[str, Tensor]] = []
    loss = engine._whole_loss
    engine._whole_loss = lambda output: seen.append(output) or loss(output)
    engine.backward(batches(9, here, 2, engine.model))
    used = [seen[0][name].flatten() for name in names]
    assert all(value.dtype == torch.float32 for value in used)
    return torch.cat(exact).tolist(), torch.cat(used).detach().tolist()


def flags_of(objective: str, train_flags: list[str]) -> list[str]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SYSTEMS[objective].items()]
    return [*train_flags, "--objective", objective, *flags]


@pytest.mark.parametrize("objective", THOROUGH)
def test_resumed_equals_uninterrupted(objective: str, train_flags: list[str]) -> None:
    flags = [*flags_of(objective, train_flags), "--save-every-steps", "6"]
    whole = train(parse([*flags, "--name", "whole"]))
    source = whole / "checkpoints" / "step_00000006.pt"
    again = train(parse([*flags, "--name", "again", "--resume", str(source)]))
    ends = [checkpoint.read(run / "checkpoints" / "epoch_2.pt") for run in (whole, again)]
    for key in ("state_dict", "state_dict_ema") if objective == "byolip" else ("state_dict",):
        assert furthest(ends[1][key], ends[0][key]) == 0, key
    # and what was saved is what is loaded
    model, _, tokenizer = fastclip.load(whole)
    assert isinstance(model, System) and not model.training
    assert furthest(model.state_dict(), ends[0]["state_dict"]) == 0
    features = model.encode_text(tokenizer(["a red square", "two circles"]), normalize=True)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    if objective == "byolip":
        average = fastclip.load(whole, average=True).model.state_dict()
        assert furthest(average, ends[0]["state_dict_ema"]) == 0


@pytest.mark.parametrize("objective", SYSTEMS)
def test_compiled_is_the_same(objective: str, folder: Path, monkeypatch: Any) -> None:
    # traced whole and differentiated by the compiler; what it would make of that is torch's
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    plain = steps(make(objective, folder, ALONE, True, batch_size=2 * BATCH), ALONE, count=2)
    monkeypatch.setattr(torch, "compile", compiler)
    engine = make(objective, folder, ALONE, True, batch_size=2 * BATCH, torchcompile=True)
    assert steps(engine, ALONE, count=2) == pytest.approx(plain, rel=SAME_DOUBLE)


def test_another_architecture_is_reported_by_names(
    train_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train(parse([*train_flags, "--name", "clip", "--epochs", "1"]))
    flags = [*flags_of("uniclip", train_flags), "--name", "clip", "--resume", "latest"]
    assert main(["train", *flags]) == 1
    message = capsys.readouterr().err
    assert "missing: criterion.augmentation_encoder.layers.0.bias" in message
    assert "38 unexpected: ln_final.bias, ln_final.weight, logit_scale, ..." in message
    with pytest.raises(ValueError, match="holds no averaged weights: its run had no --ema"):
        fastclip.load(Path(parse(train_flags).log.logs) / "clip", average=True)


def test_towers_begin_with_a_clip_run(train_flags: list[str]) -> None:
    clip = train(parse([*train_flags, "--name", "clip", "--epochs", "1"]))
    flags = [*flags_of("uniclip", train_flags), "--name", "uni", "--lr", "0", "--wd", "0"]
    run = train(parse([*flags, "--epochs", "1", "--pretrained", str(clip)]))
    begun = fastclip.load(run).model.towers.state_dict()
    assert furthest(begun, fastclip.load(clip).model.state_dict()) == 0


def test_an_average_is_evaluated_beside_the_weights(train_flags: list[str]) -> None:
    flags = [*train_flags, "--name", "a", "--ema", "0.5", "--val-data", "scenes"]
    run = train(parse(flags))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if "val/acc1" in line][-1:]
    assert {"val/loss_ema", "val/acc1_ema"} <= last.keys()
    assert last["val/loss"] != last["val/loss_ema"]
