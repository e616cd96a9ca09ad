"""The one door to matrix products: every product of an operator passes here and is counted.

Dispatch modes cannot see inside a custom op, so tests that assert "four products, not six" need
a counter of our own. Products accumulate in float32 (float64 for float64) whatever the operands'
dtype, and are returned unrounded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip import native


@dataclass
class ProductCount:
    """What passed through this module inside one `count_products()` block."""

    calls: int = 0
    flop: int = 0

    def products_of(self, rows: int, columns: int, width: int) -> float:
        """How many (rows x width) @ (width x columns) products the counted work amounts to."""
        return self.flop / (2 * rows * columns * width)


_counts: list[ProductCount] = []


@contextmanager
def count_products() -> Iterator[ProductCount]:
    """Count the matrix products of every operator called inside the block."""
    count = ProductCount()
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)


def count_product(rows: int, inner: int, columns: int) -> None:
    """Count a product made elsewhere, inside a fused kernel."""
    for count in _counts:
        count.calls += 1
        count.flop += 2 * rows * inner * columns


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of `dtype` operands are summed and returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of G in a GPU's memory: fp16 would flush most of a gradient to zero."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def as_operand(features: Tensor) -> Tensor:
    """Features in the dtype in which they enter a product.

    torch's bf16 product can return unrounded float32 on CUDA only; elsewhere the operands are
    widened, which is exact and keeps the sum from being rounded.
    """
    if features.dtype == torch.bfloat16 and features.is_cuda:
        return features
    return features.to(accumulator_dtype(features.dtype))


def product(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """`out = a @ b`; `out` has the accumulator's dtype.

    Operands of 16 bits are multiplied as they are on CUDA, bf16 by the native library too;
    elsewhere they are widened.
    """
    count_product(a.shape[0], a.shape[1], b.shape[1])
    if a.itemsize == 2 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    if _native_product(out, a, b, add=False):
        return out
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total += a @ b` in place, summed in `total`'s dtype (the accumulator's)."""
    count_product(a.shape[0], a.shape[1], b.shape[1])
    if a.dtype == torch.bfloat16 and a.is_cuda:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    if _native_product(total, a, b, add=True):
        return total
    return total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _native_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> bool:
    """Make it if that is the native library's: bf16 or float32 (G) times bf16, on a CPU."""
    wide = a.dtype == torch.float32
    if b.dtype != torch.bfloat16 or not (wide or a.dtype == b.dtype):
        return False
    fits = b.stride(1) == 1 or (not wide and b.stride(0) == 1)
    fits &= a.stride(1) == 1 or (wide and a.stride(0) == 1)
    fits &= out.stride(1) == 1 and out.dtype == torch.float32 and out.device.type == "cpu"
    if not fits or not native.has_bf16_product():
        return False
    native.library().bf16_product(
        a.data_ptr(),
        *a.stride(),
        wide,
        b.data_ptr(),
        *b.stride(),
        *a.shape,
        b.shape[1],
        out.data_ptr(),
        out.stride(0),
        add,
        torch.get_num_threads(),
    )
    return True
