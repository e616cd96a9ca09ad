"""Groups and anchors' weights of every loss, against the definitions in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip import functional, native
from fastclip.ops.gemm import count_products
from fastclip.ops.tiles import cpp as cpp_tiles
from fastclip.ops.tiles.torch import TorchTiles
from tests.ops import group_oracles
from tests.ops.cases import unit, views

LOW = ["triton", *([] if native.unavailable_reason() else ["cpp", "auto"])]
N, EXTRA, WIDTH, SCALE = 12, 3, 6, 9.0
# several groups of several rows, rows alone, a group of hard negatives alone, a column of another
# group than its row's
GROUPS = torch.tensor([3, 3, -1, 5, 3, 1, 8, 1, 9, 5, 12, 13, 3, 20, 20])
GROUP_OF_ROWS = GROUPS[:N].clone()
GROUP_OF_ROWS[7] = 5


@dataclass(frozen=True)
class Loss:
    """Features, scalars, groups, and the function of them beside its definition."""

    leaves: Callable[[], list[Tensor]]
    features: int
    groups: dict[str, Tensor]
    run: Callable[..., Tensor]
    oracle: Callable[..., Tensor]


def pairs(extra: int, bias: bool = False) -> Callable[[], list[Tensor]]:
    def make() -> list[Tensor]:
        x, y = views(2, N, WIDTH, 3, 0.5)
        scalars = [torch.tensor(SCALE), torch.tensor(-6.0)][: 1 + bias]
        return [x, torch.cat([y, unit(extra, WIDTH, 5)]), *(s.double() for s in scalars)]

    return make


def blocks() -> list[Tensor]:
    spread = torch.rand(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [*views(3, N, WIDTH, 3, 0.5), SCALE * (0.75 + spread[0] / 4), spread[1]]


PAIR_WEIGHT = torch.tensor([[0.5, 1.5], [0.0, 1.0]], dtype=torch.float64)
BOTH = {"row_group": GROUP_OF_ROWS, "column_group": GROUPS}
SQUARE = {"row_group": GROUP_OF_ROWS, "column_group": GROUPS[:N]}
ONE = {"row_group": GROUP_OF_ROWS}

LOSSES = {
    "clip": Loss(
        pairs(EXTRA),
        2,
        BOTH,
        functional.clip_loss,
        lambda *leaves, groups, role: group_oracles.clip(*leaves, groups, role),
    ),
    "clip_smoothed": Loss(
        pairs(EXTRA),
        2,
        BOTH,
        lambda *leaves, **options: functional.clip_loss(*leaves, label_smoothing=0.2, **options),
        lambda *leaves, groups, role: group_oracles.clip(*leaves, groups, role, smoothing=0.2),
    ),
    "info_nce": Loss(
        pairs(EXTRA),
        2,
        BOTH,
        functional.info_nce_loss,
        lambda *leaves, groups, role: group_oracles.info_nce(*leaves, groups, role),
    ),
    "siglip": Loss(
        pairs(0, bias=True),
        2,
        SQUARE,
        functional.siglip_loss,
        lambda *leaves, groups, role: group_oracles.siglip(*leaves, groups, role),
    ),
    "nt_xent": Loss(
        lambda: [*views(2, N, WIDTH, 3, 0.5), torch.tensor(1 / SCALE).double()],
        2,
        ONE,
        functional.nt_xent_loss,
        lambda *leaves, groups, role: group_oracles.nt_xent(*leaves, *groups, role),
    ),
    "mp_nce": Loss(
        blocks,
        3,
        ONE,
        lambda *leaves, **options: functional.mp_nce_loss(
            leaves[:3], [0, 0, 1], *leaves[3:], pair_weight=PAIR_WEIGHT, **options
        ),
        lambda *leaves, groups, role: group_oracles.mp_nce(
            leaves[:3], [0, 0, 1], *leaves[3:], PAIR_WEIGHT, *groups
        ),
    ),
}
CASES = [
    (name, role)
    for name in LOSSES
    for role in ("excluded", "positive")
    if (name, role) != ("mp_nce", "positive")
]


def weights_of(anchors: int) -> Tensor:
    return torch.arange(anchors, dtype=torch.float64) % 5 / 4


def found(
    name: str, role: str, weighted: bool, dtype: torch.dtype = torch.float64, **options: Any
) -> list[Tensor]:
    """Loss, gradients of all leaves and, of the weights, theirs."""
    loss = LOSSES[name]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in loss.leaves()]
    if weighted:
        blocks = {"nt_xent": 2, "mp_nce": 3}.get(name, 1)
        leaves.append(weights_of(blocks * N).to(dtype).requires_grad_())
        options["weights"] = leaves[-1]
    features = leaves[: len(leaves) - weighted]
    value = loss.run(*features, group_role=role, **loss.groups, **options)
    weights = torch.arange(1, 1 + value.numel()).to(value) / value.numel()
    total = (value * weights).sum() if value.ndim else value
    return [value.detach(), *torch.autograd.grad(total, leaves)]


def wanted(
    name: str, role: str, weighted: bool, reduction: str = "mean", dtype: torch.dtype | None = None
) -> list[Tensor]:
    """From the definition, of features rounded to a dtype."""
    loss = LOSSES[name]
    leaves = [leaf.to(dtype or leaf.dtype).double().requires_grad_() for leaf in loss.leaves()]
    value = loss.oracle(*leaves, groups=tuple(loss.groups.values()), role=role)
    if weighted:
        leaves.append(weights_of(len(value)).requires_grad_())
        mass = leaves[-1]
    else:
        mass = torch.ones_like(value) if name != "siglip" else torch.ones(N).double()
    if reduction == "none":
        value = value * mass
        weights = torch.arange(1, 1 + value.numel()).to(value) / value.numel()
        total = (value * weights).sum()
    else:
        total = value = group_oracles.weighted_mean(value, mass)
        if reduction == "sum":
            total = value = value * mass.sum()
    gradients = torch.autograd.grad(total, leaves)
    # tables are read with a <= b
    return [value.detach(), *(triangle(g, name) for g in gradients)]


def triangle(gradient: Tensor, name: str) -> Tensor:
    return gradient.triu() if name == "mp_nce" and gradient.shape == (2, 2) else gradient


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name, role", CASES)
def test_groups_and_weights_are_the_definitions(name: str, role: str, backend: str) -> None:
    """In chunks of few rows, nothing of S kept."""
    for weighted in (False, True):
        for reduction in ("mean", "sum", "none"):
            options = {"backend": backend, "chunk_bytes": 300, "keep_bytes": 0}
            got = found(name, role, weighted, reduction=reduction, **options)
            want = wanted(name, role, weighted, reduction)
            for mine, other in zip(got, want, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", LOW)
@pytest.mark.parametrize("name, role", CASES)
def test_every_implementation_has_them(
    name: str, role: str, backend: str, dtype: torch.dtype
) -> None:
    """Within roundings of features and gradients, and of logits up to the scale in float32."""
    got = found(name, role, True, dtype, backend=backend, precision="input")
    within_roundings(got, wanted(name, role, True, dtype=dtype), dtype)


def within_roundings(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    for mine, other in zip(got, want, strict=True):
        size = max(other.abs().max().item(), 0.1)
        roundings = 8 * torch.finfo(mine.dtype).eps + 8 * SCALE * torch.finfo(torch.float32).eps
        if mine.ndim < 2 and dtype == torch.bfloat16:
            # products with G in bfloat16
            roundings += torch.finfo(dtype).eps
        assert (mine.double() - other).abs().max() <= roundings * size


def check_positives_of_a_tile(backend: str, dtype: torch.dtype, ids: torch.dtype) -> None:
    """SigLIP's, at the borders of what an implementation works on at a time, by its own sweep."""
    n, groups = 150, torch.arange(150, dtype=ids) % 40
    leaves = [*views(2, n, WIDTH, 3, 0.5), torch.tensor(SCALE), torch.tensor(-6.0)]
    given = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in given]
    options = {"row_group": groups, "column_group": groups, "group_role": "positive"}
    with pytest.MonkeyPatch.context() as patched:
        # a sweep that is left to torch's fails
        patched.setattr(TorchTiles, "_logits", None)
        loss = functional.siglip_loss(
            *given, backend=backend, chunk_bytes=n * 70 * 4, precision="input", **options
        )
        got = [loss, *torch.autograd.grad(loss, given)]
        with torch.no_grad():
            alone = functional.siglip_loss(*given, backend=backend, precision="input", **options)
    value = group_oracles.siglip(*wide, (groups, groups), "positive").sum() / n
    within_roundings(got, [value, *torch.autograd.grad(value, wide)], dtype)
    within_roundings([alone], [value], dtype)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [name for name in LOW if name != "auto"])
def test_positives_of_a_tile(
    backend: str, dtype: torch.dtype, ids: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp_tiles, "BLOCK_ENTRIES", 1 << 12)
    monkeypatch.setattr(cpp_tiles, "LEAST_COLUMNS", 16)
    check_positives_of_a_tile(backend, dtype, ids)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["clip", "info_nce"])
def test_rows_alone_have_the_loss_without_groups(name: str, backend: str) -> None:
    loss = LOSSES[name]
    leaves = [leaf.requires_grad_() for leaf in loss.leaves()]
    alone = {"row_group": torch.arange(N), "column_group": torch.arange(N + EXTRA)}
    results = []
    for groups in ({}, {"group_role": "positive", **alone}):
        value = loss.run(*leaves, backend=backend, reduction="none", **groups)
        results.append([value, *torch.autograd.grad(value.sum(), leaves)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name, products", [("clip", 4), ("info_nce", 3), ("siglip", 3)])
def test_groups_cost_no_product(name: str, products: int) -> None:
    for role in ("excluded", "positive"):
        with count_products() as count:
            found(name, role, False, backend="torch", keep_bytes=0)
        columns = LOSSES[name].leaves()[1].shape[0]
        assert count.products_of(N, columns, WIDTH) == products


@pytest.mark.parametrize("role", ["excluded", "positive"])
@pytest.mark.parametrize("name, products", [("clip", 4), ("info_nce", 3), ("siglip", 3)])
def test_weights_cost_no_product(name: str, products: int, role: str) -> None:
    for reduction in ("mean", "sum"):
        with count_products() as count:
            found(name, role, True, backend="torch", keep_bytes=0, reduction=reduction)
        columns = LOSSES[name].leaves()[1].shape[0]
        assert count.products_of(N, columns, WIDTH) == products


@pytest.mark.parametrize("name, role", CASES)
def test_nothing_of_the_size_of_S_is_saved(name: str, role: str) -> None:
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found(name, role, True, backend="torch", keep_bytes=0)
    # no more than the features of both sides, which are fewer than the entries of S
    blocks = {"nt_xent": 2, "mp_nce": 3}.get(name, 1)
    assert 0 < max(saved) <= (blocks * N + EXTRA) * WIDTH < (blocks * N) ** 2


def test_a_bank_has_ids_too() -> None:
    x, y, scale = LOSSES["info_nce"].leaves()
    for role in ("excluded", "positive"):
        want = LOSSES["info_nce"].run(x, y, scale, group_role=role, **BOTH)
        for backend in ("torch", "reference"):
            got = functional.info_nce_loss(
                x, y[:N], scale, bank=y[N:], group_role=role, backend=backend, **BOTH
            )
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_weights_that_are_all_zero_give_zero() -> None:
    for name, loss in LOSSES.items():
        blocks = {"nt_xent": 2, "mp_nce": 3}.get(name, 1)
        value = loss.run(*loss.leaves(), weights=torch.zeros(blocks * N, dtype=torch.float64))
        assert value == 0


def test_supervised_anchors_have_weights() -> None:
    z, labels = unit(N, WIDTH, 0), GROUPS[:N]
    alone = (labels[:, None] == labels).sum(1) == 1
    S = SCALE * z @ z.T
    itself = torch.eye(N, dtype=torch.bool)
    same = (labels[:, None] == labels) & ~itself
    of_anchors = group_oracles.cross_entropy(S[~alone], same[~alone], ~itself[~alone])
    weights = weights_of(N) + 0.1
    want = group_oracles.weighted_mean(of_anchors, weights[~alone])
    for backend in ("torch", "reference"):
        got = functional.sup_con_loss(z, labels, 1 / SCALE, weights=weights, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    loss = LOSSES[name]
    leaves, groups = loss.leaves(), loss.groups
    good = groups["row_group"]

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            loss.run(*leaves, **options)

    short = groups | {"row_group": good[:-1]}
    refused(r"row_group has shape \(11,\); one id per row, \(12,\)", **short)
    real = groups | {"row_group": good.float()}
    refused("row_group is torch.float32; give int32 or int64", **real)
    elsewhere = groups | {"row_group": good.to("meta")}
    refused("row_group is on meta, the features on cpu", **elsewhere)
    refused("group_role is 'left'; use one of excluded, positive", group_role="left", **groups)
    match = "use 'excluded': MP-NCE has" if name == "mp_nce" else "no groups; give row_group"
    refused(match, group_role="positive")
    anchors = N * {"nt_xent": 2, "mp_nce": 3}.get(name, 1)
    weights = torch.ones(anchors)
    match = rf"weights have shape \({anchors - 1},\); one an anchor, \({anchors},\)"
    refused(match, weights=weights[1:])
    refused("weights are torch.int64; give floating point", weights=weights.long())
    refused("weights are on meta, the features on cpu", weights=weights.to("meta"))
    weights[3] = -0.5
    refused("the least of the weights is -0.5; give none below 0", weights=weights)


def test_options_that_exclude_each_other() -> None:
    x, y, scale = LOSSES["info_nce"].leaves()
    with pytest.raises(ValueError, match="positive_index and groups are not for one call"):
        functional.info_nce_loss(x, y, scale, torch.arange(N), **BOTH)
    with pytest.raises(ValueError, match="needs the keys of its batch; leave out in_batch"):
        functional.info_nce_loss(
            x, y[:N], scale, bank=y[N:], in_batch=False, group_role="positive", **BOTH
        )
    with pytest.raises(ValueError, match="both row_group and column_group, or neither"):
        functional.clip_loss(x, y, scale, row_group=GROUP_OF_ROWS)
    with pytest.raises(ValueError, match="one positive an anchor; leave out metrics, or groups"):
        functional.nt_xent_loss(x, x, 0.1, group_role="positive", metrics={}, **ONE)
