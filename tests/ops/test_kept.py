"""Exponentials that the forward keeps for the backward: right for any features and scale."""

import importlib
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import functional, native
from fastclip.ops import backend as backend_of
from fastclip.ops import kept
from fastclip.ops.gemm import count_products
from tests.ops import oracles
from tests.ops.cases import LOSSES, ours, theirs, unit, views
from tests.ops.test_capture import KERNELS

ON_CPU = ("torch", *(() if native.unavailable_reason() else ("cpp",)))
_NO_KERNELS = backend_of.unavailable_reason(
    "similarity", "triton", torch.device("cpu"), torch.float32
)
IMPLEMENTATIONS = (*ON_CPU, *(() if _NO_KERNELS else ("triton",)))
# of these the device decides, or there is nothing to decide
NOT_BY_THE_HOST = ("triton", "cuda")
KEEPS = ("clip", "clip_grouped", "clip_smoothed", "nt_xent", "mp_nce", "sup_con")
# float32 and one of 16 bits, which take turns: both are kept in bfloat16
KEPT_IN = [
    (name, dtype)
    for name, narrow in zip(KEEPS, itertools.cycle((torch.bfloat16, torch.float16)), strict=False)
    for dtype in (torch.float32, narrow)
]


def clip_case(
    images: Tensor, texts: Tensor, scale: float, backend: str, **options: Any
) -> tuple[list[Tensor], float]:
    """Loss and gradients, and how many products they took."""
    leaves = [t.clone().requires_grad_() for t in (images, texts, torch.tensor(scale))]
    with count_products() as count:
        loss = functional.clip_loss(*leaves, backend=backend, **options)
        gradients = torch.autograd.grad(loss, leaves)
    products = count.products_of(len(images), len(texts), images.shape[1])
    return [loss.detach(), *gradients], products


def check_clip(images: Tensor, texts: Tensor, scale: float, backend: str, products: int) -> None:
    """Against the definition in float64, and no worse than without anything kept.

    Kernels form S again in the tiles that need it, which no product on the host shows.
    """
    images, texts = images.float(), texts.float()
    inputs = [t.double().requires_grad_() for t in (images, texts, torch.tensor(scale))]
    truth_loss = oracles.clip(*inputs, {}).mean()
    truth = [truth_loss.detach(), *torch.autograd.grad(truth_loss, inputs)]
    got, counted = clip_case(images, texts, scale, backend)
    other, _ = clip_case(images, texts, scale, backend, keep_bytes=0)
    assert counted == (3 if backend in NOT_BY_THE_HOST else products)
    for mine, again, want in zip(got, other, truth, strict=True):
        error, without = ((one.double() - want).norm() for one in (mine, again))
        # float32 holds a logit to |S| eps, and exp(S) has that error relatively
        lengths = images.norm(dim=1).max() * texts.norm(dim=1).max()
        unit_of = torch.finfo(torch.float32).eps * (8 + 2 * abs(scale) * lengths)
        assert error <= 2 * without + unit_of * max(want.norm().item(), 1e-30)


PAIRS = views(2, 90, 16, 3, 0.5)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "scale, products", [(1e-4, 3), (1.0, 3), (14.3, 3), (-20.0, 3), (60.0, 3), (1e3, 4), (1e4, 4)]
)
def test_scales(scale: float, products: int, backend: str) -> None:
    """Kept wherever one anchor can serve; logits of 1e3 lie too far apart, which costs nothing."""
    check_clip(*PAIRS, scale, backend, products)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1e-3, 0.3, 2.0, 10.0, 1e3])
def test_features_of_any_length(length: float, backend: str) -> None:
    """The anchor takes them for unit vectors; sums that overflow are formed again."""
    images, texts = PAIRS
    expected = 5 if length > 5 else 3
    check_clip(images * length, texts, 14.3, backend, expected)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_an_outlier(backend: str) -> None:
    """One pair far longer than the others: its row and column have sums of their own."""
    images, texts = (one.clone() for one in PAIRS)
    images[7] *= 30
    check_clip(images, texts, 14.3, backend, 5)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_a_row_whose_exponentials_vanish(backend: str) -> None:
    """A sum below 2^-80 about the anchor has lost digits."""
    texts = F.normalize(unit(90, 16, 5).abs(), dim=1)
    images = F.normalize(unit(90, 16, 6).abs(), dim=1)
    check_clip(images, texts, 100.0, backend, 3)
    images[3] = -images[3]
    check_clip(images, texts, 100.0, backend, 5)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_a_batch_of_one_has_no_negatives(backend: str) -> None:
    images, texts = PAIRS
    got, _ = clip_case(images[:1].float(), texts[:1].float(), 14.3, backend)
    assert got[0] == 0 and not any(g.any() for g in got[1:])


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_a_row_left_out_whole(backend: str) -> None:
    """One whose group every text is of."""
    x, y, scale = (*PAIRS, torch.tensor(14.3, dtype=torch.float64))
    group = torch.zeros(90, dtype=torch.int64)
    inputs = [t.clone().requires_grad_() for t in (x, y, scale)]
    oracle = oracles.clip(*inputs, {"row_group": group, "column_group": group})
    assert not oracle.any()
    leaves = [t.float().requires_grad_() for t in (x, y, scale)]
    loss = functional.clip_loss(*leaves, row_group=group, column_group=group, backend=backend)
    assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", KEEPS)
def test_nan_shows(name: str, backend: str) -> None:
    case = LOSSES[name].make(48, 8, 9.0, 0.3, seed=1).cast(torch.float32)
    case.leaves[0][2, 1] = torch.nan
    loss, gradient, *_ = ours(name, case, backend=backend)
    assert loss.isnan() and gradient.isnan().any()


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", KEEPS)
def test_a_second_backward_reads_them_unaltered(name: str, backend: str) -> None:
    case = LOSSES[name].make(96, 8, 9.0, 0.3, seed=1).cast(torch.float32)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    loss = LOSSES[name].run(leaves, case.static, backend=backend)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_a_loss_scale(backend: str) -> None:
    """float16's: a power of two changes no bit; a factor out of range is formed again."""
    leaves = [t.float().requires_grad_() for t in PAIRS]
    loss = functional.clip_loss(*leaves, 60.0, backend=backend)
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(loss * 2.0**24, leaves, retain_graph=True)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b / 2.0**24, rtol=1e-6, atol=0)
    with count_products() as count:
        far = torch.autograd.grad(loss * 2.0**-60, leaves)
    for a, b in zip(plain, far, strict=True):
        torch.testing.assert_close(a, b * 2.0**60, rtol=1e-4, atol=1e-6)
    assert count.products_of(90, 90, 16) == (2 if backend in NOT_BY_THE_HOST else 3)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_offsets(offset: float, backend: str) -> None:
    """The anchor follows a table of scales and offsets."""
    case = LOSSES["mp_nce"].make(60, 8, 9.0, 0.3, seed=1)
    case.leaves[-1] += offset
    low = case.cast(torch.float32)
    eager, truth = theirs("mp_nce", low), theirs("mp_nce", low.double())
    with count_products() as count:
        got = ours("mp_nce", low, backend=backend)
    # own squares are visited twice: 60 rows are one strip
    assert count.products_of(60, 60, 8) < 3
    for mine, other, want in zip(got, eager, truth, strict=True):
        bound = 2 * (other.double() - want).norm() + 8 * 300 * 1.2e-7 * want.norm().clamp(min=1.0)
        assert (mine.double() - want).norm() <= bound


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", KEEPS)
def test_sums_of_a_part_are_merged_in_one_order(name: str, backend: str) -> None:
    case = LOSSES[name].make(192, 24, 9.0, 0.3, seed=1).cast(torch.float32)
    first = ours(name, case, backend=backend, chunk_bytes=4 * 192 * 40)
    for _ in range(50):
        again = ours(name, case, backend=backend, chunk_bytes=4 * 192 * 40)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", KEEPS)
def test_the_budget_decides(name: str) -> None:
    """Just what is needed is enough; a byte less keeps nothing."""
    case = LOSSES[name].make(96, 8, 9.0, 0.3, seed=1).cast(torch.float32)
    rows = sum(map(len, case.leaves[: case.features]))
    needed = 4 * 96 * 96
    if name in ("nt_xent", "mp_nce", "sup_con"):
        blocks = {"mp_nce": 3, "nt_xent": 2, "sup_con": 1}[name]
        needed = 4 * (rows * (rows + rows // blocks) // 2)

    def products(keep_bytes: int) -> int:
        with count_products() as count:
            ours(name, case, backend="torch", keep_bytes=keep_bytes)
        return count.flop

    assert products(needed) < products(needed - 1) == products(0)


@pytest.mark.skipif(bool(_NO_KERNELS), reason=f"triton: {_NO_KERNELS}")
@pytest.mark.parametrize("name, dtype", KEPT_IN)
def test_kernels_keep_what_fits_in_the_dtype_of_the_gradient(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tiles, all inside; what just fits is kept, and a byte less keeps nothing.

    Kernels are not run: rooms and products are chosen on the host, whatever they write.
    """
    for kernels in KERNELS:
        module = importlib.import_module(f"fastclip.kernels.{kernels}")
        monkeypatch.setattr(module, "launch", lambda *arguments, **options: None)
    case = LOSSES[name].make(150, 8, 9.0, 0.3, seed=1).cast(dtype)
    found: list[Tensor] = []
    original = kept.Rooms.next

    def room(self: kept.Rooms, chunk: Any, columns: int) -> Tensor:
        got = original(self, chunk, columns)
        stride, overhang = got.stride(0), kept.OVERHANG - 1
        assert stride % 16 == 0 and got.storage_offset() % 16 == 0
        assert stride >= got.shape[1] + overhang
        end = got.storage_offset() + (len(got) + overhang) * stride
        found.append(self._entries)
        assert end <= len(self._entries)
        return got

    monkeypatch.setattr(kept.Rooms, "next", room)
    for chunk_bytes in (None, 2 * 150 * 40):
        options = {"backend": "triton", "chunk_bytes": chunk_bytes}
        with count_products() as count:
            ours(name, case, **options)
        entries = found[-1]
        assert entries.dtype == (dtype if dtype == torch.float32 else torch.bfloat16)
        # of the symmetric losses all blocks together
        assert len(entries) <= (150 + kept.OVERHANG) * (150 + kept.MARGIN)
    flops = []
    for keep in (entries.nbytes, entries.nbytes - 1):
        with count_products() as again:
            ours(name, case, keep_bytes=keep, **options)
        flops.append(again.flop)
    assert flops[0] == count.flop < flops[1]


@pytest.mark.skipif(bool(_NO_KERNELS), reason=f"triton: {_NO_KERNELS}")
@pytest.mark.parametrize("name, dtype", KEPT_IN)
def test_what_kernels_keep_costs_a_rounding(name: str, dtype: torch.dtype) -> None:
    """Kept and not kept are one result, in float32 but for a few roundings, else for two of G's."""
    case = LOSSES[name].make(150, 24, 14.3, 0.3, seed=2).cast(dtype)
    truth = theirs(name, case.double())
    found = ours(name, case, backend="triton"), ours(name, case, backend="triton", keep_bytes=0)
    for index, (mine, again, want) in enumerate(zip(*found, truth, strict=True)):
        size = want.norm().item()
        if index > case.features:
            size = max(size, LOSSES[name].scalar_terms(case, index - 1))
        errors = [(one.double() - want).norm().item() / size for one in (mine, again)]
        rounding = 1e-6 if dtype == torch.float32 else 2**-8
        assert errors[0] <= 2 * errors[1] + rounding, (index, errors)


@pytest.mark.parametrize("run", LOSSES.values(), ids=LOSSES)
def test_a_budget_is_not_negative(run: Any) -> None:
    case = run.make(8, 4, 9.0, 0.3, seed=1)
    with pytest.raises(ValueError, match=r"keep_bytes is -1; give a whole number of bytes"):
        run.run(case.leaves, case.static, keep_bytes=-1)


def test_nothing_is_kept_for_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor with metrics, which want the maxima."""
    asked: list[int] = []

    def noted(own: int, columns: int, options: Any) -> int:
        asked.append(0 if options.maxima else options.keep_bytes)
        return 0

    monkeypatch.setattr(kept, "kept_entries", noted)
    leaves = [t.clone().requires_grad_() for t in PAIRS]
    with torch.no_grad():
        functional.clip_loss(*leaves, 9.0, backend="torch")
    functional.clip_loss(*PAIRS, 9.0, backend="torch")
    functional.clip_loss(*leaves, 9.0, backend="torch", metrics={})
    assert asked and not any(asked)
    functional.clip_loss(*leaves, 9.0, backend="torch")
    assert asked[-1] == kept.KEEP_BYTES["cpu"]


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_metrics_have_their_maxima(backend: str) -> None:
    """An anchor is no maximum."""
    images, texts = (one.float().requires_grad_() for one in PAIRS)
    found: dict[str, Tensor] = {}
    functional.clip_loss(images, texts, 9.0, metrics=found, backend=backend)
    S = images @ texts.T
    for dim, name in ((1, "image_to_text_accuracy"), (0, "text_to_image_accuracy")):
        right = (S.argmax(dim=dim) == torch.arange(90)).float().mean()
        assert 0 < right < 1 and found[name] == right
