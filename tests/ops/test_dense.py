"""S of small batches, whole: exactness, when it is taken, and what it keeps."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastclip import functional, native
from fastclip.functional import clip_loss, siglip_loss, sup_con_loss
from fastclip.ops import dense, dense_step
from fastclip.ops.gemm import count_products
from tests.ops.cases import (
    LOSSES,
    Case,
    check_each_input_alone,
    check_error_rule,
    check_kept_graph,
    check_lines_far_apart,
    check_metrics,
    check_nan_shows,
    check_same_bits,
    check_ties_and_zero_rows,
    ours,
    pairwise,
    theirs,
    unit,
)

pytestmark = pytest.mark.skipif(
    not native.has_float_product(), reason=f"the native library: {native.unavailable_reason()}"
)

INSTRUCTIONS = [None] if native.unavailable_reason() else native.library().usable_instructions()
FACTORS: dict[str, list[Any]] = {
    "name": list(LOSSES),
    "n": [1, 2, 17, 65, 129, 300],
    "width": [1, 16, 77],
    "scale": [0.1, 14.3, 100.0, 1e4],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "extra": [0, 1, 40],
    "autocast": [False, True],
    "per_anchor": [False, True],
    "threads": [1, 2, 3],
    "instructions": INSTRUCTIONS,
}
SYMMETRIC = ("nt_xent", "mp_nce", "sup_con")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads, instructions = torch.get_num_threads(), native.library().instructions()
    yield
    torch.set_num_threads(threads)
    native.library().use_instructions(instructions)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every loss by way of a whole S."""
    made: list[Any] = []
    original = dense_step.Dense.forward

    def forward(ctx: Any, call: Any, *inputs: Any) -> Tensor:
        made.append(call)
        return original(ctx, call, *inputs)

    monkeypatch.setattr(dense_step.Dense, "forward", staticmethod(forward))
    return made


def make(name: str, rows: int = 64, width: int = 16, scale: float = 9.0) -> Case:
    return LOSSES[name].make(rows, width, scale, 0.3, seed=1).cast(torch.float32)


@pytest.mark.parametrize(
    "case", list(pairwise(FACTORS, seed=0)), ids=lambda case: "-".join(map(str, case.values()))
)
def test_pairwise_coverage(case: dict[str, Any], calls: list[Any]) -> None:
    """Every two values of different factors meet in some case."""
    native.library().use_instructions(case["instructions"])
    torch.set_num_threads(case["threads"])
    name, n, dtype, autocast = case["name"], case["n"], case["dtype"], case["autocast"]
    inputs = LOSSES[name].make(
        n, case["width"], case["scale"], 0.3, seed=n + case["width"], extra=case["extra"]
    )
    inputs = inputs.cast(dtype)
    got = ours(name, inputs, autocast=autocast, per_anchor=case["per_anchor"])
    assert len(calls) == 1
    assert all(g.dtype == leaf.dtype for g, leaf in zip(got[1:], inputs.leaves, strict=True))
    eager = theirs(name, inputs, autocast=autocast)
    eps = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    check_error_rule(name, got, eager, theirs(name, inputs.double()), inputs, eps, case)


@pytest.mark.parametrize("name", LOSSES)
def test_hard_inputs(name: str) -> None:
    check_lines_far_apart(name, "auto")
    check_nan_shows(name, make(name))
    check_ties_and_zero_rows(name, lambda: make(name), "auto")


@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e-44, -7.0, 1e-4])
@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("nt_xent", "sup_con")])
def test_scales_at_the_ends_of_their_range(name: str, scale: float, calls: list[Any]) -> None:
    case = LOSSES[name].make(30, 6, 1.0, 0.3, seed=5)
    case.leaves[case.features] *= scale
    case = case.cast(torch.float32)
    for got, want in zip(ours(name, case), theirs(name, case.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_same_bits_every_time(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    check_same_bits(name, make(name, 400, 8), 50 if threads == 1 else 10)


@pytest.mark.parametrize("name", LOSSES)
def test_a_kept_graph_gives_the_same_gradients_again(name: str, calls: list[Any]) -> None:
    check_kept_graph(name, make(name))
    assert len(calls) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_each_input_alone_has_its_gradient(name: str, reduction: str, calls: list[Any]) -> None:
    inputs = check_each_input_alone(name, reduction)
    assert len(calls) == inputs


@pytest.mark.parametrize("name", ["clip", "clip_grouped", "info_nce_index", "nt_xent", "mp_nce"])
def test_metrics_are_the_operators(name: str) -> None:
    check_metrics(name)


X = [unit(8, 4, seed).float() for seed in (0, 1)]


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


LEFT_TO_OPERATORS: dict[str, Callable[[], Any]] = {
    "backend": lambda: functional.clip_loss(*X, 5.0, backend="torch"),
    "chunk": lambda: functional.clip_loss(*X, 5.0, chunk_bytes=64),
    "subclass": lambda: functional.clip_loss(X[0].as_subclass(_Subclass), X[1], 5.0),
    "meta": lambda: functional.clip_loss(*(x.to("meta") for x in X), 5.0),
    "vmap": lambda: torch.func.vmap(lambda x: functional.clip_loss(x, X[1], 5.0))(X[0][None]),
}


@pytest.mark.parametrize("name", LEFT_TO_OPERATORS)
def test_what_is_out_of_the_ordinary_is_left_to_the_operators(name: str, calls: list[Any]) -> None:
    try:
        LEFT_TO_OPERATORS[name]()
    except RuntimeError as error:
        # no rule for vmap
        assert name == "vmap", error
    assert not calls


def test_it_is_switched_off(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with _Watching():
        functional.siglip_loss(*X, 5.0)
    with dense.switched_off():
        functional.siglip_loss(*X, 5.0)
    with monkeypatch.context() as patch:
        patch.setenv("FASTCLIP_BACKEND", "torch")
        functional.siglip_loss(*X, 5.0)
    with monkeypatch.context() as patch:
        patch.setitem(dense.ENTRIES, ("cpu", "siglip"), 63)
        functional.siglip_loss(*X, 5.0)
    assert not calls
    functional.siglip_loss(*X, 5.0)
    assert len(calls) == 1


@pytest.mark.parametrize("name", LOSSES)
def test_one_table_is_saved(name: str) -> None:
    """Beside the features: S, and a few lines of rows."""
    case = make(name, 256, 8)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        LOSSES[name].run(leaves, case.static)
    rows = sum(map(len, leaves[: case.features])) if name in SYMMETRIC else 256
    columns = 2 * 256 + 3 if name == "info_nce_bank" else rows
    assert sum(saved.values()) <= rows * columns + 4 * columns * 8 + 12 * rows


@pytest.mark.parametrize("name", LOSSES)
def test_products_are_counted(name: str) -> None:
    case = make(name, 48)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    rows = sum(map(len, leaves[: case.features])) if name in SYMMETRIC else 48
    columns = 2 * 48 + 3 if name == "info_nce_bank" else rows
    with count_products() as count:
        loss = LOSSES[name].run(leaves, case.static)
    assert count.products_of(rows, columns, 16) == 1
    with count_products() as count:
        loss.backward()
    # a bank's columns have no gradient
    columns_share = 48 / columns if name == "info_nce_bank" else 1
    assert count.products_of(rows, columns, 16) == 1 + (name not in SYMMETRIC) * columns_share


def test_a_wrong_blas_is_not_used() -> None:
    """Its products are tried out before it is."""
    library = native.library()
    try:
        assert not library.use_blas(0)
    finally:
        assert library.use_blas(native._in_torch("sgemm_"))


def test_a_budget_that_is_given_holds_for_small_batches_too() -> None:
    case = make("clip", 64, 8)
    leaves = [leaf.float().requires_grad_() for leaf in case.leaves]
    whole = 4 * 64 * 64
    for budget, keeps in ((whole, True), (whole - 1, False), (0, False)):
        largest = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal largest
            largest = max(largest, tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            functional.clip_loss(*leaves, keep_bytes=budget)
        assert (largest >= whole) == keeps, budget
    with pytest.raises(ValueError, match="give a whole number of bytes"):
        functional.clip_loss(*leaves, keep_bytes=1e9)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["", "auto"])
def test_the_environment_asks_for_nothing(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_BACKEND", value)
    x = make("clip", 16, 8).leaves[0].float()
    with count_products() as count:
        functional.clip_loss(x, x, 9.0)
        functional.clip_loss(x, x, 9.0, chunk_bytes=1 << 20)
    assert count.calls > 0
    assert dense.environment_backend() == "auto"


def test_a_scalar_with_a_lazy_sign_is_read_with_it() -> None:
    x = torch.nn.functional.normalize(torch.randn(6, 4), dim=-1)
    lazy = torch.tensor(1 + 2j).conj().imag
    assert lazy.is_neg() and lazy.item() == -2
    for loss in (clip_loss, siglip_loss):
        assert torch.equal(loss(x, x.roll(1, 0), lazy), loss(x, x.roll(1, 0), torch.tensor(-2.0)))


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_features_get_the_usual_error(layout: str) -> None:
    x = torch.eye(4)
    for pair in ((getattr(x, layout)(), x), (x, getattr(x, layout)())):
        with pytest.raises(ValueError, match="are sparse"):
            clip_loss(*pair, 2.0)


@pytest.mark.parametrize("backend", ["auto", "cpp", "torch"])
def test_a_loss_without_an_lse_has_no_finite_gradient(backend: str) -> None:
    """Logits beyond 2^24 have no correct digit: neighbors in float32 are 2 apart."""
    z = torch.eye(10, 12)
    z[:2] = 0.0
    z[:2, 0] = 3e4
    z.requires_grad_()
    labels = torch.tensor([2, 3, 2, 2, 3, 3, 4, 4, 5, 5])
    loss = sup_con_loss(z, labels, 0.07, backend=backend)
    loss.backward()
    assert loss.isnan() and z.grad is not None and z.grad[:2].isnan().any()
