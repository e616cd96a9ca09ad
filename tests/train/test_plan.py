"""The planner's formulas against counted things, and its choices."""

import json
import shlex
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn import functional

from fastclip.cli import main
from fastclip.cli.plan import report
from fastclip.functional import clip_loss, nt_xent_loss, siglip_loss
from fastclip.models.clip import create
from fastclip.ops import dense, kept, problem
from fastclip.ops.gemm import count_products
from fastclip.ops.problem import Options
from fastclip.train import costs
from fastclip.train.config import parse
from fastclip.train.distributed import World
from fastclip.train.footprint import Footprint, Line, as_fake, footprint, measure, sharding_of
from fastclip.train.fsdp import MOMENTS
from fastclip.train.plan import (
    USABLE,
    Plan,
    Request,
    choose,
    easier_batch,
    fewest_gpus,
    largest_batch,
    scaling_table,
)
from fastclip.train.shard import blocks_of
from tests.train.conftest import ROOT, TINY_MODEL
from tests.train.test_fsdp import batches, make, run

TINY_SHAPE, TINY_CONTEXT = (3, 16, 16), 12


@pytest.fixture
def plain_model(tmp_path: Path) -> str:
    """Path of a tiny config without anything random in its forward."""
    (tmp_path / "plain.json").write_text(json.dumps(TINY_MODEL))
    return str(tmp_path / "plain.json")


@lru_cache
def vit() -> Footprint:
    return footprint("ViT-B-16", "amp_bf16")


def meta_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return create(name, device="meta").model


def inputs(samples: int) -> tuple[Tensor, Tensor]:
    images = torch.zeros(samples, *TINY_SHAPE).to(memory_format=torch.channels_last)
    return images, torch.zeros(samples, TINY_CONTEXT, dtype=torch.long)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_need_what_real_ones_do(
    plain_model: str, precision: str, checkpointing: bool
) -> None:
    """Real tensors, and a number of samples that the line was not drawn through."""
    model = create(plain_model).model.train()
    model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
    counted = footprint(plain_model, precision)
    for samples in (32, 300):
        real = measure(model, *inputs(samples), precision)
        shapes = meta_model(plain_model)
        with FakeTensorMode():
            fake = as_fake(shapes)
            fake.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
            assert measure(fake, *inputs(samples), precision) == real
        saved, working = counted.saved[checkpointing], counted.working[checkpointing]
        assert saved(samples) == real.saved > 0
        # a peak is the greatest of several lines: the one line is near it
        assert saved(samples) + working(samples) == pytest.approx(real.peak, rel=0.03)
    if not checkpointing:
        assert counted.cast_bytes == real.casts


def test_saved_bytes_are_those_that_autograd_keeps(plain_model: str) -> None:
    """A second count, by storage, of what reaches the hooks."""
    model = create(plain_model).model.train()
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs(5))
    total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    assert output["image_features"].requires_grad
    assert measure(model, *inputs(5), "fp32").saved == total


def test_autocast_keeps_what_cuda_keeps(plain_model: str) -> None:
    """CUDA's own autocast, forward on fake tensors; both with attention that materializes."""
    shapes = meta_model(plain_model)
    with FakeTensorMode(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        model = as_fake(shapes)
        saved = [measure(model, *inputs(n), "amp_bf16").saved for n in (2, 4)]
        ours = (saved[1] - saved[0]) // 2
        for tensors in (t for m in model.modules() for t in (m._parameters, m._buffers)):
            for key, tensor in tensors.items():
                if tensor is not None:
                    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    tensors[key] = nn.Parameter(moved) if tensor.requires_grad else moved
        saved = []
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            for n in (2, 4):
                kept: dict[int, Tensor] = {}

                def pack(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
                    kept[tensor.untyped_storage()._cdata] = tensor
                    return tensor

                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    output = model(*(tensor.cuda() for tensor in inputs(n)))
                saved.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
                del output
                torch.clear_autocast_cache()
        finally:
            torch.set_autocast_enabled("cuda", False)
    cuda = (saved[1] - saved[0]) // 2
    assert ours == pytest.approx(cuda, rel=0.02)


def test_parameters_width_and_flop_of_a_real_model(plain_model: str) -> None:
    counted, model = footprint(plain_model, "fp32"), create(plain_model).model
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert counted.width == TINY_MODEL["embed_dim"]
    assert counted.input_bytes == 3 * 16 * 16 + 8 * 12
    assert not counted.has_batch_norm
    # a block: four projections, two of the MLP with four times the width, attention
    patches, context, width = 5, 12, 16
    blocks = sum(2 * 12 * t * width**2 + 4 * t**2 * width for t in (patches, context))
    ends = 2 * 4 * (3 * 8 * 8) * width + 2 * 2 * width * 16
    assert counted.forward_flop == blocks + ends


@pytest.mark.parametrize("keep_bytes", [0, None])
@pytest.mark.parametrize("loss", ["clip", "siglip", "symmetric"])
def test_products_of_the_loss(loss: str, keep_bytes: int | None) -> None:
    n, width = 512, 32
    x, y = (functional.normalize(torch.randn(n, width), dim=1).requires_grad_() for _ in range(2))
    budget = {} if loss == "siglip" else {"keep_bytes": keep_bytes}
    scale = torch.tensor(10.0, requires_grad=True)
    # the batches that are planned are larger than those of a whole S
    with count_products() as count, dense.switched_off():
        if loss == "symmetric":
            nt_xent_loss(x, y, 1 / scale, chunk_bytes=1 << 14, **budget).backward()
        else:
            {"clip": clip_loss, "siglip": siglip_loss}[loss](x, y, scale, **budget).backward()
    once = keep_bytes is None
    if loss == "symmetric":
        # tiles on the diagonal are whole, so that the floor is come near to
        floor = costs.loss_flop(loss, n, 1, width, blocks=2, kept=once)
        assert floor <= count.flop <= 1.05 * floor
    else:
        assert count.flop == costs.loss_flop(loss, n, 1, width, kept=once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exponentials_are_counted_as_the_operator_keeps_them(dtype: torch.dtype) -> None:
    budget = kept.KEEP_BYTES["cuda"]
    options = Options(**problem.options(dtype, "triton", 0, None, keep_bytes=budget))
    found = []
    for n in (1, 100, 4096, 16_100, 16_200, 22_900, 23_000):
        size = costs.kept_bytes("clip", "gather", n, 1, dtype.itemsize)
        assert size == kept.kept_entries(n, n, options) * dtype.itemsize <= budget
        parts = costs.loss_memory("clip", "gather", n, 1, 16, dtype.itemsize)
        assert parts["kept exponentials"] == size
        found.append(size > 0)
    # as the mathematics says
    last = 16_100 if dtype == torch.float32 else 22_900
    assert found == [n <= last for n in (1, 100, 4096, 16_100, 16_200, 22_900, 23_000)]
    assert costs.kept_bytes("siglip", "gather", 100, 1, 2) == 0
    # a margin for each part
    gather, ring = (costs.kept_bytes("clip", exchange, 8, 4, 2) for exchange in costs.EXCHANGES)
    assert ring - gather == 3 * 8 * kept.MARGIN * 2


def test_bytes_of_the_loss() -> None:
    unit, statistics = 3 * 10 * 8 * 2, 8 * 3 * 10
    sizes = (10, 4, 8, 2)
    assert costs.bytes_per_rank("clip", "gather", *sizes) == (unit, 0, unit, statistics, statistics)
    assert costs.bytes_per_rank("clip", "ring", *sizes) == (
        unit,
        unit,
        unit,
        statistics,
        statistics,
    )
    assert costs.bytes_per_rank("siglip", "gather", *sizes).total == 2 * unit
    assert costs.bytes_per_rank("siglip", "ring", *sizes).total == 2 * unit
    assert costs.bytes_per_rank("open_clip", "gather", *sizes).total == 4 * unit
    symmetric = costs.bytes_per_rank("symmetric", "gather", *sizes, blocks=3)
    assert symmetric.total == 3 * (unit + statistics)
    assert costs.bytes_per_rank("clip", "gather", 10, 1, 8, 2).total == 0


DIVIDED = costs.Sharding(rows=((1000, 1),), outside=0, largest=0, exact_blocks=False)


def test_states_and_reductions_are_the_standard_ones() -> None:
    def states(engine: str) -> int:
        parts = costs.state_memory(engine, 1000, 10, "amp_bf16", DIVIDED)
        return sum(size for name, size in parts.items() if name != "buckets")

    assert [states(engine) for engine in costs.ENGINES] == [16_000, 5_200, 3_400, 1_600, 1_600]
    reductions = [costs.reduction_bytes(engine, 1000, 10, 1) for engine in costs.ENGINES]
    assert reductions == [7_200, 3_600, 3_600, 5_400, 7_200]
    # with four micro-batches ZeRO-2 scatters four times; ZeRO-3 gathers thrice in each as well, and
    # so does FSDP2, which scatters float32
    reductions = [costs.reduction_bytes(engine, 1000, 10, 4) for engine in costs.ENGINES]
    assert reductions == [7_200, 3_600, 9_000, 28_800, 36_000]


def fsdp_part(folder: Path, here: World) -> dict[str, dict[str, int]]:
    """Bytes that a step of FSDP2 has on this rank, by precision."""
    return {
        precision: bytes_of(make(folder, here, precision=precision), here)
        for precision in ("fp32", "amp_bf16")
    }


def bytes_of(engine: Any, here: World) -> dict[str, int]:
    def size(tensors: Iterable[Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    whole: list[int] = []

    def count(*_: Any) -> None:
        whole.append(size(p for p in engine.model.parameters() if not isinstance(p, DTensor)))

    for block in blocks_of(engine.model):
        block.register_forward_pre_hook(count)
    engine.backward(batches(0, here))
    rows = engine._rows.values()
    found = {"parameters": size(rows), "gradients": size(own.grad for own in rows)}
    engine.update(1e-3)
    moments = (engine.optimizer.state[own][name] for own in rows for name in MOMENTS)
    return {**found, "Adam": size(moments), "whole": max(whole)}


@pytest.mark.dist
def test_fsdp_holds_what_is_counted(tmp_path: Path) -> None:
    # an odd number of rows, and blocks of two sizes
    model = json.loads(json.dumps(TINY_MODEL))
    model["vision_cfg"] |= {"width": 24, "layers": 2}
    model["embed_dim"] = 15
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(model))
    found = run(tmp_path, 2, fsdp_part)
    sharding = sharding_of(meta_model(str(path)))
    whole = create(str(path)).model
    total = sum(parameter.numel() for parameter in whole.parameters())
    assert total / 2 < sharding.share(2) < total / 2 + 100
    assert sharding.largest == sum(
        p.numel() for p in whole.visual.transformer.resblocks[0].parameters()
    )
    for precision, each in (("fp32", 4), ("amp_bf16", 2)):
        counted = costs.state_memory("fsdp", total, 2, precision, sharding)
        for name in ("parameters", "gradients", "Adam"):
            assert found[precision][name] == counted[name], (precision, name)
        # while a block runs forward, with what is outside of blocks
        assert found[precision]["whole"] == 4 * sharding.outside + each * sharding.largest
        least = {
            "whole parameters outside blocks": sharding.outside,
            "whole blocks": sharding.largest,
        }
        assert all(counted[name] > 4 * numbers for name, numbers in least.items())


@pytest.mark.parametrize("gpus", [1, 8, 64, 1024])
@pytest.mark.parametrize("batch", [2**15, 1_024_000, 2**22])
@pytest.mark.parametrize("memory", [8.0, 80.0])
def test_a_plan_fits_and_adds_up(gpus: int, batch: int, memory: float) -> None:
    request = Request(gpus, batch, memory)
    plan = choose(vit(), request)
    if plan is None:
        assert largest_batch(vit(), request) < batch
        return
    assert plan.micro_batch * plan.micro_batches * gpus == batch
    assert plan.memory <= memory * USABLE * 2**30
    moments = [sum(p.in_loss for p in plan.parts), sum(p.in_towers for p in plan.parts)]
    assert plan.memory == max(moments)
    passes = 3 + plan.checkpointing + (plan.micro_batches > 1)
    assert plan.tower_flop == passes * request.rows * vit().forward_flop
    # bf16 exponentials, padded to whole tiles: here they fit 1 GiB by far or not at all
    kept = 2.2 * request.rows * batch <= 1 << 30
    assert plan.loss_flop == (6 if kept else 8) * request.rows * batch * 512


def extra(plan: Plan) -> int:
    return plan.checkpointing + (plan.micro_batches > 1)


@pytest.mark.parametrize("batch", [64 * 512, 1_000_000])
def test_more_memory_never_costs_more(batch: int) -> None:
    plans = [choose(vit(), Request(64, batch, memory, engine="torch")) for memory in range(6, 400)]
    found = [plan for plan in plans if plan is not None]
    # once it fits it always does
    assert plans[len(plans) - len(found) :] == found and len(found) > 300
    for less, more in pairwise(found):
        assert extra(more) <= extra(less)
        if more.checkpointing == less.checkpointing:
            assert more.micro_batches <= less.micro_batches


def test_limits_are_where_plans_end() -> None:
    request = Request(8, 32768, 24.0)
    for one_pass in (False, True):
        most = largest_batch(vit(), request, one_pass=one_pass)
        assert choose(vit(), replace(request, batch=most), one_pass=one_pass) is not None
    assert choose(vit(), replace(request, batch=most + 8), one_pass=True) is None
    fewest = fewest_gpus(vit(), request, one_pass=True)
    assert fewest is not None
    asked = replace(request, gpus=fewest // 2)
    assert choose(vit(), asked, one_pass=True) is None


def test_a_batch_of_few_divisors_is_answered_with_an_easier_one() -> None:
    """A prime number of rows leaves one sample at a time, or all."""
    hard = choose(vit(), Request(64, 64 * 15_607))
    assert hard is not None and hard.micro_batch == 1
    batch = easier_batch(hard)
    assert batch is not None and batch % 64 == 0
    # with half of an easier micro-batch on each side there is a multiple of it
    easy = choose(vit(), replace(hard.request, batch=batch))
    assert easy is not None and easy.micro_batch >= 2
    assert abs(batch - hard.request.batch) <= 64 * easy.micro_batch / 2
    said = " ".join(" ".join(report(hard, "ViT-B-16")).split())
    assert f"15,607 has no larger divisor that fits; see --batch {batch} " in said
    for plan in (easy, choose(vit(), Request(64, 2**15))):
        assert plan is not None and easier_batch(plan) is None
        assert "has no larger divisor" not in " ".join(report(plan, "ViT-B-16"))


def test_what_is_asked_for_is_kept() -> None:
    plan = choose(vit(), Request(64, 2**20, engine="zero2", dist="ring", loss="siglip"))
    assert plan is not None and (plan.engine, plan.dist) == ("zero2", "ring")
    assert plan.loss_flop == 6 * 2**14 * 2**20 * 512
    # large states are divided where they do not fit whole
    large = replace(vit(), parameters=5 * 10**9, saved={c: Line(0, 1e6) for c in (False, True)})
    plan = choose(large, Request(64, 2**13))
    assert plan is not None and plan.engine == "zero1" and plan.micro_batches == 1
    # batch normalization forbids accumulation
    assert choose(replace(vit(), has_batch_norm=True), Request(64, 2**20)) is None


def command_of(output: str) -> str:
    """What a plan says to run, as a shell reads it."""
    typed = output.split("\ncommand")[1].split("\n\n")[0].split("\n", 1)[1]
    return typed.replace("\\\n", "")


@pytest.mark.parametrize(
    ("flags", "launcher"),
    [
        ("--gpus 1 --batch 8", "fastclip"),
        ("--gpus 6 --batch 12", "torchrun --nproc_per_node 6 -m -- fastclip.cli"),
        (
            "--gpus 12 --batch 24",
            "torchrun --nproc_per_node 6 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint NODE:29500"
            " -m -- fastclip.cli",
        ),
        ("--gpus 6 --batch 12 --engine fsdp", "torchrun --nproc_per_node 6 -m -- fastclip.cli"),
        ("--gpus 8 --batch 8 --engine zero1", "deepspeed --num_gpus 8 --module fastclip.cli"),
        (
            "--gpus 64 --batch 64 --engine zero3",
            "deepspeed --hostfile HOSTFILE --module fastclip.cli",
        ),
    ],
)
def test_the_launcher(
    flags: str, launcher: str, plain_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *flags.split(), "--model", plain_model]) == 0
    output = capsys.readouterr().out
    words = shlex.split(command_of(output))
    size = len(launcher.split())
    assert words[: size + 1] == [*launcher.split(), "train"]
    parse(words[size + 1 :])
    # a path may be longer than the screen
    lines = [line for line in output.splitlines() if plain_model not in line]
    assert all(len(line) <= 80 for line in lines), lines


def test_the_command(plain_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("plan --gpus 64 --batch 1000000 --model ViT-B-16".split()) == 0
    output = capsys.readouterr().out
    assert "ViT-B-16 (computed, not measured)\nglobal batch 1,000,000 on 64 x 80" in output
    assert " 15,625 samples a GPU\n" in output
    assert (
        "command, on each of 8 nodes with 8 GPUs\n  torchrun --nproc_per_node 8 --nnodes 8"
        in output
    )
    assert "one pass with checkpointing needs" in output and 'dist="gather"' in output
    assert "largest batch on 64 GPUs" in output and "GiB of inputs" in output

    assert main(["plan", "--gpus", "8", "--batch", "1001", "--model", plain_model]) == 1
    captured = capsys.readouterr()
    assert "is not a multiple of --gpus 8; use 1000 or 1008" in captured.err
    assert "global batch 1,000 on 8" in captured.out

    # the flags are the trainer's
    asked = "--gpus 8 --batch 8192 --engine zero2 --dist ring --loss siglip --model".split()
    assert main(["plan", *asked, plain_model]) == 0
    words = shlex.split(command_of(capsys.readouterr().out))
    assert words[:6] == ["deepspeed", "--num_gpus", "8", "--module", "fastclip.cli", "train"]
    config = parse(words[6:])
    assert config.model.model == plain_model and config.data.train_data == "DATA"
    assert config.optim.step_samples(8) == 8192
    assert config.loss.siglip and config.loss.loss_dist_impl == "ring"
    assert config.distributed.deepspeed_config == "ds_zero2"
    assert main(["plan", *"--gpus 8 --batch 8192 --engine fsdp --model".split(), plain_model]) == 0
    output = capsys.readouterr().out
    config = parse(shlex.split(command_of(output))[7:])
    assert config.distributed.fsdp and not config.distributed.deepspeed
    assert "FSDP2: Adam's state" in output and "whole blocks" in output

    tight = ["--batch", str(2**30), "--model", plain_model, "--memory", "4"]
    assert main(["plan", "--gpus", "2", *tight]) == 1
    captured = capsys.readouterr()
    assert "does not fit 2 GPUs of 4 GiB; the largest batch that fits them is" in captured.err
    assert captured.out.count("setting\n") == 1
    assert main(["plan", "--gpus", "0", "--batch", "8"]) == 1
    assert main(["plan", "--gpus", "1", "--batch", "8", "--model", "ViT-B-161"]) == 1
    assert "near names: ViT-B-16" in capsys.readouterr().err


def test_the_documents_numbers_are_computed() -> None:
    assert scaling_table(vit()) in (ROOT / "docs" / "scaling.md").read_text()
