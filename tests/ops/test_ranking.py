"""The ranking loss: directions, partitions, hardness, against its definition in float64."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.functional import ranking_loss
from fastclip.ops.gemm import count_products
from tests.ops.cases import unit
from tests.processes import on_ranks

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")
WIDTH = 5
SIZES = (4, 2, 3)


def oracle(
    query: Tensor,
    documents: list[Tensor],
    scale: Tensor,
    directions: tuple[str, ...] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
) -> Tensor:
    """Query by query: every logit, its weight and whether it is there, from the definition."""
    n = len(query)
    losses = []
    for i in range(n):
        of_direction: dict[str, list[Tensor]] = {name: [] for name in directions}
        for block, j in itertools.product(range(len(documents)), range(n)):
            cosine = torch.dot(query[i], documents[block][j])
            weighed = {
                None: False,
                "all_negatives": (block, j) != (0, i),
                "in_batch_negatives": j != i,
                "hard_negatives": block > 0 and j == i,
            }[hardness_mode]
            penalty = hardness_strength * cosine.detach() if weighed else 0.0
            of_direction["query_to_doc"].append(scale * cosine + penalty)
            if "doc_to_doc" in directions and j != i:
                other = torch.dot(documents[0][i], documents[block][j])
                of_direction["doc_to_doc"].append(scale * other)
        for j in range(n):
            if "query_to_query" in directions and j != i:
                of_direction["query_to_query"].append(scale * torch.dot(query[i], query[j]))
            if "doc_to_query" in directions:
                of_direction["doc_to_query"].append(scale * torch.dot(query[j], documents[0][i]))
        positive = scale * torch.dot(query[i], documents[0][i])
        if partition_mode == "joint":
            every = torch.stack([logit for logits in of_direction.values() for logit in logits])
            losses.append(every.logsumexp(0) - positive)
        else:
            each = [torch.stack(logits).logsumexp(0) for logits in of_direction.values()]
            losses.append(torch.stack(each).mean() - positive)
    return torch.stack(losses)


def inputs(rows: int, blocks: int, scale: float = 9.0) -> list[Tensor]:
    """Queries, documents, the scale."""
    query = unit(rows, WIDTH, 0)
    documents = [
        torch.nn.functional.normalize(query + 0.8 * unit(rows, WIDTH, 1 + b), dim=1)
        for b in range(blocks)
    ]
    return [query, *documents, torch.tensor(scale, dtype=torch.float64)]


def with_gradients(loss: Any, leaves: list[Tensor], weight: Tensor | None = None) -> list[Tensor]:
    """Value and gradients of features, then of the scale."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    value = loss(leaves[0], leaves[1:-1], leaves[-1])
    total = value if weight is None else (value * weight).sum()
    return [value.detach(), *torch.autograd.grad(total, leaves)]


def check(got: list[Tensor], want: list[Tensor], limit: float = 1e-12) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= limit * max(other.abs().max().item(), 1.0)


def options(directions: tuple[str, ...], partition: str, mode: str | None) -> dict[str, Any]:
    strength = 0.0 if mode is None else 5.0
    return {
        "directions": directions,
        "partition_mode": partition,
        "hardness_mode": mode,
        "hardness_strength": strength,
    }


SUBSETS = [
    ("query_to_doc", *others)
    for count in range(4)
    for others in itertools.combinations(ALL[1:], count)
]
CHOICES = [options(found, "joint", mode) for found in SUBSETS for mode in (None, *MODES)]
CHOICES += [
    options(found, "per_direction", mode)
    for found in (("query_to_doc",), ("query_to_doc", "doc_to_query"))
    for mode in (None, *MODES)
]


def name_of(choice: dict[str, Any]) -> str:
    return "-".join(map(str, (len(choice["directions"]), *list(choice.values())[1:3])))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_values_and_gradients(blocks: int, backend: str) -> None:
    """Of each query, every choice."""
    leaves, weight = inputs(6, blocks), torch.linspace(0.3, 1.2, 6, dtype=torch.float64)
    for choice in CHOICES:

        def ours(q: Tensor, d: list[Tensor], s: Tensor, choice: dict = choice) -> Tensor:
            return ranking_loss(q, d, s, **choice, reduction="none", backend=backend)

        def definition(q: Tensor, d: list[Tensor], s: Tensor, choice: dict = choice) -> Tensor:
            return oracle(q, d, s, **choice)

        check(with_gradients(ours, leaves, weight), with_gradients(definition, leaves, weight))


@pytest.mark.parametrize("choice", [CHOICES[3], CHOICES[-5], CHOICES[2]], ids=name_of)
def test_each_implementation_in_float32(choice: dict[str, Any]) -> None:
    leaves = inputs(6, 2)
    want = with_gradients(lambda *a: oracle(*a, **choice).mean(), leaves)
    for backend in ("auto", "triton", "torch", "cpp"):
        narrow = [leaf.float() for leaf in leaves]
        got = with_gradients(lambda *a, b=backend: ranking_loss(*a, **choice, backend=b), narrow)
        check(got, want, 2e-6)
    assert got[1].dtype == torch.float32


def test_one_row_and_a_scale_that_is_a_number() -> None:
    """A lone query is only compared with its own documents, without an infinite gradient."""
    for blocks, choice in itertools.product((1, 2), CHOICES):
        leaves = inputs(1, blocks)
        query, documents = leaves[0].requires_grad_(), leaves[1:-1]
        got = ranking_loss(query, documents, 9.0, **choice)
        want = oracle(query, documents, torch.tensor(9.0).double(), **choice).mean()
        check([got, *torch.autograd.grad(got, query)], [want, *torch.autograd.grad(want, query)])


def products(choice: dict[str, Any], blocks: int, keep: int | None) -> float:
    """In products of the queries with all documents."""
    leaves = [leaf.float().requires_grad_() for leaf in inputs(64, blocks)]
    with count_products() as count:
        loss = ranking_loss(
            leaves[0], leaves[1:-1], leaves[-1], **choice, backend="torch", keep_bytes=keep
        )
        loss.backward()
    return count.products_of(64, 64 * blocks, WIDTH)


def test_hardness_costs_no_product() -> None:
    """Kept exponentials or not, but where documents are compared with queries beside it."""
    one, both = ("query_to_doc",), ("query_to_doc", "doc_to_query")
    assert products(options(one, "joint", None), 2, None) == 3
    for mode in MODES:
        assert products(options(one, "joint", mode), 2, None) == 3
        assert products(options(one, "joint", mode), 2, 0) == 4
    symmetric = products(options(both, "per_direction", None), 1, None)
    assert symmetric == 3
    assert products(options(both, "per_direction", "hard_negatives"), 2, None) == 3
    assert products(options(both, "per_direction", "all_negatives"), 1, None) == 6


@pytest.mark.parametrize("choice", [CHOICES[3], CHOICES[30]], ids=name_of)
def test_it_compiles_whole(choice: dict[str, Any]) -> None:
    torch._dynamo.reset()
    leaves = [leaf.float() for leaf in inputs(6, 2)]

    def loss(*arguments: Any) -> Tensor:
        return ranking_loss(*arguments, **choice)

    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    check(with_gradients(graph, leaves), with_gradients(loss, leaves), 1e-6)


def test_a_second_derivative_is_refused_with_hardness() -> None:
    """That of a logit whose penalty has no gradient is not that of the operator."""
    leaves = [leaf.requires_grad_() for leaf in inputs(4, 1)]
    choice = options(("query_to_doc",), "joint", "all_negatives")
    loss = ranking_loss(leaves[0], leaves[1:-1], leaves[-1], **choice, backend="reference")
    (first,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"directions": ("doc_to_query",)}, "needs 'query_to_doc'"),
        ({"directions": ("query_to_doc", "up")}, "directions have 'up'; use any of query_to_doc"),
        ({"directions": ALL, "partition_mode": "per_direction"}, "use partition_mode='joint'"),
        ({"partition_mode": "each"}, "use joint or per_direction"),
        ({"hardness_mode": "negatives"}, "use None or one of in_batch_negatives"),
        ({"hardness_strength": -1.0}, "hardness_strength is -1.0"),
        ({"hardness_strength": 5.0}, "hardness_strength is 5.0 without hardness_mode"),
        ({"hardness_strength": float("nan")}, "hardness_strength is nan"),
        ({"documents": []}, "documents are empty"),
        ({"documents": [unit(3, 5, 0), unit(2, 5, 0)]}, r"\(2, 5\) .* queries are \(3, 5\)"),
        ({"reduction": "max"}, "reduction is 'max'"),
    ],
)
def test_bad_input_is_refused(wrong: dict[str, Any], message: str) -> None:
    query, positive, scale = inputs(3, 1)
    given = {"documents": [positive], **wrong}
    with pytest.raises(ValueError, match=message):
        ranking_loss(query, logit_scale=scale, **given)


FEW = [CHOICES[0], CHOICES[3], CHOICES[-3], *CHOICES[28:32]]


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    own = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    found = []
    for blocks, exchange, choice in itertools.product((1, 3), ("gather", "ring"), FEW):
        *features, scale = inputs(sum(SIZES), blocks)
        found.append(
            with_gradients(
                lambda *a, exchange=exchange, choice=choice: ranking_loss(
                    *a, **choice, dist=exchange, sizes=SIZES
                ),
                [*(one[own] for one in features), scale],
            )
        )
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
def test_processes_share_it(tmp_path: Path) -> None:
    """Uneven rows: value, features' gradients times the number of processes, the scale's mean."""
    world = len(SIZES)
    on_ranks(work, (world, str(tmp_path)), ranks=world)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world)]
    cases = itertools.product((1, 3), ("gather", "ring"), FEW)
    for index, (blocks, _, choice) in enumerate(cases):
        want = with_gradients(
            lambda *a, choice=choice: oracle(*a, **choice).mean(),
            inputs(sum(SIZES), blocks),
        )
        each = [found[index] for found in ranks]
        for value, *_ in each:
            check([value], want[:1])
        got = [torch.cat([one[1 + f] for one in each]) / world for f in range(1 + blocks)]
        check(got, want[1:-1])
        check([sum(one[-1] for one in each) / world], want[-1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_of_16_bits_is_widened_before_the_strength_is_added(dtype: torch.dtype) -> None:
    """20 / (20 + 9) rounded to 8 bits would move the loss by a thousandth of it."""
    query, documents = unit(6, WIDTH, 1), unit(6, WIDTH, 2)
    options: dict[str, Any] = {"hardness_mode": "all_negatives", "hardness_strength": 9.0}
    want = oracle(query, [documents], torch.tensor(20.0).double(), **options)
    narrow = torch.tensor(20.0, dtype=dtype, requires_grad=True)
    got = ranking_loss(query.float(), [documents.float()], narrow, **options)
    torch.testing.assert_close(got.double(), want.mean(), rtol=1e-5, atol=1e-5)
