"""FSDP2 on gloo ranks against plain data-parallel training, from engine to engine."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import normalize

from fastclip.functional import clip_loss
from fastclip.models import checkpoint, sharded
from fastclip.models.build import build
from fastclip.models.clip import create
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World
from fastclip.train.fsdp import FSDPEngine
from fastclip.train.health import NonFiniteError
from fastclip.train.select_engine import build_engine
from fastclip.train.wrapped import accumulate_wrapped
from tests.models.language import make_language_model
from tests.processes import on_ranks
from tests.train.conftest import TINY_MODEL
from tests.train.teachers import make_teachers, stored_teacher

STEPS = 50
MORE_STEPS = 5
BATCH = 8
MICRO_BATCHES = 4
RATE = 1e-3
# float32 sums in another order: 50 steps of them
SAME = 1e-5
SAVED = "step_00000050"

TINY_RESNET = {
    **TINY_MODEL,
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "text_cfg": {**TINY_MODEL["text_cfg"]},
}


def run(folder: Path, ranks: int, part: Callable[[Path, World], dict[str, Any]]) -> dict[str, Any]:
    """A part on so many ranks; what it found on the first, also on the disk as its name."""
    on_ranks(_work, (str(folder), ranks, part), ranks)
    return torch.load(folder / f"{part.__name__}.pt")


def _work(rank: int, folder: str, ranks: int, part: Callable[..., dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    here = World(rank, ranks, torch.device("cpu"))
    if ranks > 1:
        store = dist.FileStore(f"{folder}/{part.__name__}.store", ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    found = part(Path(folder), here)
    if here.is_first:
        torch.save(found, f"{folder}/{part.__name__}.pt")
    here.barrier()
    dist.destroy_process_group()


def make(folder: Path, here: World, fsdp: bool = True, model: str = "tiny", **flags: Any) -> Any:
    torch.manual_seed(0)
    # clips every step
    flags = {"precision": "fp32", "grad_clip_norm": 0.5, "batch_size": BATCH, "wd": 0.1, **flags}
    config = TrainConfig.from_flat(model=str(folder / f"{model}.json"), fsdp=fsdp, **flags)
    built = build(config.model.model, config.model, here.device)
    built.model.to(memory_format=torch.channels_last)
    return build_engine(built, config, here, samples=2 * BATCH)


def make_combined(folder: Path, here: World, fsdp: bool = True) -> Any:
    """All at once: a stored teacher, groups of duplicates, micro-batches and an average."""
    size = 2 * BATCH // (here.size * MICRO_BATCHES)
    micro = {"batch_size": size, "accum_freq": MICRO_BATCHES}
    flags = {**stored_teacher(folder), **micro, "group_duplicates": "excluded", "ema": 0.9}
    return make(folder, here, fsdp, **flags)


def combined_steps(engine: Any, here: World, first: int, last: int) -> list[float]:
    return steps(engine, here, first, last, cuts=MICRO_BATCHES, groups=5)


def batches(
    step: int, here: World, cuts: int = 1, size: int = 16, tokens: int = 49_000, groups: int = 0
) -> list[dict[str, Any]]:
    """A step's samples, 16 over all ranks, in this rank's micro-batches."""
    stream = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (2 * BATCH, 3, size, size), generator=stream, dtype=torch.uint8)
    texts = torch.randint(1, tokens, (2 * BATCH, 12), generator=stream)
    index = torch.randperm(2 * BATCH, generator=stream)
    own = slice(here.rank * len(images) // here.size, (here.rank + 1) * len(images) // here.size)
    parts = zip(*(t[own].chunk(cuts) for t in (images, texts, index)), strict=True)
    made = [
        {"images": [i], "texts": [t], "index": at, "key": [str(step)] * len(t)}
        for i, t, at in parts
    ]
    # duplicates on one rank and on two
    return [{**each, "group": each["index"] % groups} for each in made] if groups else made


def steps(engine: Any, here: World, first: int, last: int, **batch: int) -> list[float]:
    losses = []
    for step in range(first, last):
        losses.append(engine.backward(batches(step, here, **batch)).item())
        engine.update(RATE)
    return losses


def equal(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_equal_data_parallel_and_resume(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    (tmp_path / "resnet.json").write_text(json.dumps(TINY_RESNET))
    make_language_model(tmp_path / "lm", "llama")
    make_teachers(tmp_path, 2 * BATCH)
    result = run(tmp_path, 2, train_part)
    saved = tmp_path / SAVED
    assert sharded.verify(saved)
    # each rank its own
    assert sorted(p.name[:4] for p in saved.glob("__*")) == ["__0_", "__1_"]
    assert result["fsdp"] == pytest.approx(result["plain"], rel=SAME)
    assert result["accumulated"] == pytest.approx(result["plain"][:5], rel=SAME)
    for other in ("resnet", "language"):
        assert result[other][0] == pytest.approx(result[other][1], rel=SAME), other
    assert result["combined"] == pytest.approx(result["combined_plain"], rel=SAME)
    ours, theirs = result["amp_bf16"]
    assert ours == pytest.approx(theirs, rel=0.02) and ours != theirs
    ours, theirs = result["amp"]
    # then it looks for its loss scale
    assert ours[0] == pytest.approx(theirs[0], rel=0.002)

    expected = create(str(tmp_path / "tiny.json")).model.state_dict()
    exported = checkpoint.read_weights(saved)
    assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in expected.items()}
    assert equal(exported, result["at_50"])
    assert equal(checkpoint.read_weights(saved, average=True), result["averaged"])
    for name, value in result["plain_average"].items():
        torch.testing.assert_close(result["averaged"][name], value, rtol=1e-3, atol=1e-5)

    # two ranks to one and back
    one = run(tmp_path, 1, alone_part)
    back = run(tmp_path, 2, resume_part)
    assert equal(back["resumed"], result["at_55"])
    assert equal(one["start"], result["at_50"]) and equal(back["start"], result["at_50"])
    assert equal(one["average"], result["averaged"])
    assert one["losses"] == pytest.approx(result["next"], rel=SAME)
    assert back["losses"] == pytest.approx(result["next"], rel=SAME)
    assert one["combined"] == pytest.approx(result["combined"][3:], rel=SAME)
    assert back["combined"] == result["combined"][3:]


@pytest.mark.slow
@pytest.mark.dist
def test_compiled_blocks_equal_data_parallel(tmp_path: Path) -> None:
    """Their graphs, whatever is made of them: a backend that generates code takes minutes."""
    parts = {"vision_cfg", "text_cfg"}
    model = {k: {**v, "layers": 3} if k in parts else v for k, v in TINY_MODEL.items()}
    (tmp_path / "tiny.json").write_text(json.dumps(model))
    result = run(tmp_path, 2, compiled_part)
    assert result["compiled"] == pytest.approx(result["plain"], rel=SAME)
    # one for the blocks of each tower, forward and backward traced together
    assert result["graphs"] == 2
    ours, theirs = result["amp_bf16"]
    assert ours == pytest.approx(theirs, rel=0.02)


def compiled_part(folder: Path, here: World) -> dict[str, Any]:
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    found: dict[str, Any] = {"plain": steps(make(folder, here, fsdp=False), here, 0, 10)}
    found["compiled"] = steps(make(folder, here, torchcompile=True), here, 0, 10)
    found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    low = {"precision": "amp_bf16"}
    found["amp_bf16"] = [
        steps(make(folder, here, fsdp, torchcompile=fsdp, **low), here, 0, 3)
        for fsdp in (True, False)
    ]
    return found


class Tower(torch.nn.Module):
    """Of somebody's own loop; the scale leaves the forward, where it is whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.scale = torch.nn.Linear(8, 4), torch.nn.Parameter(torch.ones(1))

    def forward(self, pairs: Tensor) -> dict[str, Tensor]:
        images, texts = normalize(self.layer(pairs), dim=-1).unbind(1)
        return {"images": images, "texts": texts, "logit_scale": self.scale.exp()}


def check_own_loops(here: World) -> None:
    """Two micro-batches on each rank give the gradient of one batch of all."""
    rows = torch.randn(16, 2, 8, generator=torch.Generator().manual_seed(3))
    alone = Tower()
    clip_loss(*alone(rows).values()).backward()
    for wrap in (torch.nn.parallel.DistributedDataParallel, fully_shard):
        tower = Tower()
        wrapped = wrap(tower)
        loss = accumulate_wrapped(
            wrapped,
            wrapped,
            rows.chunk(here.size)[here.rank].chunk(2),
            lambda output: clip_loss(*output.values(), dist="gather"),
        )
        assert loss.item() == pytest.approx(clip_loss(*alone(rows).values()).item(), rel=SAME)
        for own, expected in zip(tower.parameters(), alone.parameters(), strict=True):
            gradient = own.grad.full_tensor() if wrap is fully_shard else own.grad
            torch.testing.assert_close(gradient, expected.grad, rtol=1e-5, atol=1e-6)


def train_part(folder: Path, here: World) -> dict[str, Any]:
    check_own_loops(here)
    result: dict[str, Any] = {}
    plain = make(folder, here, fsdp=False, ema=0.9)
    result["plain"] = steps(plain, here, 0, STEPS)
    result["plain_average"] = plain.average.state_dict()
    engine = make(folder, here, ema=0.9)
    assert isinstance(engine, FSDPEngine)
    result["fsdp"] = steps(engine, here, 0, STEPS)
    assert engine.norm.item() == pytest.approx(plain.norm.item(), rel=1e-4)
    assert engine.norm.item() > 0.5, "nothing was clipped"
    assert engine.logit_scale == pytest.approx(plain.logit_scale, rel=SAME)
    held = sum(rows.numel() for rows in engine._rows.values())
    assert held == pytest.approx(sum(p.numel() for p in plain.parameters) / 2, rel=0.01)
    result["at_50"], result["averaged"] = engine.weights(), engine.averaged_weights()
    engine.save(folder / SAVED, {"step": STEPS})
    check_full_disk(engine, folder, here)
    result["next"] = steps(engine, here, STEPS, STEPS + MORE_STEPS)
    result["at_55"] = engine.weights()

    micro = {"batch_size": BATCH // MICRO_BATCHES, "accum_freq": MICRO_BATCHES}
    engine = make(folder, here, grad_checkpointing=True, **micro)
    result["accumulated"] = steps(engine, here, 0, 5, cuts=MICRO_BATCHES)
    check_non_finite(engine, here)
    engine = make_combined(folder, here)
    result["combined"] = combined_steps(engine, here, 0, 3)
    engine.save(folder / "combined", {"step": 3})
    result["combined"] += combined_steps(engine, here, 3, 6)
    plain = make_combined(folder, here, fsdp=False)
    result["combined_plain"] = combined_steps(plain, here, 0, 6)
    for name, flags, batch in (
        ("resnet", {"model": "resnet"}, {"size": 32}),
        ("language", {"text_lm": str(folder / "lm"), "text_lm_unfrozen": 2}, {"tokens": 9}),
    ):
        result[name] = [
            steps(make(folder, here, fsdp, **flags), here, 0, 5, **batch) for fsdp in (True, False)
        ]
    for precision in ("amp_bf16", "amp"):
        pair = [make(folder, here, fsdp, precision=precision) for fsdp in (True, False)]
        result[precision] = [steps(each, here, 0, 4) for each in pair]
        check_scale(pair[0], here)
    return result


def check_full_disk(engine: Any, folder: Path, here: World) -> None:
    before = sorted(p.name for p in folder.rglob("*"))
    here.barrier()
    write = dcp.FileSystemWriter.write_data

    def full(*arguments: Any) -> Any:
        if here.rank == 1:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    dcp.FileSystemWriter.write_data = full
    try:
        with pytest.raises(OSError, match=r"rank 1: .*No space left"):
            engine.save(folder / "step_00000051", {"step": STEPS + 1})
    finally:
        dcp.FileSystemWriter.write_data = write
    here.barrier()
    assert sorted(p.name for p in folder.rglob("*")) == before
    assert sharded.verify(folder / SAVED)


def check_non_finite(engine: Any, here: World) -> None:
    before, whole_loss = engine.weights(), engine._whole_loss
    engine._whole_loss = lambda output: whole_loss(output) * (math.nan if here.rank else 1)
    with pytest.raises(NonFiniteError, match=r"gradient of '.*No parameter was changed"):
        engine.backward(batches(99, here, MICRO_BATCHES))
    assert equal(before, engine.weights())


def check_scale(engine: Any, here: World) -> None:
    """A huge rate would take the logit scale far beyond its range."""
    used, whole_loss, exact = [], engine._whole_loss, engine.logit_scale
    engine._whole_loss = lambda output: used.append(output["logit_scale"]) or whole_loss(output)
    for step in range(20):
        before = engine.skipped
        engine.backward(batches(step, here))
        engine.update(100.0)
        if engine.skipped == before:
            break
    assert used[0].dtype == torch.float32 and used[0].item() == pytest.approx(exact, rel=1e-6)
    assert engine.logit_scale in (pytest.approx(1), pytest.approx(100))


def alone_part(folder: Path, here: World) -> dict[str, Any]:
    engine = make(folder, here, batch_size=2 * BATCH, ema=0.9)
    with pytest.raises(ValueError, match="without --fsdp; resume without it, or begin with"):
        engine.load(folder / "epoch_1.pt", {"state_dict": {}})
    other = make(folder, here, model="resnet")
    with pytest.raises(ValueError, match=r"is not of model .*resnet.json: its parameters differ"):
        other.load(folder / SAVED, sharded.read_training(folder / SAVED))
    engine.load(folder / SAVED, sharded.read_training(folder / SAVED))
    engine.save(folder / "one", {"step": STEPS})
    result = {"start": engine.weights(), "average": engine.averaged_weights()}
    result["losses"] = steps(engine, here, STEPS, STEPS + MORE_STEPS)
    return {**result, "combined": resumed_combined(folder, here)}


def resumed_combined(folder: Path, here: World) -> list[float]:
    engine = make_combined(folder, here)
    engine.load(folder / "combined", sharded.read_training(folder / "combined"))
    return combined_steps(engine, here, 3, 6)


def resume_part(folder: Path, here: World) -> dict[str, Any]:
    engine = make(folder, here)
    engine.load(folder / SAVED, sharded.read_training(folder / SAVED))
    steps(engine, here, STEPS, STEPS + MORE_STEPS)
    result = {"resumed": engine.weights()}
    engine = make(folder, here)
    engine.load(folder / "one", sharded.read_training(folder / "one"))
    result["start"] = engine.weights()
    result["losses"] = steps(engine, here, STEPS, STEPS + MORE_STEPS)
    return {**result, "combined": resumed_combined(folder, here)}
