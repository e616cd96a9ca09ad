"""What holds for every loss: memory, determinism, counts, compilation, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastclip
from fastclip import native
from fastclip.ops import dense, distillation, kept, problem
from fastclip.ops.gemm import count_products
from tests.ops.cases import LOSSES, Case, ours, theirs

# products of rows x columns x width: forward, backward, and backward where S is kept; symmetric
# losses visit a pair once, and the squares on their diagonal twice
PRODUCTS = {
    "clip": (1, 3, 2),
    "clip_smoothed": (1, 3, 2),
    "clip_smoothed_grouped": (1, 3, 2),
    "clip_grouped": (1, 3, 2),
    "siglip": (3, 0, 0),
    "info_nce": (3, 0, 0),
    "info_nce_index": (3, 0, 0),
    "nt_xent": (0.5, 1.5, 1),
    "mp_nce": (0.5, 1.5, 1),
    "sup_con": (0.5, 1.5, 1),
}
SYMMETRIC = ("nt_xent", "mp_nce", "sup_con")


@pytest.fixture(params=["torch", "cpp"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "cpp" and native.unavailable_reason():
        pytest.skip(f"the native library: {native.unavailable_reason()}")
    monkeypatch.setenv("FASTCLIP_BACKEND", request.param)


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kept.KEEP_BYTES, "cpu", 0)


def make(name: str, rows: int = 384, width: int = 16) -> Case:
    return LOSSES[name].make(rows, width, 9.0, 0.3, seed=1).cast(torch.float32)


def leaves_of(case: Case) -> list[Tensor]:
    return [leaf.clone().requires_grad_() for leaf in case.leaves]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("keep_bytes", [0, 10**5, 1 << 24])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_square_is_saved_but_for_the_budget(
    name: str, reduction: str, keep_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, width = 2048, 8
    case = make(name, rows, width)
    monkeypatch.setitem(kept.KEEP_BYTES, "cpu", keep_bytes)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        LOSSES[name].run(leaves_of(case), case.static, reduction=reduction)
    columns = 2 * rows + 3 if name == "info_nce_bank" else rows
    square = [numel for numel in saved if numel > columns * width]
    assert len(square) <= 1 and sum(square) <= keep_bytes // 4
    assert sum(saved) - sum(square) <= 4 * columns * width + 60 * rows


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("keep_bytes", [0, 1 << 24])
@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_products_are_counted(
    name: str, keep_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kept.KEEP_BYTES, "cpu", keep_bytes)
    case = make(name)
    rows = sum(len(leaf) for leaf in case.leaves[: case.features])
    rows = rows if name in SYMMETRIC else len(case.leaves[0])
    chunk_bytes = 4 * rows * 12
    slack = 12 / rows if name in SYMMETRIC else 0.0
    with count_products() as count:
        loss = LOSSES[name].run(leaves_of(case), case.static, chunk_bytes=chunk_bytes)
    forward, again, once = PRODUCTS[name]
    backward = once if keep_bytes else again
    assert forward <= count.products_of(rows, rows, 16) <= forward + slack
    with count_products() as count:
        loss.backward()
    assert backward <= count.products_of(rows, rows, 16) <= backward + 3 * slack
    with count_products() as count, torch.no_grad():
        LOSSES[name].run(leaves_of(case), case.static, chunk_bytes=chunk_bytes)
    loss_only = 0.5 if name in SYMMETRIC else 1
    assert loss_only <= count.products_of(rows, rows, 16) <= loss_only + slack


@pytest.mark.usefixtures("implementation")
def test_frozen_inputs_cost_no_product() -> None:
    case = make("info_nce_bank", 64)
    bank = 64 + 3
    query, keys, scale = leaves_of(case)
    for frozen, expected in (((), 2 * bank), ((keys,), 2 * bank), ((query, keys), bank)):
        inputs = [t.detach() if any(t is f for f in frozen) else t for t in (query, keys, scale)]
        with count_products() as count:
            LOSSES["info_nce_bank"].run(inputs, case.static)
        # keys are positives only, the bank is frozen: S and dX
        assert count.flop == 2 * 64 * expected * 16
    case = make("siglip", 64)
    image, text, scale, bias = leaves_of(case)
    with count_products() as count:
        LOSSES["siglip"].run([image, text.detach(), scale, bias], case.static)
    assert count.products_of(64, 64, 16) == 2


@pytest.mark.parametrize("keep_bytes", [0, 1 << 24])
@pytest.mark.parametrize("name", ["clip", "siglip", "info_nce", "nt_xent", "sup_con"])
def test_flop_counter_sees_the_operators(
    name: str, keep_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kept.KEEP_BYTES, "cpu", keep_bytes)
    case = make(name, 32)
    with FlopCounterMode(display=False) as counter:
        LOSSES[name].run(leaves_of(case), case.static).backward()
    forward, again, once = PRODUCTS[name]
    products = forward + (once if keep_bytes else again)
    assert counter.get_total_flops() == products * 2 * 32 * 32 * 16


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("name", LOSSES)
def test_same_bits_every_time(name: str) -> None:
    case = make(name, 192, 24)
    first = ours(name, case, chunk_bytes=4 * 192 * 40)
    for _ in range(50):
        again = ours(name, case, chunk_bytes=4 * 192 * 40)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_without_a_graph_break(name: str, autocast: bool) -> None:
    torch._dynamo.reset()
    case = make(name, 24, 8)

    def loss(*leaves: Tensor) -> Tensor:
        return LOSSES[name].run(list(leaves), case.static)

    results = []
    for function in (torch.compile(loss, fullgraph=True), loss):
        leaves = leaves_of(case)
        # what is traced takes the operators in any case
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), dense.switched_off():
            value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_one_graph_serves_all_batch_sizes() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(fastclip.functional.clip_loss, fullgraph=True)
    for rows in (8, 16, 24):
        x, y = (torch.nn.functional.normalize(torch.randn(rows, 4), dim=-1) for _ in range(2))
        want = fastclip.functional.clip_loss(x, y, 9.0)
        torch.testing.assert_close(compiled(x, y, 9.0), want)
    # one for the first size, one for any other
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize(
    "dtype, compute_dtype",
    [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_opcheck(dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    case = LOSSES["clip"].make(5, 4, 3.0, 0.3, 1, 2).cast(dtype)
    x, y = (leaf.requires_grad_() for leaf in case.leaves[:2])
    scale = torch.tensor(3.0, dtype=dtype, requires_grad=True)
    bias = torch.tensor([-1.0], dtype=dtype, requires_grad=True)
    table = torch.rand(2, 2, dtype=dtype).requires_grad_()
    index, group = torch.tensor([0, 6, 6, 2, 1]), torch.tensor([0, 0, 1, 2, 3])
    ops = torch.ops.fastclip

    def check(name: str, *inputs: Any, **others: Any) -> None:
        options = problem.options(compute_dtype, "torch", 0, None, **others)
        torch.library.opcheck(getattr(ops, name).default, inputs, options)

    statistics = "similarity_statistics"
    for columns, means in ((True, True), (True, False), (False, False)):
        optional = (None,) * 5
        check(statistics, x, y, scale, *optional, column_statistics=columns, means=means)
    ids = group, torch.arange(7)
    check(statistics, x, y, scale, None, None, None, *ids, column_statistics=True)
    biases = (torch.rand(rows, dtype=dtype).requires_grad_() for rows in (5, 7))
    check(statistics, x, y, scale, *biases, None, *ids, column_statistics=True)
    weights = torch.rand(5, 1, dtype=dtype).requires_grad_()
    for needs in ((True, True, True), (True, False, False), (False, False, False)):
        inputs = [t if need else t.detach() for t, need in zip((x, y, scale), needs, strict=True)]
        for given in (None, weights) if all(needs) else (None,):
            options = {"columns_with_gradient": 6, "needs": (*needs, given is weights)}
            check("info_nce", *inputs, given, index, None, None, **options)
            check("info_nce", *inputs, given, None, *ids, **options)
        groups = (None, None) if needs[1] else (group, group)
        inputs = [inputs[0], inputs[1][:5], inputs[2], bias if needs[2] else None]
        for given in (None, weights) if all(needs) else (None,):
            all_needs = *needs, needs[2], given is weights
            check("sigmoid_sum", *inputs, given, *groups, needs=all_needs)
        inputs += groups
        check("sigmoid_rows", *inputs)
        # only what is needed is made
        upstream = torch.ones(5, dtype=dtype)
        inputs = [t if t is None else t.detach() for t in inputs]
        check("sigmoid_rows_backward", *inputs, upstream, needs=(*needs, needs[2]))
    z = torch.cat([x, x.detach()]).detach().requires_grad_()
    for offset in (table, None):
        check("block_statistics", z, table, offset, None, domains=(0, 1))
    check("block_statistics", z, table, table, group, domains=(0, 1))
    labels = torch.tensor([1, 1, 2, 3, 3, 3, 3, 9, 9, 0])
    check("label_statistics", z, scale, labels, domains=(0,))
    teacher = [t.detach() for t in (x, y[:5], scale)]
    student = (x, y[:5].detach().requires_grad_(), scale)
    for columns in (True, False):
        torch.library.opcheck(
            distillation._distillation._opoverload,
            (*student, *teacher),
            {
                "dtype": compute_dtype,
                "teacher_dtype": compute_dtype,
                "chunk_bytes": 0,
                "columns": columns,
                "needs": (),
            },
        )
    upstream = torch.tensor(2.0, dtype=dtype)
    torch.library.opcheck(ops.apply_upstream.default, (x.detach(), upstream, x.detach()))


@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_that_are_not_there_are_reported(name: str) -> None:
    case = LOSSES[name].make(6, 3, 4.0, 0.3, seed=1)
    leaves = leaves_of(case)
    (dx,) = torch.autograd.grad(LOSSES[name].run(leaves, case.static), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        dx.sum().backward()
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(
            lambda x: LOSSES[name].run([x, *case.leaves[1:]], case.static),
            (case.leaves[0],),
            (case.leaves[0],),
        )

    def first(x: Tensor) -> Tensor:
        return LOSSES[name].run([x, *case.leaves[1:]], case.static, backend="reference")

    assert torch.autograd.gradgradcheck(first, (leaves[0],))


@pytest.mark.parametrize("name", ["clip", "siglip", "info_nce", "mp_nce"])
def test_a_loss_scale_before_float16(name: str) -> None:
    """Gradients are multiplied by the upstream gradient before they become float16."""
    case = LOSSES[name].make(300, 16, 14.3, 0.3, seed=1).cast(torch.float16)
    leaves = leaves_of(case)
    (LOSSES[name].run(leaves, case.static) * 65536.0).backward()
    exact = [leaf.clone().requires_grad_() for leaf in case.double().leaves]
    (LOSSES[name].run(exact, case.static) * 65536.0).backward()
    for got, want in zip(leaves[:2], exact[:2], strict=True):
        assert got.grad.dtype == torch.float16
        assert (got.grad.double() - want.grad).norm() <= 1e-3 * want.grad.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_a_kept_graph_gives_the_same_gradients_again(name: str) -> None:
    """What a forward saved is spent by the last backward alone."""
    case = LOSSES[name].make(40, 8, 14.3, 0.3, seed=1)
    leaves = leaves_of(case)
    loss = LOSSES[name].run(leaves, case.static) * -3.0
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for got, want in zip(first, theirs(name, case)[1:], strict=True):
        torch.testing.assert_close(got, -3.0 * want, rtol=1e-9, atol=1e-9)
    with_graph = torch.autograd.grad(loss, leaves, create_graph=True)
    for found in (with_graph, torch.autograd.grad(loss, leaves)):
        for got, want in zip(found, first, strict=True):
            assert torch.equal(got, want)


def test_the_last_backward_makes_no_second_copy() -> None:
    """Gradients of the forward are multiplied where they lie, unless somebody may ask again."""
    x = torch.nn.functional.normalize(torch.randn(64, 32), dim=-1).requires_grad_()
    y = x.detach().clone().requires_grad_()
    for keep in (True, False):
        with dense.switched_off():
            loss = fastclip.functional.siglip_loss(x, y, torch.tensor(10.0, requires_grad=True))
        kept = loss.grad_fn.next_functions[0][0].saved_tensors
        saved = {t.data_ptr() for t in kept if t is not None}
        gradients = torch.autograd.grad(loss, (x, y), retain_graph=keep)
        assert all(g.data_ptr() in saved for g in gradients) == (not keep)
