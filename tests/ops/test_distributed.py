"""Every loss over several gloo ranks with unequal shares against one process, in float64."""

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastclip
from fastclip import functional, native
from fastclip.bench.collectives import traffic
from fastclip.ops.collectives import count_bytes
from fastclip.ops.gemm import count_products
from tests.ops import oracles
from tests.ops.cases import LOSSES, Case, divisor, theirs, unit
from tests.processes import on_ranks

SIZES = {1: (6,), 2: (5, 3), 3: (4, 1, 3), 4: (2, 5, 1, 3)}
WIDTH = 7
EXCHANGES = ("gather", "ring")
BACKENDS = ("torch", "reference")
LOW_PRECISION = [
    (torch.bfloat16, "torch"),
    (torch.float16, "torch"),
    (torch.float32, "triton"),
    # test_cpp.py says where the library is missing
    *([] if native.unavailable_reason() else [(torch.bfloat16, "cpp"), (torch.float32, "cpp")]),
]


def make(name: str, world: int) -> Case:
    """A case over all ranks; its loss counts rows of all blocks, so that N is every rank's."""
    rows = sum(SIZES[world])
    blocks = {"mp_nce": 3, "nt_xent": 2}.get(name.removesuffix("_hard"), 1)
    base = name.removesuffix("_hard")
    case = LOSSES[base].make(rows * blocks, WIDTH, 9.0, 0.5, seed=world)
    if name.endswith("_hard"):
        # one hard caption an image, behind the true ones
        x, y, *scalars = case.leaves
        case = replace(case, leaves=[x, torch.cat([y, unit(rows, WIDTH, 31)]), *scalars])
        if "column_group" in case.static:
            ids = case.static["column_group"]
            case.static["column_group"] = torch.cat([ids, ids.flip(0)])
    if "positive_index" in case.static:
        # in the order of the whole batch; shares hold what is local
        starts = torch.tensor([sum(SIZES[world][:r]) for r in range(world)])
        sizes = torch.tensor(SIZES[world])
        owner = torch.arange(world).repeat_interleave(sizes)
        local = torch.randint(0, 100, (rows,)) % sizes[owner]
        case.static["positive_index"] = local + starts[owner]
    return case


NAMES = ("clip", "clip_hard", "clip_smoothed", "clip_smoothed_hard", "clip_grouped")
NAMES += ("clip_grouped_hard", "clip_smoothed_grouped", "clip_smoothed_grouped_hard", "siglip")
NAMES += ("info_nce", "info_nce_hard", "info_nce_index", "nt_xent", "mp_nce", "sup_con")


def share(name: str, case: Case, world: int, rank: int, own: bool = True) -> Case:
    """What one rank has of a case; of features the gradient's shares, if not `own`."""
    sizes = SIZES[world]

    def cut(rows: Tensor) -> Tensor:
        blocks = rows.split(sum(sizes))
        return torch.cat([block.split(sizes)[rank] for block in blocks])

    leaves = [
        cut(leaf) if index < case.features else leaf for index, leaf in enumerate(case.leaves)
    ]
    static = {
        key: cut(value)
        if key in ("labels", "row_group", "column_group", "positive_index")
        else value
        for key, value in case.static.items()
    }
    if "positive_index" in static:
        static["positive_index"] = static["positive_index"] - sum(sizes[:rank])
    return replace(case, leaves=leaves, static=static)


def run_share(
    name: str, case: Case, world: int, rank: int, reduction: str = "mean", **options: Any
) -> dict[str, Any]:
    """Loss and gradients on one rank; with "none" those of the sum of (1 + i) loss_i."""
    own = share(name, case, world, rank)
    leaves = [leaf.clone().requires_grad_() for leaf in own.leaves]
    base = LOSSES[name.removesuffix("_hard")]
    metrics: dict[str, Tensor] = {}
    if reduction == "mean":
        # losses of single anchors keep the exponentials
        options["keep_bytes"] = 0
        if name in ("clip", "info_nce", "mp_nce", "nt_xent"):
            options["metrics"] = metrics
    sizes = SIZES[world]
    loss = base.run(leaves, own.static, reduction=reduction, sizes=sizes, **options)
    if reduction == "none":
        weights = share_of_weights(len(loss) // sizes[rank], sizes)[rank]
        gradients = torch.autograd.grad((loss * weights).sum(), leaves)
    else:
        gradients = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach(), "gradients": list(gradients), "metrics": metrics}


def share_of_weights(blocks: int, sizes: tuple[int, ...]) -> list[Tensor]:
    """Upstream gradients of every rank's anchors."""
    whole = torch.arange(1, blocks * sum(sizes) + 1, dtype=torch.float64)
    parts = [block.split(sizes) for block in whole.split(sum(sizes))]
    return [torch.cat([part[rank] for part in parts]) for rank in range(len(sizes))]


def work(rank: int, world: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.set_num_threads(1)
    results = {}
    for name in NAMES:
        torch.manual_seed(0)
        case = make(name, world)
        for exchange in EXCHANGES:
            for backend in BACKENDS:
                # small chunks: several of them
                options: dict[str, Any] = {"dist": exchange, "backend": backend, "chunk_bytes": 100}
                for reduction in ("mean", "none"):
                    key = name, exchange, backend, reduction
                    results[key] = run_share(name, case, world, rank, reduction, **options)
            repeated = run_share(name, case, world, rank, dist=exchange, chunk_bytes=100)
            first = results[name, exchange, "torch", "mean"]
            results[name, exchange, "same bits"] = all(
                map(torch.equal, repeated["gradients"], first["gradients"])
            )
    results["few keys"] = few_keys(world, rank)
    results["means"] = means_of_more_columns(world, rank)
    results["flagged"] = [flagged_on_one_rank(world, rank, exchange) for exchange in EXCHANGES]
    results["counts"] = {exchange: counts(world, rank, exchange) for exchange in EXCHANGES}
    results["low precision"] = {
        exchange: low_precision(world, rank, exchange) for exchange in EXCHANGES
    }
    if world == 2:
        results["compiled"] = compiled(world, rank)
    if world == 4:
        results["subgroup"] = subgroup(rank)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def few_keys(world: int, rank: int) -> list[bool]:
    """Whether queries that share keys, 4 and 2 on every rank, equal one process."""
    index = torch.tensor([0, 1, 1, 0])
    whole = [unit(4 * world, WIDTH, 1), unit(2 * world, WIDTH, 2)]
    everywhere = torch.cat([index + 2 * r for r in range(world)])
    leaves = [leaf.requires_grad_() for leaf in whole]
    per_query = oracles.info_nce(*leaves, torch.tensor(9.0), {"positive_index": everywhere})
    wanted = torch.autograd.grad(per_query.mean(), leaves)
    equal = []
    for exchange, backend in product(EXCHANGES, BACKENDS):
        own = [t.detach().chunk(world)[rank].clone().requires_grad_() for t in whole]
        loss = functional.info_nce_loss(*own, 9.0, index, dist=exchange, backend=backend)
        got = torch.autograd.grad(loss, own)
        equal.append(close(loss, per_query.mean()))
        for gradient, want in zip(got, wanted, strict=True):
            equal.append(close(gradient, world * want.chunk(world)[rank]))
    return equal


def means_of_more_columns(world: int, rank: int) -> list[bool]:
    """Whether means of 2 rows and of 3 columns on every rank equal one process's."""
    whole = [unit(2 * world, WIDTH, 1), unit(3 * world, WIDTH, 2)]
    leaves = [leaf.clone().requires_grad_() for leaf in whole]
    S = 9.0 * leaves[0] @ leaves[1].T
    rows, columns = S.mean(dim=1).chunk(world), S.mean(dim=0).chunk(world)
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    total = sum(
        (a * weights).sum() - 3 * (b[:2] * weights).sum()
        for a, b in zip(rows, columns, strict=True)
    )
    wanted = [g.chunk(world)[rank] for g in torch.autograd.grad(total, leaves)]
    equal = []
    for exchange, backend in product(EXCHANGES, BACKENDS):
        own = [t.chunk(world)[rank].clone().requires_grad_() for t in whole]
        options: dict[str, Any] = {"dist": exchange, "backend": backend, "means": True}
        found = functional.similarity_statistics(*own, 9.0, column_statistics=False, **options)
        equal += [close(found.row_mean, rows[rank]), close(found.column_mean, columns[rank][:2])]
        loss = (found.row_mean * weights).sum() - 3 * (found.column_mean * weights).sum()
        equal += map(close, torch.autograd.grad(loss, own), wanted)
    return equal


def flagged_on_one_rank(world: int, rank: int, exchange: str) -> bool:
    """Whether one rank may form S again, its sums out of range, while others keep theirs."""
    n, scale = 6, 100.0
    x, y = unit(n * world, WIDTH, 1), unit(n * world, WIDTH, 2)
    # on the last rank no text is near an image: all exponentials about the anchor vanish
    x[-n:] = -y.mean(dim=0, keepdim=True) * 40 + 0.01 * x[-n:]
    leaves = [leaf.float().requires_grad_() for leaf in (x, y)]
    inputs = [leaf.detach().double().requires_grad_() for leaf in leaves]
    loss = oracles.clip(*inputs, torch.tensor(scale, dtype=torch.float64), {}).mean()
    wanted = torch.autograd.grad(loss, inputs)
    own = [t.detach().chunk(world)[rank].clone().requires_grad_() for t in leaves]
    with count_products() as count:
        ours = functional.clip_loss(*own, scale, dist=exchange)
        got = torch.autograd.grad(ours, own)
    formed_twice = count.products_of(n, n * world, WIDTH) > 3
    equal = [torch.isclose(ours.double(), loss, rtol=1e-5)]
    for gradient, want in zip(got, wanted, strict=True):
        want = world * want.chunk(world)[rank]
        equal.append((gradient - want).norm() <= 1e-4 * wanted[0].norm() * world)
    return all(map(bool, equal)) and formed_twice == (rank == world - 1)


def counts(world: int, rank: int, exchange: str) -> dict[str, Any]:
    """Bytes received and products computed for each loss, by our counters and from outside."""
    rows, width = 32, 64
    found = {}
    labels = torch.arange(rows) % 7
    f, share = functional, {"dist": exchange}
    cases: dict[str, Callable[..., Tensor]] = {
        "clip": lambda x, y, scale, **o: f.clip_loss(x, y, scale, **share, **o),
        "siglip": lambda x, y, scale, **o: f.siglip_loss(x, y, scale, **share, **o),
        "info_nce": lambda x, y, scale, **o: f.info_nce_loss(x, y, scale, **share, **o),
        "nt_xent": lambda x, y, scale, **o: f.nt_xent_loss(x, y, 0.1, **share, **o),
        "sup_con": lambda x, y, scale, **o: f.sup_con_loss(x, labels, 0.1, **share, **o),
    }
    if exchange == "gather" and world > 1:
        theirs = open_clip.ClipLoss(True, True, rank=rank, world_size=world)
        cases["open_clip"] = lambda x, y, scale: theirs(x, y, scale.to(x.dtype))
    for name in ("clip", "siglip", "info_nce", "nt_xent", "sup_con"):
        cases[f"{name} twice"] = functools.partial(cases[name], keep_bytes=0)
    for name, dtype in product(cases, (torch.float32, torch.bfloat16)):
        x, y = (unit(rows, width, i).to(dtype).requires_grad_() for i in (rank, 9 + rank))
        scale = torch.tensor(9.0, requires_grad=True)
        with traffic() as outside, count_bytes() as received, count_products() as products:
            cases[name](x, y, scale).backward()
        found[name, dtype] = {
            "outside": sum(outside),
            "inside": received.received,
            "products": products.flop / (2 * rows * rows * world * width),
        }
    return found


def low_precision(world: int, rank: int, exchange: str) -> dict[str, list[Tensor]]:
    """Gradients of 16-bit features, float16 under a loss scale, and of fused implementations."""
    found = {}
    for name in ("clip", "siglip", "mp_nce", "sup_con"):
        case = make(name, world)
        for dtype, backend in LOW_PRECISION:
            own = share(name, case.cast(dtype), world, rank)
            leaves = [leaf.clone().requires_grad_() for leaf in own.leaves]
            options = {"dist": exchange, "backend": backend, "sizes": SIZES[world]}
            loss = LOSSES[name].run(leaves, own.static, **options)
            factor = 2.0**12
            gradients = torch.autograd.grad(loss * factor, leaves)
            found[name, dtype, backend] = [loss.detach(), *(g.double() / factor for g in gradients)]
    return found


def compiled(world: int, rank: int) -> list[bool]:
    """Whether a graph without breaks gives the eager result: losses, then ClipLoss's modes."""
    equal = []
    for local, with_grad in product((False, True), (False, True)):
        torch._dynamo.reset()
        module = fastclip.ClipLoss(local, with_grad, rank=rank, world_size=world)
        results = []
        graph = torch.compile(module, fullgraph=True, backend="aot_eager")
        for function in (graph, module):
            # another batch size than the first is compiled for any
            for rows in (4, 6):
                x, y = (unit(rows, WIDTH, i).requires_grad_() for i in (rank, 9 + rank))
                scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
                results += torch.autograd.grad(function(x, y, scale), (x, y, scale))
        half = len(results) // 2
        equal.append(all(map(close, results[:half], results[half:])))
    for name in ("clip", "clip_smoothed_grouped", "siglip", "mp_nce", "sup_con"):
        torch._dynamo.reset()
        own = share(name, make(name, world), world, rank)

        def loss(*leaves: Tensor, name: str = name, own: Case = own) -> Tensor:
            options = {"dist": "gather", "sizes": SIZES[world]}
            return LOSSES[name].run(list(leaves), own.static, **options)

        results = []
        graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for function in (graph, loss):
            leaves = [leaf.clone().requires_grad_() for leaf in own.leaves]
            results.append([*torch.autograd.grad(function(*leaves), leaves)])
        equal.append(all(close(a, b) for a, b in zip(*results, strict=True)))
    return equal


def subgroup(rank: int) -> dict[str, Any]:
    """CLIP's loss among ranks 1 and 3 only."""
    members = [1, 3]
    group = dist.new_group(members)
    found = {}
    if rank in members:
        case = make("clip", 2)
        for exchange in EXCHANGES:
            options = {"dist": exchange, "group": group}
            found[exchange] = run_share("clip", case, 2, members.index(rank), **options)
    else:
        with pytest.raises(ValueError, match="not in the group"):
            functional.clip_loss(*make("clip", 2).leaves, dist="gather", group=group)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    folders: dict[int, Path] = {}
    # read once: there are hundreds of tensors
    found: dict[int, list[Any]] = {}

    def get(world: int) -> Any:
        if world not in folders:
            folders[world] = tmp_path_factory.mktemp("ranks")
            on_ranks(work, (world, str(folders[world])), ranks=world)
        if world not in found:
            # none there: the ranks failed in an earlier test
            paths = [folders[world] / f"rank{rank}.pt" for rank in range(world)]
            found[world] = [torch.load(path) for path in paths]
        return found[world]

    return get


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).norm() <= 1e-12 * max(want.norm().item(), 1.0))


def check_against_whole(name: str, case: Case, world: int, results: list[dict], reduction: str):
    """One process's loss and gradients, from the definition, against all ranks'."""
    base = name.removesuffix("_hard")
    blocks = {"mp_nce": 3, "nt_xent": 2}.get(base, 1)
    if reduction == "mean":
        loss, *gradients = theirs(base, case)
        factor = world
        for result in results:
            assert close(result["loss"], loss), name
    else:
        leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
        per_anchor = LOSSES[base].oracle(*leaves, static=case.static)
        weights = torch.arange(1, len(per_anchor) + 1, dtype=torch.float64)
        gradients = torch.autograd.grad((per_anchor * weights).sum(), leaves)
        factor = 1
        sizes = SIZES[world]
        for rank, result in enumerate(results):
            parts = per_anchor.detach().split(sum(sizes))
            own = torch.cat([part.split(sizes)[rank] for part in parts])
            assert len(parts) == blocks and close(result["loss"], own), name
    whole = replace(case, leaves=list(gradients), static={})
    for rank, result in enumerate(results):
        wanted = share(name, whole, world, rank).leaves
        for index in range(case.features):
            assert close(result["gradients"][index], factor * wanted[index]), (name, index)
    for index in range(case.features, len(gradients)):
        total = sum(result["gradients"][index] for result in results)
        want = gradients[index]
        # tables are read with a <= b: nothing below the diagonal has a gradient of its own
        assert close(total / factor, want if want.ndim < 2 else want.triu()), (name, index)


@pytest.mark.dist
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", SIZES)
def test_ranks_equal_one_process(
    ranks: Callable[[int], Any], world: int, name: str, exchange: str, backend: str
) -> None:
    torch.manual_seed(0)
    case = make(name, world)
    for reduction in ("mean", "none"):
        results = [r[name, exchange, backend, reduction] for r in ranks(world)]
        check_against_whole(name, case, world, results, reduction)
    assert all(r[name, exchange, "same bits"] for r in ranks(world))


@pytest.mark.dist
@pytest.mark.parametrize("world", SIZES)
def test_accuracies_are_the_whole_batchs(ranks: Callable[[int], Any], world: int) -> None:
    for name in ("clip", "info_nce", "mp_nce", "nt_xent"):
        torch.manual_seed(0)
        case = make(name, world)
        metrics: dict[str, Tensor] = {}
        LOSSES[name].run(case.leaves, case.static, metrics=metrics)
        for exchange in EXCHANGES:
            for result in ranks(world):
                found = result[name, exchange, "torch", "mean"]["metrics"]
                assert found.keys() == metrics.keys()
                assert all(abs(found[key] - metrics[key]) < 1e-12 for key in metrics)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3, 4])
def test_bytes_exchanged(ranks: Callable[[int], Any], world: int) -> None:
    """At most 0.55 and 0.8 of open_clip's bytes; what is sent is what the formulas say."""
    rows, width = 32, 64
    for results in ranks(world):
        for dtype in (torch.float32, torch.bfloat16):
            eager = results["counts"]["gather"]["open_clip", dtype]["outside"]
            block = (world - 1) * rows * width * dtype.itemsize
            assert eager == 4 * block
            statistics = 16 * (world - 1) * rows
            for exchange, products, most in (("gather", 2, 0.55), ("ring", 3, 0.8)):
                count = results["counts"][exchange]["clip", dtype]
                # and the loss itself, summed over the ranks
                assert 0 <= count["inside"] - products * block - statistics <= 8
                assert count["inside"] <= most * eager
            for exchange in EXCHANGES:
                for name in ("siglip", "info_nce", "nt_xent", "sup_con"):
                    count = results["counts"][exchange][name, dtype]
                    assert abs(count["inside"] - count["outside"]) <= 8
                siglip = results["counts"][exchange]["siglip", dtype]["inside"]
                assert 0 <= siglip - 2 * block <= 8


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3, 4])
def test_products_of_a_rank(ranks: Callable[[int], Any], world: int) -> None:
    """In units of n x N x D: open_clip needs 6. Symmetric losses: of a strip of its own blocks."""
    twice = {"clip": 4, "siglip": 3, "info_nce": 3, "nt_xent": 3 * 4, "sup_con": 3}
    once = {"clip": 3, "siglip": 3, "info_nce": 3, "nt_xent": 2 * 4, "sup_con": 2}
    for results, exchange, (keep, wanted) in product(
        ranks(world), EXCHANGES, (("", once), (" twice", twice))
    ):
        for name, products in wanted.items():
            if (exchange, name) == ("ring", "info_nce"):
                # a row comes in parts
                products = 4 if keep else 3
            assert results["counts"][exchange][name + keep, torch.float32]["products"] == products


@pytest.mark.dist
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world", [2, 4])
def test_low_precision_keeps_the_error_rule(
    ranks: Callable[[int], Any], world: int, exchange: str
) -> None:
    """bf16 and float16 features, partial gradients exchanged in them; fused implementations.

    A partial gradient is rounded once on its exchange, so a gradient of W of them has W roundings.
    """
    for name in ("clip", "siglip", "mp_nce", "sup_con"):
        case = make(name, world)
        for dtype, backend in LOW_PRECISION:
            low = case.cast(dtype)
            eager, truth = theirs(name, low), theirs(name, low.double())
            results = [r["low precision"][exchange][name, dtype, backend] for r in ranks(world)]
            gradients = replace(case, leaves=truth[1:], static={})
            eps = torch.finfo(dtype).eps
            for rank, result in enumerate(results):
                wanted = share(name, gradients, world, rank).leaves
                for index in range(case.features):
                    error = (result[1 + index] / world - wanted[index]).abs().max()
                    own_error = (eager[1 + index].double() - truth[1 + index]).abs().max()
                    units = (8 + world) * eps + 18 * torch.finfo(torch.float32).eps
                    size = max(truth[1 + index].abs().max().item(), 1 / divisor(name, case))
                    assert error <= 2 * own_error + units * size, (name, dtype, backend, index)


@pytest.mark.dist
@pytest.mark.parametrize("world", SIZES)
def test_fewer_keys_than_queries(ranks: Callable[[int], Any], world: int) -> None:
    for results in ranks(world):
        assert results["few keys"] == [True] * 12


@pytest.mark.dist
@pytest.mark.parametrize("world", SIZES)
def test_one_rank_alone_forms_its_share_again(ranks: Callable[[int], Any], world: int) -> None:
    for results in ranks(world):
        assert results["flagged"] == [True] * 2


@pytest.mark.dist
@pytest.mark.parametrize("world", SIZES)
def test_means_of_more_columns_than_rows(ranks: Callable[[int], Any], world: int) -> None:
    for results in ranks(world):
        assert results["means"] == [True] * 16


@pytest.mark.dist
def test_graphs_have_no_break(ranks: Callable[[int], Any]) -> None:
    for results in ranks(2):
        assert results["compiled"] == [True] * 9


@pytest.mark.dist
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_any_process_group(ranks: Callable[[int], Any], exchange: str) -> None:
    results = [r["subgroup"][exchange] for r in ranks(4) if r["subgroup"]]
    check_against_whole("clip", make("clip", 2), 2, results, "mean")


def test_the_process_group_ends_where_it_is_destroyed() -> None:
    """In a process whose first loss comes after the group: torch's own imports would keep it."""
    code = """
import os
import torch
import torch.distributed as dist
from fastclip.functional import clip_loss

def threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
assert threads() > 0
clip_loss(torch.ones(2, 3), torch.ones(2, 3), torch.tensor(1.0), dist="gather")
dist.destroy_process_group()
assert threads() == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)
