"""The losses over several gloo ranks against open_clip and against one process."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightly.loss as lightly
import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fastclip
from fastclip.losses import clip
from fastclip.ops.gemm import count_products
from tests.processes import on_ranks

MODES = {
    "global": {"gather_with_grad": True},
    "local": {"gather_with_grad": True, "local_loss": True},
    "constant": {},
    "constant local": {"local_loss": True},
}
EXCHANGES = ("bidir", "shift", "reduce", "gather")
OTHERS = (*EXCHANGES, "distill", "distill local", "distill constant", "nt_xent", "sup_con")
ROWS = 6
UNEVEN = {2: (9, 3), 3: (7, 2, 9)}


def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3 * ROWS, 8)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return F.normalize(x, dim=-1), F.normalize(y, dim=-1)


def rank_gradients(loss_class: Any, mode: str, rank: int, world: int) -> list[Tensor]:
    """Loss and gradients that one rank sees."""
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    x, y = (t[: world * ROWS][own].clone().requires_grad_() for t in features())
    scale = torch.tensor(11.0, dtype=torch.float64, requires_grad=True)
    loss = loss_class(rank=rank, world_size=world, **MODES[mode])(x, y, scale)
    loss.backward()
    return [loss.detach(), x.grad, y.grad, scale.grad]


def other_losses(module: Any, rank: int, world: int) -> dict[str, list[Tensor]]:
    """SigLIP's four exchanges and the distillation loss in three modes, as one rank sees them."""
    results = {}
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    place = {"rank": rank, "world_size": world}
    teacher = [t[: world * ROWS][own].flip(1) for t in features()]
    losses = {exchange: module.SigLipLoss(**place, dist_impl=exchange) for exchange in EXCHANGES}
    losses["distill"] = module.DistillClipLoss(**place, **MODES["global"])
    losses["distill local"] = module.DistillClipLoss(**place, **MODES["local"])
    losses["distill constant"] = module.DistillClipLoss(**place, **MODES["constant"])
    ntxent = lightly.NTXentLoss if module is open_clip.loss else fastclip.NTXentLoss
    losses["nt_xent"] = ntxent(0.1, gather_distributed=True)
    # without labels each sample is a class of its own, those of other processes too
    losses["sup_con"] = functools.partial(
        fastclip.functional.nt_xent_loss, temperature=0.1, dist="gather"
    )
    if module is fastclip:
        sup_con = fastclip.SupConLoss(0.1, dist="gather")
        losses["sup_con"] = lambda x, y: sup_con(torch.stack((x, y), dim=1))
    for name, loss_function in losses.items():
        x, y = (t[: world * ROWS][own].clone().requires_grad_() for t in features())
        scale, bias = (
            torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (11.0, -5.0)
        )
        if name in EXCHANGES:
            loss = loss_function(x, y, scale, bias)
        elif name in ("nt_xent", "sup_con"):
            loss = loss_function(x, y) + 0 * scale + 0 * bias
        else:
            pair = loss_function(x, y, scale, *teacher, torch.tensor(7.0, dtype=torch.float64))
            loss = pair[0] + 3 * pair[1] + 0 * bias
        loss.backward()
        results[name] = [loss.detach(), x.grad, y.grad, scale.grad, bias.grad]
    return results


TEACHER_SCALE = torch.tensor(7.0, dtype=torch.float64)
TEACHER_WIDTH = 5


def uneven_losses(world: int, rank: int | None) -> dict[str, Any]:
    """Losses of a process's rows, or of all of them where it works alone."""
    place: dict[str, Any] = {}
    if rank is not None:
        place = {"rank": rank, "world_size": world, "sizes": UNEVEN[world]}
    losses: dict[str, Any] = {
        f"SigLIP {exchange}": fastclip.SigLipLoss(**place, dist_impl=exchange)
        for exchange in EXCHANGES[1:3]
    }
    for mode in ("global", "local"):
        of_mode = {**place, **MODES[mode]}
        losses[f"CLIP {mode}"] = fastclip.ClipLoss(**of_mode)
        distill = fastclip.DistillClipLoss(**of_mode)

        def both(x: Tensor, y: Tensor, scale: Tensor, _: Tensor, distill: Any = distill) -> Tensor:
            teacher = x.detach().flip(1), y.detach().flip(1), TEACHER_SCALE
            contrastive, term = distill(x, y, scale, *teacher)
            return contrastive + 3 * term

        losses[f"distill {mode}"] = both
    return losses


def uneven(world: int, rank: int | None) -> dict[str, list[Tensor]]:
    """Value and gradients of each loss."""
    sizes = UNEVEN[world]
    own = slice(None) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = {}
    for name, loss_function in uneven_losses(world, rank).items():
        leaves = [t[: sum(sizes)][own].clone().requires_grad_() for t in features()]
        leaves += [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (11.0, -5.0)]
        loss = loss_function(*leaves)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        found[name] = [loss.detach(), *gradients[:3]]
    return found


def distillation_flop(rank: int, world: int) -> list[int]:
    """Of the distillation term forward and backward on one rank, in two modes."""
    sizes = UNEVEN[world]
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x, y = (t[own].clone().requires_grad_() for t in features())
    scale = torch.tensor(11.0, dtype=torch.float64)
    teacher = [t[own][:, :TEACHER_WIDTH] for t in features()]
    found = []
    for mode in ("global", "local"):
        options = {"rank": rank, "world_size": world, "sizes": sizes, **MODES[mode]}
        with count_products() as contrastive:
            fastclip.ClipLoss(**options)(x, y, scale)
        with count_products() as both:
            _, term = fastclip.DistillClipLoss(**options)(x, y, scale, *teacher, TEACHER_SCALE)
            term.backward()
        found.append(both.flop - contrastive.flop)
    return found


def work(rank: int, world: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.set_num_threads(1)
    results = {
        (mode, side): rank_gradients(loss_class, mode, rank, world)
        for mode in MODES
        for side, loss_class in (("ours", fastclip.ClipLoss), ("theirs", open_clip.ClipLoss))
    }
    for side, module in (("ours", fastclip), ("theirs", open_clip.loss)):
        for name, result in other_losses(module, rank, world).items():
            results[name, side] = result
    results["uneven", "ours"] = uneven(world, rank)
    results["distillation", "flop"] = distillation_flop(rank, world)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@functools.cache
def run(world: int, folder: str) -> list[dict[tuple[str, str], list[Tensor]]]:
    on_ranks(work, (world, folder), ranks=world)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    folders: dict[int, Path] = {}

    def get(world: int) -> Any:
        folder = folders.setdefault(world, tmp_path_factory.mktemp("ranks"))
        return run(world, str(folder))

    return get


@pytest.mark.dist
@pytest.mark.parametrize("mode", [*MODES, *OTHERS])
@pytest.mark.parametrize("world", [2, 3])
def test_each_mode_is_open_clips(ranks: Callable[[int], Any], world: int, mode: str) -> None:
    """Value and features' gradients on every rank, scalars' gradients after averaging."""
    pairs = [(r[mode, "ours"], r[mode, "theirs"]) for r in ranks(world)]
    for ours, theirs in pairs:
        for got, want in zip(ours[:3], theirs[:3], strict=True):
            assert (got - want).norm() <= 1e-12 * max(want.norm().item(), 1.0)
    for index in range(3, len(pairs[0][0])):
        got, want = (sum(pair[side][index] for pair in pairs) / world for side in range(2))
        assert abs(got - want) <= 1e-12 * max(abs(want).item(), 1.0)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_scalars_gradients_need_no_averaging_where_open_clips_do_not(
    ranks: Callable[[int], Any], world: int
) -> None:
    distilled = "distill", "distill constant"
    for mode in ("global", "constant", "constant local", *distilled, *EXCHANGES):
        for results in ranks(world):
            for got, want in zip(
                results[mode, "ours"][3:], results[mode, "theirs"][3:], strict=True
            ):
                assert abs(got - want) <= 1e-12 * max(abs(want).item(), 1.0), mode


@pytest.mark.dist
@pytest.mark.parametrize("mode", ["global", "local"])
@pytest.mark.parametrize("world", [2, 3])
def test_averaging_gives_the_full_batchs_gradient(
    ranks: Callable[[int], Any], world: int, mode: str
) -> None:
    x, y = (t[: world * ROWS].clone().requires_grad_() for t in features())
    scale = torch.tensor(11.0, dtype=torch.float64, requires_grad=True)
    loss = fastclip.functional.clip_loss(x, y, scale)
    loss.backward()
    results = [r[mode, "ours"] for r in ranks(world)]
    mean_loss = sum(r[0] for r in results) / world
    assert abs(mean_loss - loss) <= 1e-13 * abs(loss)
    for index, leaf in ((1, x), (2, y)):
        # a parameter's gradient is averaged over the ranks, so a feature's is world times its own
        got = torch.cat([r[index] for r in results]) / world
        assert (got - leaf.grad).norm() <= 1e-12 * max(leaf.grad.norm().item(), 1.0)
    assert abs(sum(r[3] for r in results) / world - scale.grad) <= 1e-12


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_uneven_rows_have_the_full_batchs_gradient(ranks: Callable[[int], Any], world: int) -> None:
    """Averaged over the processes: values, the towers' gradients and the scale's."""
    of_ranks = [found["uneven", "ours"] for found in ranks(world)]
    for name, (loss, *gradients) in uneven(world, None).items():
        each = [found[name] for found in of_ranks]
        assert abs(sum(one[0] for one in each) / world - loss) <= 1e-12 * abs(loss), name
        for index, want in enumerate(gradients[:2], 1):
            got = torch.cat([one[index] for one in each]) / world
            assert (got - want).norm() <= 1e-12 * max(want.norm().item(), 1.0), name
        got = sum(one[3] for one in each) / world
        assert abs(got - gradients[2]) <= 1e-12 * max(abs(gradients[2]).item(), 1.0), name


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_distills_its_own_rows_and_columns(ranks: Callable[[int], Any], world: int) -> None:
    sizes, width = UNEVEN[world], features()[0].shape[1]
    for rows, found in zip(sizes, ranks(world), strict=True):
        # S and T forward; S, T, dX and dY backward: of its images, and of its texts
        each = 2 * rows * sum(sizes) * (4 * width + 2 * TEACHER_WIDTH)
        assert found["distillation", "flop"] == [2 * each, 2 * each]


@pytest.mark.parametrize("sizes", [(3,), (3, 0), ()])
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, ...]) -> None:
    for kind in (fastclip.ClipLoss, fastclip.SigLipLoss):
        options = {} if kind is fastclip.SigLipLoss else {"gather_with_grad": True}
        with pytest.raises(ValueError, match="world_size=2; give every process's rows"):
            kind(world_size=2, sizes=sizes, **options)
    with pytest.raises(ValueError, match="need gather_with_grad=True"):
        fastclip.ClipLoss(world_size=2, sizes=(3, 4))


@pytest.mark.parametrize(
    ("local", "says"), [(False, "divides the towers' gradient"), (True, "points elsewhere")]
)
def test_the_two_modes_that_are_not_the_gradient_warn_once(local: bool, says: str) -> None:
    clip._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=says) as caught:
        for _ in range(3):
            fastclip.ClipLoss(local_loss=local, world_size=2)
    assert len(caught) == 1
    assert "--gather-with-grad" in str(caught[0].message)
