"""Heads: batch statistics of all ranks against torch's on all rows in one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastclip.models.classifier import LabelCriterion
from fastclip.nn.heads import GlobalBatchNorm, MLPHead, linear_head
from tests.processes import on_ranks

SIZES = {2: (5, 3), 3: (2, 4, 1)}
WIDTH = 6


def rows(count: int) -> tuple[Tensor, Tensor]:
    """Rows, far from the origin, and weights that make a loss of the outputs."""
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn(2, count, WIDTH, generator=generator, dtype=torch.float64)
    return 3 * draw[0] + 50, draw[1]


def trained(norm: nn.Module, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Output, gradients and running statistics after two steps."""
    norm.double().train()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, WIDTH))
    for _ in range(2):
        norm.zero_grad()
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        (weights * out.square()).sum().backward()
    state = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    return [out.detach(), leaf.grad, norm.weight.grad, norm.bias.grad, *state]


def work(rank: int, world: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.set_num_threads(1)
    x, weights = (t.split(SIZES[world])[rank] for t in rows(sum(SIZES[world])))
    torch.save(trained(GlobalBatchNorm(WIDTH), x, weights), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_are_normalized_as_one_batch(world: int, tmp_path: Path) -> None:
    on_ranks(work, (world, str(tmp_path)), ranks=world)
    out, gradient, weight, bias, *state = trained(nn.BatchNorm1d(WIDTH), *rows(sum(SIZES[world])))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([f[0] for f in found]), out, **close)
    torch.testing.assert_close(torch.cat([f[1] for f in found]), gradient, **close)
    # the losses of the ranks add up, and so do the gradients of what they share
    torch.testing.assert_close(sum(f[2] for f in found), weight, **close)
    torch.testing.assert_close(sum(f[3] for f in found), bias, **close)
    for each in found:
        for a, b in zip(each[4:], state, strict=True):
            torch.testing.assert_close(a, b, **close)


def test_one_process_is_torchs_batch_norm() -> None:
    x, weights = rows(9)
    for a, b in zip(
        trained(GlobalBatchNorm(WIDTH), x, weights),
        trained(nn.BatchNorm1d(WIDTH), x, weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    ours, theirs = GlobalBatchNorm(WIDTH), nn.BatchNorm1d(WIDTH)
    theirs.load_state_dict(ours.state_dict())
    for norm in (ours, theirs):
        norm(x.float())
        norm.eval()
    torch.testing.assert_close(ours(x.float()), theirs(x.float()))


def test_statistics_are_float32_under_autocast() -> None:
    x, _ = rows(64)
    norm = GlobalBatchNorm(WIDTH, affine=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x.bfloat16())
    assert out.dtype == torch.bfloat16
    exact = nn.BatchNorm1d(WIDTH, affine=False).double()(x.bfloat16().double())
    # one rounding of the output to 8 bits
    assert (out.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_shapes_are_found_without_numbers() -> None:
    """On the meta device, which has no autocast."""
    head = MLPHead((32, 64, 16)).to("meta")
    assert head(torch.empty(5, 32, device="meta")).shape == (5, 16)
    assert LabelCriterion(32, 7).to("meta").logits(torch.empty(5, 32, device="meta")).shape == (
        5,
        7,
    )


def test_heads_are_built_as_the_papers_say() -> None:
    rocket = MLPHead((32, 64, 64, 16))
    kinds = [type(layer).__name__ for layer in rocket]
    assert kinds == [*("Linear", "GlobalBatchNorm", "ReLU") * 2, "Linear"]
    assert rocket(torch.randn(4, 32)).shape == (4, 16)
    assert all(layer.bias is None for layer in rocket if isinstance(layer, nn.Linear))
    siam = MLPHead((32, 64, 16), last_norm="plain")
    assert siam[-1].weight is None and siam[-1].bias is None
    out = siam(torch.randn(50, 32))
    torch.testing.assert_close(out.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    predictor = MLPHead((16, 64, 16), last_bias=True)
    assert predictor[-1].bias is not None
    head = linear_head(400, 300)
    assert head.bias is None and abs(head.weight.std() - 0.05) < 0.001


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MLPHead((4,)), "two or more"),
        (lambda: MLPHead((4, 0, 3)), "two or more"),
        (lambda: MLPHead((4, 3), last_norm="batch"), "last_norm is 'batch'"),
        (lambda: GlobalBatchNorm(4)(torch.randn(3, 5)), r"rows are \(3, 5\); give \(N, 4\)"),
        (lambda: GlobalBatchNorm(4)(torch.randn(1, 4)), "single row"),
    ],
)
def test_mistakes(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
