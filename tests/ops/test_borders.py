"""Bounds, options and counts of the operators that no other test looks at."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastclip import SupConLoss
from fastclip.functional import clip_loss, info_nce_loss, siglip_loss
from fastclip.ops import attention as module
from fastclip.ops.attention import WIDEST, attention
from fastclip.ops.chunks import chunk_rows, chunks, whole_tiles
from fastclip.ops.info_nce import info_nce_sum
from fastclip.ops.sigmoid import sigmoid_loss
from fastclip.ops.similarity import similarity_statistics
from tests.ops.cases import unit


def test_the_widest_heads_are_computed() -> None:
    q, k, v = torch.randn(3, 1, 1, 9, WIDEST, generator=torch.Generator().manual_seed(0))
    want = attention(q, k, v, backend="reference")
    torch.testing.assert_close(attention(q, k, v, backend="triton"), want)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_is_given_the_scale_and_the_mask(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package takes (B, S, H, D) and needs a GPU: torch's operator stands in for it."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool):
        lines = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*lines, scale=softmax_scale, is_causal=causal)
        return out.transpose(1, 2)

    package = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    q, k, v = torch.randn(3, 2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    want = attention(q, k, v, causal=causal, scale=0.9, backend="reference")
    torch.testing.assert_close(module._flash(q, k, v, causal, 0.9), want)


@pytest.mark.parametrize("rows, fitting, size", [(10, 4, 4), (9, 4, 3), (7, 3, 3), (8, 4, 4)])
def test_chunks_are_as_few_as_fit(rows: int, fitting: int, size: int) -> None:
    assert chunk_rows(rows, 5, 4, fitting * 5 * 4, "cpu") == size
    assert -(-rows // size) == -(-rows // fitting)


def test_chunks_by_default_are_neither_thin_nor_thick() -> None:
    """Between 16 and 512 rows on a CPU, whatever 16 MiB hold."""
    assert chunk_rows(2000, 8, 4, 0, "cpu") == 500
    assert chunk_rows(64, 1 << 24, 4, 0, "cpu") == 16
    assert chunk_rows(64, 1 << 24, 4, 1, "cpu") == 1


def test_chunks_end_where_the_rows_do() -> None:
    assert chunks(2, 9, 3) == [(2, 5), (5, 8), (8, 9)]
    assert chunks(2, 8, 3) == [(2, 5), (5, 8)]


@pytest.mark.parametrize(
    "size, most, whole",
    [(200, 256, 256), (200, 255, 128), (100, 128, 128), (100, 100, 100), (300, 300, 256)],
)
def test_chunks_are_whole_tiles_where_they_fit(size: int, most: int, whole: int) -> None:
    assert whole_tiles(size, most) == whole


def test_flop_of_single_sigmoid_losses() -> None:
    """S in the forward; S again, dX and dY in the backward."""
    x, y = (unit(16, 8, seed).requires_grad_() for seed in (0, 1))
    one = 2 * 16 * 16 * 8
    for inputs, products in (((x, y), 4), ((x, y.detach()), 3)):
        with FlopCounterMode(display=False) as counter:
            siglip_loss(*inputs, 9.0, -9.0, reduction="none").sum().backward()
        assert counter.get_total_flops() == products * one


def test_sigmoid_rows_and_columns_are_as_many() -> None:
    for rows, columns in ((3, 4), (4, 3)):
        with pytest.raises(ValueError, match=f"{rows} rows and {columns} columns"):
            sigmoid_loss(unit(rows, 5, 0), unit(columns, 5, 1), 9.0)


def test_ids_of_two_widths_are_compared_in_the_wider() -> None:
    """2^32 + 1 would be 1 in 32 bits, and its column left out of row 1's negatives."""
    x, y = unit(3, 5, 0), unit(4, 5, 1)
    rows = torch.arange(3, dtype=torch.int32)
    columns = torch.tensor([0, 1, 2, 2**32 + 1])
    want = clip_loss(x, y, 9.0)
    assert clip_loss(x, y, 9.0, row_group=rows, column_group=columns) == want
    same = torch.tensor([0, 1, 2, 1])
    assert clip_loss(x, y, 9.0, row_group=rows, column_group=same) < want


def test_fewer_keys_than_queries_with_an_index() -> None:
    query, keys, index = unit(5, 4, 0), unit(2, 4, 1), torch.tensor([0, 1, 1, 0, 1])
    want = F.cross_entropy(9.0 * query @ keys.T, index)
    torch.testing.assert_close(info_nce_loss(query, keys, 9.0, index), want)


def test_sup_con_refuses_a_temperature_when_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        SupConLoss(0.0)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("first, trainable", [(0, 9), (0, 3), (2, 0), (5, 4), (4, 6)])
def test_columns_that_are_positives_alone_or_frozen(
    first: int, trainable: int, indexed: bool, backend: str
) -> None:
    """Columns before `first` are no negatives; those from `trainable` on get no gradient."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    index = torch.tensor([0, 5, 8, 2]) if indexed else torch.arange(4)
    left_out = (torch.arange(9) < first) | (torch.arange(9) == index[:, None])
    weights = torch.arange(1.0, 9.0, dtype=dtype).view(2, 4)
    options: dict[str, Any] = {
        "first_negative": first,
        "columns_with_gradient": trainable,
        "backend": backend,
    }
    options |= {"positive_index": index if indexed else None, "chunk_bytes": 150}

    def dense(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        S = 9.0 * x @ torch.cat([y[:trainable], y[trainable:].detach()]).T
        return S.masked_fill(left_out, -torch.inf).logsumexp(1), S[torch.arange(4), index]

    def statistics(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found = similarity_statistics(x, y, 9.0, column_statistics=False, **options)
        return found.row_lse, found.positive

    def weighted(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda x, y: (torch.stack(function(x, y)) * weights).sum()

    def dense_loss(x: Tensor, y: Tensor) -> Tensor:
        lse, positive = dense(x, y)
        return F.softplus(lse - positive).sum()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return info_nce_sum(x, y, 9.0, **options)[0]

    for mine, want in ((weighted(statistics), weighted(dense)), (loss, dense_loss)):
        results = []
        for function in (mine, want):
            leaves = [unit(n, 3, n).to(dtype).requires_grad_() for n in (4, 9)]
            value = function(*leaves)
            results.append([value, *torch.autograd.grad(value, leaves)])
        # of float32 the roundings of logits of 9, times the scale and the largest weight
        close = {"rtol": 1e-5, "atol": 26 * 2.0**-23 * 72} if backend == "triton" else {}
        torch.testing.assert_close(*results, **close)
