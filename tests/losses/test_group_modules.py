"""Groups given to the modules, against the definitions in float64; one process and two."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fastclip
from tests.losses.test_groups import LOSSES, SCALE
from tests.losses.test_groups_distributed import cut, whole
from tests.ops import group_oracles
from tests.processes import on_ranks

SIZES = (5, 2)
ROLES = ("excluded", "positive")


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["clip", "siglip", "info_nce", "nt_xent"])
def test_modules_take_groups(name: str, role: str) -> None:
    loss = LOSSES[name]
    leaves = [leaf.requires_grad_() for leaf in loss.leaves()]
    modules = {
        "clip": lambda: fastclip.ClipLoss(group_role=role),
        "siglip": lambda: fastclip.SigLipLoss(group_role=role),
        "info_nce": lambda: fastclip.InfoNCELoss(1 / SCALE, group_role=role),
        "nt_xent": lambda: fastclip.NTXentLoss(leaves[-1].item(), group_role=role),
    }
    # a temperature is the modules' own where they have one
    given = leaves[: loss.features] if name in ("info_nce", "nt_xent") else leaves
    value = modules[name]()(*given, **loss.groups)
    compared = list(leaves)
    if name == "nt_xent":  # which normalizes inside
        compared[:2] = [F.normalize(leaf, dim=1) for leaf in given]
    want = loss.oracle(*compared, groups=tuple(loss.groups.values()), role=role).mean()
    close(value.detach(), want)
    gradients = zip(
        torch.autograd.grad(value, given), torch.autograd.grad(want, given), strict=True
    )
    for got, wanted in gradients:
        close(got, wanted)


def test_distillation_has_groups_in_its_contrastive_part() -> None:
    images, texts, scale = LOSSES["siglip"].leaves()[:3]
    groups = LOSSES["siglip"].groups
    plain = fastclip.ClipLoss()(images, texts, scale, **groups)
    both = fastclip.DistillClipLoss()(images, texts, scale, texts, images, scale, **groups)
    assert both[0].equal(plain)
    without = fastclip.DistillClipLoss()(images, texts, scale, texts, images, scale)
    assert both[1].equal(without[1]) and not both[0].equal(without[0])


def test_mp_nce_takes_groups() -> None:
    features = LOSSES["mp_nce"].leaves()[:3]
    group = LOSSES["mp_nce"].groups["row_group"]
    module = fastclip.MPNCELoss(num_domains=2, init_temperature=1 / SCALE).double()
    value = module(features, [0, 0, 1], row_group=group)
    scale, zero = torch.full((2, 2), SCALE).double(), torch.zeros(2, 2).double()
    ones = torch.ones(2, 2).double()
    want = group_oracles.mp_nce(features, [0, 0, 1], scale, zero, ones, group).mean()
    torch.testing.assert_close(value.detach(), want, rtol=1e-6, atol=0)  # a float32 logarithm
    assert (value - module(features, [0, 0, 1])).abs() > 1e-3


@pytest.mark.parametrize("module", [fastclip.ClipLoss, fastclip.SigLipLoss, fastclip.NTXentLoss])
def test_wrong_groups_are_refused(module: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="group_role is 'duplicates'; use one of excluded, pos"):
        module(group_role="duplicates")


def test_a_bank_has_no_groups() -> None:
    x, ids = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match="memory_bank_size=0"):
        fastclip.NTXentLoss(memory_bank_size=(4, 3))(x, x, row_group=ids)
    with pytest.raises(ValueError, match="give both row_group and column_group"):
        fastclip.ClipLoss()(x, x, torch.tensor(1.0), row_group=ids)
    with pytest.raises(ValueError, match="there are no groups; give row_group, column_group"):
        fastclip.ClipLoss(group_role="positive")(x, x, torch.tensor(1.0))


def modules_over(rank: int, role: str) -> dict[str, tuple[str, nn.Module]]:
    shared = {"rank": rank, "world_size": 2, "sizes": SIZES, "group_role": role}
    return {
        "local": ("clip", fastclip.ClipLoss(True, True, **shared)),
        "whole": ("clip", fastclip.ClipLoss(False, True, **shared)),
        "gather": ("siglip", fastclip.SigLipLoss(dist_impl="gather", **shared)),
        "bidir": ("siglip", fastclip.SigLipLoss(dist_impl="bidir", **shared)),
    }


def work(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for role in ROLES:
        for mode, (name, module) in modules_over(rank, role).items():
            leaves, features, groups = whole(name, 2)
            own = [cut(leaf, SIZES, rank).requires_grad_() for leaf in leaves[:features]]
            ids = {key: cut(group, SIZES, rank) for key, group in groups.items()}
            value = module(*own, *leaves[features:-1], **ids)
            results[role, mode] = value.detach(), torch.autograd.grad(value, own)
    refused = fastclip.ClipLoss(True, False, rank=rank, world_size=2)
    x, ids = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match="local_loss with groups needs gather_with_grad=True"):
        refused(x, x, torch.tensor(1.0), row_group=ids, column_group=ids)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    on_ranks(work, (str(tmp_path),), ranks=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for role, (mode, (name, _)) in ((r, m) for r in ROLES for m in modules_over(0, r).items()):
        leaves, features, groups = whole(name, 2)
        inputs = [leaf.requires_grad_() for leaf in leaves[:features]]
        arguments = (*inputs, *leaves[features:-1])
        want = LOSSES[name].oracle(*arguments, groups=tuple(groups.values()), role=role).mean()
        wanted = torch.autograd.grad(want, inputs)
        # averaged over the processes it is the full batch's: in value, and in gradient
        close((ranks[0][role, mode][0] + ranks[1][role, mode][0]) / 2, want)
        for rank in range(2):
            for got, gradient in zip(ranks[rank][role, mode][1], wanted, strict=True):
                close(got, 2 * cut(gradient, SIZES, rank))
