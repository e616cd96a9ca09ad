"""What operators ask of their inputs, at the borders."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import fastclip
from fastclip import functional
from fastclip.ops import checks, problem
from fastclip.ops.collectives import (
    Ranks,
    all_gather_rows,
    all_reduce_sum,
    all_to_all_rows,
    count_bytes,
    group_name,
    ranks_of,
    scale_gradient,
)
from fastclip.ops.columns import columns_of
from tests.ops.cases import unit

AUTOCAST = torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_dtypes_that_are_computed_in() -> None:
    for dtype, inside in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        features = torch.ones(2, 3, dtype=dtype)
        assert checks.compute_dtype_of(features, "auto") == dtype
        with AUTOCAST:
            assert checks.compute_dtype_of(features, "auto") == inside
            assert checks.compute_dtype_of(features, "input") == dtype


def test_tables_are_read_above_their_diagonal() -> None:
    table = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 4.0, 5.0], [-1.0, -1.0, 6.0]])
    want = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    # of more domains than are used, too
    for domains in (2, 3):
        assert torch.equal(checks.as_table("logit_scale", table, domains, table), want)
    for wrong in (table[:2], torch.ones(2, 2)):
        with pytest.raises(ValueError, match="P = 3 domains"):
            checks.as_table("logit_scale", wrong, 3, table)


def test_numbers_are_checked_to_their_border() -> None:
    checks.check_positive("temperature", 1e-30)
    assert checks.chunk_argument(1) == 1 and checks.chunk_argument(None) == 0
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="give a positive number"):
            checks.check_positive("temperature", value)
    for size in (0, -1, 1e6):
        with pytest.raises(ValueError, match=f"chunk_bytes is {size}; give a whole"):
            checks.chunk_argument(size)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, "0.07", [1.0]], ids=str)
def test_what_is_no_number_is_named(value: object) -> None:
    x = unit(4, 3, 0)
    for loss in (functional.clip_loss, functional.siglip_loss, functional.info_nce_loss):
        with pytest.raises(ValueError, match=r"logit_scale is .*; give a number or a tensor"):
            loss(x, x, value)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"temperature is .*; give a number or a tensor"):
        functional.nt_xent_loss(x, x, value)  # type: ignore[arg-type]


def test_what_are_no_dense_features_is_named() -> None:
    x = unit(4, 3, 0)
    for wrong, says in (
        (x.to_sparse(), "are sparse"),
        (x[:, :0], "at least one row and one column"),
        (x[:0], "at least one row and one column"),
        (x.numpy(), "are a ndarray; give a tensor"),
    ):
        with pytest.raises(ValueError, match=says):
            checks.check_features("features", wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row_group is a list; give a tensor"):
        functional.clip_loss(x, x, 1.0, row_group=[1] * 4, column_group=[1] * 4)  # type: ignore[arg-type]


def test_a_mistyped_implementation_is_named_when_a_loss_is_made() -> None:
    for loss in (
        *(fastclip.ClipLoss, fastclip.SigLipLoss, fastclip.InfoNCELoss, fastclip.NTXentLoss),
        *(fastclip.MPNCELoss, fastclip.SupConLoss),
    ):
        with pytest.raises(ValueError, match="'tritn' of similarity is unknown; use 'auto'"):
            loss(backend="tritn")


def test_ids_are_checked() -> None:
    device = torch.device("cpu")
    for dtype in (torch.int32, torch.int64):
        checks.check_ids("labels", torch.ones(4, dtype=dtype), 4, device)
    for dtype in (torch.int16, torch.uint8, torch.bool, torch.float32):
        with pytest.raises(ValueError, match=f"labels is {dtype}"):
            checks.check_ids("labels", torch.ones(4, dtype=dtype), 4, device)


def test_dtypes_of_a_pair_are_checked() -> None:
    """Only autocast casts both sides, and it leaves float64 alone."""
    x, y = unit(2, 3, 0).float(), unit(2, 3, 1).bfloat16()
    with pytest.raises(ValueError, match="cast them to one dtype"):
        checks.check_alike(x, y, "auto")
    with AUTOCAST:
        checks.check_alike(x, y, "auto")
        checks.check_alike(y, x, "auto")
        for wide in ((x.double(), y), (x, x.double())):
            with pytest.raises(ValueError, match="cast them to one dtype"):
                checks.check_alike(*wide, "auto")
        # a call that does not follow autocast has nothing cast
        for pair in ((x, y), (y, x)):
            with pytest.raises(ValueError, match="cast them to one dtype"):
                checks.check_alike(*pair, "input")


def test_negatives_that_begin_later_are_those_of_rows() -> None:
    x, y = unit(2, 3, 0), unit(4, 3, 1)
    statistics = functional.similarity_statistics
    assert statistics(x, y, 9.0, first_negative=2, column_statistics=False).row_lse.isfinite().all()
    with pytest.raises(ValueError, match="first_negative is for rows alone"):
        statistics(x, y, 9.0, first_negative=2)
    for count in (-5, len(y) + 1):
        with pytest.raises(ValueError, match=f"columns_with_gradient is {count}; give None or"):
            statistics(x, y, 9.0, columns_with_gradient=count)


def test_lists_in_the_place_of_tensors_are_named() -> None:
    x = unit(2, 3, 0)
    with pytest.raises(ValueError, match="weights: list; give a tensor"):
        functional.clip_loss(x, x, 9.0, weights=[1.0, 1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row_bias: list; give a tensor"):
        functional.similarity_statistics(x, x, 9.0, row_bias=[1.0, 1.0])  # type: ignore[arg-type]


def test_a_scaled_gradient_leaves_the_value() -> None:
    """Also where a third of it is rounded."""
    value = torch.tensor([0.75390625, float("inf")], dtype=torch.bfloat16, requires_grad=True)
    same = scale_gradient(value, 1 / 3)
    assert torch.equal(same, value)
    same[0].backward()
    assert value.grad is not None and value.grad[0] == torch.tensor(1 / 3).bfloat16()


def test_columns_are_shared_out_as_rows_are() -> None:
    assert Ranks("gather", "", (2, 3), 0).columns(4) == (4, 6)
    assert Ranks("gather", "", (2, 3), 1).columns(3) == (2, 3)
    # as many rows everywhere: any number of columns
    assert Ranks("gather", "", (2, 2), 0).columns(5) == (5, 5)
    with pytest.raises(ValueError, match="5 columns for 2 rows"):
        Ranks("gather", "", (2, 3), 0).columns(5)


@pytest.mark.usefixtures("alone")
def test_shares_fit_the_processes() -> None:
    assert ranks_of("gather", None, (4,), 4) is None
    for sizes, rows in (((4,), 3), ((4, 4), 4), ((), 4), ((0,), 0)):
        with pytest.raises(ValueError, match="give every rank's rows, each at least 1"):
            ranks_of("gather", None, sizes, rows)
    with pytest.raises(ValueError, match="not in the group"):
        ranks_of("gather", dist.GroupMember.NON_GROUP_MEMBER, None, 4)
    for options in ((dist.group.WORLD, None), (None, (4,))):
        with pytest.raises(ValueError, match="give dist"):
            ranks_of(None, *options, 4)


@pytest.fixture
def four() -> Iterator[str]:
    """A process group of four, of which three are not there and nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield group_name(None)
    dist.destroy_process_group()


def test_bytes_of_each_exchange(four: str) -> None:
    rows = torch.zeros(6, 5, dtype=torch.bfloat16)
    for call, received in (
        # three ranks' rows
        (lambda: all_gather_rows(four, rows, (6, 6, 6, 6)), 3 * 6 * 5 * 2),
        # as many as the longest has
        (lambda: all_gather_rows(four, rows, (7, 6, 2, 4)), 3 * 7 * 5 * 2),
        # own rows from each of the others
        (lambda: all_to_all_rows(four, rows[:4], (1, 6, 2, 1), 1), 3 * 6 * 5 * 2),
        # reduced, then gathered: three quarters each time
        (lambda: all_reduce_sum(four, rows), 2 * 6 * 5 * 2 * 3 // 4),
    ):
        with count_bytes() as count:
            call()
        assert count.received == received


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_what_an_exchange_keeps_and_costs(exchange: str, four: str) -> None:
    """As the shapes in a trace and the FLOP counter have it."""
    x, y = torch.zeros(6, 5), torch.zeros(12, 5)
    ranks = Ranks(exchange, four, (4, 6, 2, 1), 1)
    options = problem.Options(**problem.options(torch.float32, "torch", 0, ranks))
    kept = columns_of(ranks, [12]).collect(y)
    assert kept.shape == problem.collected_shape(y, options)
    assert kept.shape == ((26, 5) if exchange == "gather" else (0,))
    assert problem.one_product(x.shape, y.shape, options) == 2 * 6 * 26 * 5


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.usefixtures("four")
def test_float16_gradients_travel_narrow_once_a_loss_scale_is_on(exchange: str) -> None:
    """Those of a sum are formed before: in float32, twice the bytes."""
    received = {}
    for dtype in (torch.bfloat16, torch.float16):
        for name, reduction in (("clip", "mean"), ("siglip", "none"), ("siglip", "mean")):
            leaves = [unit(6, 5, seed).to(dtype).requires_grad_() for seed in (0, 1)]
            options = {"dist": exchange, "sizes": (6,) * 4, "reduction": reduction}
            with count_bytes() as count:
                getattr(functional, f"{name}_loss")(*leaves, 9.0, **options).sum().backward()
            received[dtype, name, reduction] = count.received
    for (dtype, *loss), count in received.items():
        more = 3 * 6 * 5 * 2 if dtype == torch.float16 and loss == ["siglip", "mean"] else 0
        assert count - more == received[torch.bfloat16, loss[0], loss[1]], (dtype, loss)


@pytest.mark.parametrize(
    "name, remedy", [("features", "to_local"), ("scale", "the model's forward")]
)
def test_a_dtensor_is_refused_with_the_remedy(name: str, remedy: str) -> None:
    """Recognized by its type's name, as torch.distributed.tensor takes long to import."""
    kind = type("DTensor", (torch.Tensor,), {})
    features, scale = torch.eye(3), torch.ones(1)
    if name == "features":
        features = features.as_subclass(kind)
    else:
        scale = scale.as_subclass(kind)
    with pytest.raises(ValueError, match=f"DTensor.*{remedy}"):
        functional.clip_loss(features, torch.eye(3), scale)
