"""DeepSpeed's three stages on two gloo ranks, against plain data-parallel training.

Its launcher is in `test_zero_kill.py`.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.models import checkpoint, sharded
from fastclip.models.clip import create
from fastclip.train import sharded_checkpoint
from fastclip.train.config import TrainConfig
from fastclip.train.distributed import World, world
from fastclip.train.health import NonFiniteError
from fastclip.train.torch_engine import TorchEngine
from fastclip.train.zero_config import resolve
from tests.processes import finish, start_ranks
from tests.train.conftest import TINY_MODEL
from tests.train.teachers import live_teacher, make_teachers, stored_teacher

STEPS = 50
MORE_STEPS = 5
BATCH = 8
MICRO_BATCHES = 4
MICRO = {"batch_size": BATCH // MICRO_BATCHES, "accum_freq": MICRO_BATCHES}
RATE = 1e-3
# float32 sums in another order: 50 steps of them
SAME = 1e-5


def launch(stage: int, part: str, folder: Path, ranks: int) -> None:
    """Run a part of the work on some ranks."""
    finish(start_ranks(ranks, work, stage, part, folder))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stage_equals_data_parallel_and_resumes(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    make_teachers(tmp_path, 2 * BATCH)
    launch(stage, "train", tmp_path, 2)
    saved = tmp_path / "step_00000050"
    assert sharded.verify(saved)
    # DeepSpeed's script that loads pickles
    assert not [*tmp_path.rglob("zero_to_fp32.py")]
    result = torch.load(tmp_path / "train.pt")
    if not has_float16():
        print("float16 is left out: DeepSpeed does not support it on this processor")
    assert result["zero"] == pytest.approx(result["plain"], rel=SAME)
    assert result["accumulated"] == pytest.approx(result["plain"][:5], rel=SAME)
    for teacher, (ours, theirs) in result["distilled"].items():
        assert ours == pytest.approx(theirs, rel=0.02 if teacher == "rounded" else SAME), teacher
    # the term is there
    assert result["distilled"]["live"][1][0] > result["plain"][0] + 0.1
    exported = sharded.export(saved)
    expected = create(str(tmp_path / "tiny.json")).model.state_dict()
    assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in expected.items()}
    assert all(torch.equal(exported[name], result["at_50"][name]) for name in expected)

    # two ranks to one and back
    launch(stage, "alone", tmp_path, 1)
    launch(stage, "resume", tmp_path, 2)
    result |= torch.load(tmp_path / "resume.pt")
    assert all(torch.equal(result["at_55"][n], result["resumed"][n]) for n in expected)
    for ranks in ("one", "back"):
        start, losses = result[f"start_{ranks}"], result[f"losses_{ranks}"]
        assert all(torch.equal(start[name], result["at_50"][name]) for name in expected)
        assert losses == pytest.approx(result["next"], rel=SAME), ranks
    universal = sharded.export(tmp_path / "universal")
    assert all(torch.equal(universal[name], result["at_50"][name]) for name in expected)
    assert sharded.verify(tmp_path / "universal")

    file = next(saved.glob("*optim_states.pt"))
    file.write_bytes(file.read_bytes()[:-1])
    assert not sharded.verify(saved)


def distilled(stage: int, folder: Path, here: World) -> dict[str, list[list[float]]]:
    """By teacher the losses of this stage, and those without ZeRO."""
    found: dict[str, list[list[float]]] = {}
    stored = {**stored_teacher(folder), "group_duplicates": "excluded"}
    kinds = {
        # in micro-batches
        "live": {**live_teacher(folder), **MICRO},
        "stored": stored,
        "rounded": {**stored, "precision": "amp_bf16"},
    }
    for name, flags in kinds.items():
        asked = {"cuts": flags.get("accum_freq", 1), "grouped": "group_duplicates" in flags}
        found[name] = [
            steps(make(kind, folder, here, **flags), here, 0, 5, **asked) for kind in (stage, 0)
        ]
    return found


def make(stage: int, folder: Path, here: World, **flags: Any) -> Any:
    from fastclip.train.zero import DeepSpeedEngine

    torch.manual_seed(0)
    name = str(folder / "tiny.json")
    # clips every step
    flags = {
        "deepspeed": stage > 0,
        "precision": "fp32",
        "grad_clip_norm": 0.5,
        "batch_size": BATCH,
        "wd": 0.1,
        **flags,
    }
    config = TrainConfig.from_flat(
        model=name, deepspeed_config=f"ds_zero{stage}" if stage else None, **flags
    )
    model = create(name, here.device)
    model.model.to(memory_format=torch.channels_last)
    return (DeepSpeedEngine if stage else TorchEngine)(model, config, here, samples=2 * BATCH)


def batches(
    step: int, here: World, cuts: int = 1, *, grouped: bool = False
) -> list[dict[str, Any]]:
    """A step's samples, 16 over all ranks, in this rank's micro-batches."""
    stream = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (2 * BATCH, 3, 16, 16), generator=stream, dtype=torch.uint8)
    texts = torch.randint(1, 49000, (2 * BATCH, 12), generator=stream)
    index = torch.randperm(2 * BATCH, generator=stream)
    own = slice(here.rank * len(images) // here.size, (here.rank + 1) * len(images) // here.size)
    parts = zip(*(t[own].chunk(cuts) for t in (images, texts, index)), strict=True)
    made = [
        {"images": [i], "texts": [t], "index": at, "key": [str(step)] * len(t)}
        for i, t, at in parts
    ]
    # duplicates on one rank and on two
    return [{**each, "group": each["index"] % 5} if grouped else each for each in made]


def steps(engine: Any, here: World, first: int, last: int, cuts: int = 1, **asked: Any) -> Any:
    losses = []
    for step in range(first, last):
        losses.append(engine.backward(batches(step, here, cuts, **asked)).item())
        engine.update(RATE)
    return losses


def train_part(stage: int, folder: Path, here: World) -> dict[str, Any]:
    result: dict[str, Any] = {}
    plain = make(0, folder, here)
    result["plain"] = steps(plain, here, 0, STEPS)
    engine = make(stage, folder, here)
    result["zero"] = steps(engine, here, 0, STEPS)
    assert engine.norm.item() == pytest.approx(plain.norm.item(), rel=1e-4)
    assert engine.norm.item() > 0.5, "nothing was clipped"
    result["at_50"] = engine.weights()
    engine.save(folder / "step_00000050", {"step": STEPS})
    check_full_disk(engine, folder, here)
    result["next"] = steps(engine, here, STEPS, STEPS + MORE_STEPS)
    result["at_55"] = engine.weights()

    engine = make(stage, folder, here, grad_checkpointing=True, **MICRO)
    result["accumulated"] = steps(engine, here, 0, 5, MICRO_BATCHES)
    result["distilled"] = distilled(stage, folder, here)
    check_non_finite(engine, here)
    engine._engine.gradient_accumulation_steps = lambda: 2
    with pytest.raises(ValueError, match="has gradient_accumulation_steps 2, and would divide"):
        engine.backward(batches(0, here, MICRO_BATCHES))
    for precision in ("fp32", "amp_bf16", *(["amp"] if has_float16() else [])):
        check_scale(make(stage, folder, here, precision=precision), here)
    return result


def has_float16() -> bool:
    """Whether DeepSpeed takes float16 on this device: CPUs need AVX512-FP16 or AMX for it."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().is_fp16_supported()


def check_full_disk(engine: Any, folder: Path, here: World) -> None:
    before = sorted(p.name for p in folder.rglob("*"))
    here.barrier()
    write = torch.save

    def full(content: Any, file: Any, **options: Any) -> None:
        if here.rank == 1 and "optim_states" in str(file):
            raise OSError(28, "No space left on device")
        write(content, file, **options)

    torch.save = full
    try:
        with pytest.raises(OSError, match=r"rank 1: .*No space left"):
            engine.save(folder / "step_00000051", {"step": STEPS + 1})
    finally:
        torch.save = write
    here.barrier()
    assert sorted(p.name for p in folder.rglob("*")) == before
    assert sharded.verify(folder / "step_00000050")


def check_non_finite(engine: Any, here: World) -> None:
    before, whole_loss = engine.weights(), engine._whole_loss
    engine._whole_loss = lambda output: whole_loss(output) * (math.nan if here.rank else 1)
    with pytest.raises(NonFiniteError, match="No parameter was changed"):
        engine.backward(batches(99, here, MICRO_BATCHES))
    after = engine.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


def check_scale(engine: Any, here: World) -> None:
    """A huge rate would take the logit scale far beyond its range."""
    from deepspeed.utils import safe_get_full_fp32_param

    parameter = engine.model.get_parameter("logit_scale")
    used, whole_loss, exact = [], engine._whole_loss, engine.logit_scale
    engine._whole_loss = lambda output: used.append(output["logit_scale"]) or whole_loss(output)
    for step in range(20):
        before = engine.skipped
        engine.backward(batches(step, here))
        engine.update(100.0)
        if engine.skipped == before:
            break
    # the loss sees the float32 parameter, not what the towers' precision makes of it
    assert used[0].dtype == torch.float32
    assert used[0].item() == pytest.approx(exact, rel=1e-6)
    # float16 first overflows until it has found its loss scale
    assert engine.skipped == step
    master = safe_get_full_fp32_param(parameter).item()
    assert master in (0.0, pytest.approx(math.log(100), rel=1e-3))
    assert master <= torch.tensor(math.log(100)).item()
    assert engine.logit_scale == pytest.approx(math.exp(master), rel=1e-6)


def alone_part(stage: int, folder: Path, here: World) -> dict[str, Any]:
    saved = folder / "step_00000050"
    engine = make(stage, folder, here, batch_size=2 * BATCH)
    engine.load(saved, sharded.read_training(saved))
    sharded.to_universal(saved, folder / "universal")
    engine.save(folder / "one", {"step": STEPS})
    return {"start_one": engine.weights(), "losses_one": more(engine, here)}


def resume_part(stage: int, folder: Path, here: World) -> dict[str, Any]:
    engine = make(stage, folder, here)
    saved = folder / "step_00000050"
    # what a file says of folders counts for nothing
    content = {**sharded.read_training(saved), "folder": str(folder / "elsewhere")}
    engine.load(saved, content)
    more(engine, here)
    result = {"resumed": engine.weights(), **torch.load(folder / "alone.pt")}
    engine = make(stage, folder, here)
    engine.load(folder / "one", sharded.read_training(folder / "one"))
    return {**result, "start_back": engine.weights(), "losses_back": more(engine, here)}


def more(engine: Any, here: World) -> list[float]:
    return steps(engine, here, STEPS, STEPS + MORE_STEPS)


@pytest.fixture
def config_file(tmp_path: Path) -> Any:
    def write(**content: Any) -> str:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **content}))
        return str(path)

    return write


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_files_take_the_flags(stage: int) -> None:
    config = TrainConfig.from_flat(batch_size=8, precision="amp_bf16", grad_clip_norm=1.5)
    settings = resolve(f"ds_zero{stage}", config, micro_batches=4, world_size=2)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["bf16"]["enabled"] and not settings["fp16"]["enabled"]
    assert settings["gradient_clipping"] == 1.5
    # one micro-batch a step is what DeepSpeed sees
    assert settings["gradient_accumulation_steps"] == 1
    assert settings["train_micro_batch_size_per_gpu"] == 32
    assert settings["train_batch_size"] == 64
    assert "auto" not in json.dumps(settings)


@pytest.mark.parametrize("size", [1, 3])
def test_convolutions_in_channels_last_can_be_viewed_as_bytes(size: int) -> None:
    """As DeepSpeed does; 1x1 ones count as contiguous in any strides."""
    from fastclip.train.zero import _make_viewable

    layer = torch.nn.Conv2d(3, 4, size).to(memory_format=torch.channels_last)
    weight = layer.weight.detach().clone()
    _make_viewable(layer)
    assert layer.weight.data.view(torch.uint8).numel() == 4 * weight.numel()
    assert torch.equal(layer.weight, weight)


def test_stage_1_is_the_default() -> None:
    assert resolve(None, TrainConfig())["zero_optimization"]["stage"] == 1


def test_a_file_in_the_style_of_others_is_understood(config_file: Any) -> None:
    betas = {"lr": "auto", "betas": [0.9, 0.98], "eps": "auto", "weight_decay": "auto"}
    path = config_file(
        optimizer={"type": "AdamW", "params": betas},
        zero_optimization={"stage": 2, "reduce_bucket_size": "auto"},
        train_batch_size="auto",
    )
    settings = resolve(path, TrainConfig())
    assert "optimizer" not in settings
    assert settings["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "stage is 0; give 1, 2 or 3"),
        ({"train_micro_batch_size_per_gpu": 7}, "is 7 but --batch-size gives 128"),
        ({"train_batch_size": 7}, "is 7 but --batch-size, --accum-freq and the number"),
        ({"gradient_accumulation_steps": 3}, "is 3 but --accum-freq gives 1"),
        ({"gradient_clipping": 1.0}, "is 1.0 but --grad-clip-norm gives 0.0"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true but --precision gives false"),
        ({"scheduler": {"type": "WarmupLR"}}, "--lr-scheduler, --warmup"),
        ({"optimizer": {"type": "Lamb"}}, "fastclip's own AdamW is used"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "lr is 1 but --lr gives 0.0005"),
        ({"wall_clock_breakdown": "auto"}, 'wall_clock_breakdown is "auto", which nothing fills'),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "only .cpu"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled is true"),
        ({"bf16": True}, "bf16 is true; give an object"),
        ({"optimizer": {"type": "AdamW", "params": "auto"}}, 'params is "auto"; give an object'),
    ],
)
def test_contradictions_are_refused(
    config_file: Any, content: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(config_file(**content), TrainConfig())


def test_a_missing_or_broken_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="ds_zero1, ds_zero2, ds_zero3"):
        resolve("ds_zero4", TrainConfig())
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        resolve(str(tmp_path / "bad.json"), TrainConfig())


def test_a_torn_folder_is_not_whole(tmp_path: Path) -> None:
    here = World(0, 1, torch.device("cpu"))
    path = tmp_path / "step_00000007"

    def share(folder: Path) -> list[Path]:
        torch.save({"a": torch.ones(3)}, folder / "part.pt")
        return [folder / "part.pt"]

    sharded_checkpoint.write(path, {"step": 7}, here, share)
    assert sharded.verify(path)
    assert checkpoint.step_of(path) == 7
    assert sharded.read_training(path)["step"] == 7
    (path / "extra.pt").write_bytes(b"")
    assert not sharded.verify(path)
    (path / "extra.pt").unlink()
    path.with_suffix(".json").unlink()
    assert not sharded.verify(path)


def work(stage: int, part: str, folder: Path) -> None:
    """What a part found, in a file of its name."""
    do = {"train": train_part, "alone": alone_part, "resume": resume_part}[part]
    with world("cpu") as here:
        found = do(stage, folder, here)
        if here.is_first:
            torch.save(found, folder / f"{part}.pt")
        here.barrier()
