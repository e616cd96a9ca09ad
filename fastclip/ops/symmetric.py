"""Statistics of S among the rows of one set of several views and texts.

Z is made of B blocks of N rows in the same pair order. Row i's negatives are all rows of other
pairs, of every domain; its positives are the rows of its own pair in the other blocks (UniCLIP's
MP-NCE, Lee et al. 2022; NT-Xent has two blocks of one domain). The operator returns

    lse_i       = logsumexp of S_ij over the negatives of i, and max_i, their maximum
    positive_qk = S between the two rows of pair k in the q-th couple of blocks (b < c)

with S_ij = scale[p, q] * <z_i, z_j> + offset[p, q] for domains p, q of i and j.

Every pair of rows is visited once: half a product of M x M x D forward, one and a half backward.
Over several processes a rank has all blocks of its own pairs and walks over its strip of S
(`strip.py`): one product of it forward, two backward, and no gradient has to be sent.

`labels.py` is the other operator on a symmetric S.

Shape suffixes: B blocks, N pairs, M = B N rows, D width, P domains, Q couples of blocks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastclip.ops import backend as backends
from fastclip.ops import checks, reference, strip, triangle
from fastclip.ops.collectives import Ranks, plain, rows_of_all, unplain
from fastclip.ops.columns import columns_of
from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.similarity import collected_shape, one_product
from fastclip.ops.tiles import away_from_zero, tiles_of
from fastclip.ops.triangle import Blocks


class BlockStatistics(NamedTuple):
    """(M,), (M,) and (B (B - 1) / 2, N), float32 (float64 for float64 features)."""

    lse: Tensor
    max: Tensor
    positive: Tensor


def block_statistics(
    z: Tensor,
    domains: Sequence[int],
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    ranks: Ranks | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    precision: str = "auto",
) -> BlockStatistics:
    """Differentiable statistics of the blocks of z; see the module's docstring.

    Args:
        z: (B N, D), block after block.
        domains: the domain of each block, in [0, P).
        scale, offset: (P, P), symmetric, on z's device; offset None is 0.
        ranks: the processes whose pairs these are part of.
        backend, chunk_bytes, precision: as `fastclip.ops.similarity.similarity_statistics`.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together.
    """
    compute_dtype = checks.compute_dtype_of(z, precision)
    chunk = checks.chunk_argument(chunk_bytes)
    checks.check_features("features", z)
    chosen = backends.choose("symmetric", backend, z.device, compute_dtype)
    shape = Blocks(z.shape[0] // len(domains), tuple(domains))
    if chosen == "reference":
        with checks.without_autocast(z.device):
            if ranks is not None:
                return _shared_reference(z, scale, offset, shape, ranks, compute_dtype)
            return BlockStatistics(
                *reference.block_statistics(z, scale, offset, shape, compute_dtype)
            )
    checks.refuse_transforms(z, scale)
    options = (*plain(ranks), compute_dtype, chosen, chunk)
    return BlockStatistics(*_blocks(z, scale, offset, list(domains), *options)[:3])


def _shared_reference(
    z: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    shape: Blocks,
    ranks: Ranks,
    compute_dtype: torch.dtype,
) -> BlockStatistics:
    """Every rank computes the whole of S and takes the lines that are its own."""
    blocks = len(shape.domains)
    parts = [rows_of_all(block, ranks, ranks.sizes) for block in z.split(shape.pairs)]
    everyone = Blocks(ranks.rows, shape.domains)
    found = reference.block_statistics(torch.cat(parts), scale, offset, everyone, compute_dtype)
    first = sum(ranks.sizes[: ranks.rank])
    own = slice(first, first + shape.pairs)
    lse, top = (line.reshape(blocks, -1)[:, own].reshape(-1) for line in found[:2])
    return BlockStatistics(lse, top, found[2][:, own])


@torch.library.custom_op("fastclip::block_statistics", mutates_args=())
def _blocks(
    z: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    domains: Sequence[int],
    way: str,
    group: str,
    sizes: Sequence[int],
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = Blocks(z.shape[0] // len(domains), domains)
    with checks.without_autocast(z.device):
        tiles = tiles_of(backend, compute_dtype)
        z = z.to(compute_dtype)
        scale = away_from_zero(scale, tiles.dtype)
        offset = None if offset is None else offset.to(tiles.dtype)
        ranks = unplain(way, group, sizes)
        collected = z.new_empty(0)
        if ranks is None:
            lines = triangle.statistics(tiles, z, scale, offset, shape, chunk_bytes)
        else:
            columns = columns_of(ranks, [shape.pairs] * len(domains))
            collected = columns.collect(z)
            lines = strip.statistics(
                tiles, z, collected, scale, offset, shape, columns, chunk_bytes
            )
        positive = triangle.positive_cosines(tiles, z, shape)
        positive.mul_(triangle.couple_entries(scale, shape))
        if offset is not None:
            positive.add_(triangle.couple_entries(offset, shape))
    return lines.lse(), lines.max, positive, collected


@_blocks.register_fake
def _(z, scale, offset, domains, way, group, sizes, compute_dtype, *rest):
    rows, blocks, dtype = z.shape[0], len(domains), accumulator_dtype(compute_dtype)
    couples = (blocks * (blocks - 1) // 2, rows // blocks)
    outputs = [z.new_empty(size, dtype=dtype) for size in (rows, rows, couples)]
    collected = collected_shape(unplain(way, group, sizes), z)
    return *outputs, z.new_empty(collected, dtype=compute_dtype)


@torch.library.custom_op("fastclip::block_statistics_backward", mutates_args=())
def _blocks_gradient(
    z: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    domains: Sequence[int],
    way: str,
    group: str,
    sizes: Sequence[int],
    collected: Tensor,
    lse: Tensor,
    d_lse: Tensor,
    d_positive: Tensor,
    need_scalars: bool,
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = Blocks(z.shape[0] // len(domains), domains)
    with checks.without_autocast(z.device):
        tiles = tiles_of(backend, compute_dtype)
        features = z.to(compute_dtype)
        wide = away_from_zero(scale, tiles.dtype)
        wide_offset = None if offset is None else offset.to(tiles.dtype)
        ranks = unplain(way, group, sizes)
        tables = (wide, wide_offset)
        lines = (lse, d_lse)
        if ranks is None:
            total, dscale, doffset = triangle.statistics_gradient(
                tiles, features, *tables, shape, *lines, need_scalars, chunk_bytes
            )
        else:
            columns = columns_of(ranks, [shape.pairs] * len(domains))
            total, dscale, doffset = strip.statistics_gradient(
                tiles,
                features,
                collected,
                *tables,
                shape,
                columns,
                *lines,
                need_scalars,
                chunk_bytes,
            )
        coefficient = d_positive * triangle.couple_entries(wide, shape)
        dz = triangle.finish_positives(tiles, total, features, coefficient, shape, z.dtype)
        if need_scalars:
            cosines = triangle.positive_cosines(tiles, features, shape)
            for index, (b, c) in enumerate(shape.couples()):
                p, q = domains[b], domains[c]
                dscale[p, q] += (d_positive[index] * cosines[index]).sum()
                doffset[p, q] += d_positive[index].sum()
    return dz, dscale.to(scale.dtype, copy=True), doffset.to(scale.dtype, copy=True)


@_blocks_gradient.register_fake
def _(z, scale, offset, *rest):
    shapes = (z.shape, z.dtype), (scale.shape, scale.dtype), (scale.shape, scale.dtype)
    return tuple(z.new_empty(shape, dtype=dtype) for shape, dtype in shapes)


def _blocks_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, scale, offset, *ctx.where = inputs[:7]
    lse, maximum, _, collected = output
    ctx.mark_non_differentiable(maximum, collected)
    ctx.save_for_backward(z, scale, offset, collected, lse)
    ctx.options = inputs[7:]


def _blocks_backward(
    ctx: Any, d_lse: Tensor, _: Tensor, d_positive: Tensor, *rest: Any
) -> tuple[Any, ...]:
    z, scale, offset, collected, lse = ctx.saved_tensors
    need_z, need_scale, need_offset = ctx.needs_input_grad[:3]
    dz, dscale, doffset = _blocks_gradient(
        z,
        scale,
        offset,
        *ctx.where,
        collected,
        lse,
        d_lse,
        d_positive,
        need_scale or need_offset,
        *ctx.options,
    )
    wanted = (
        dz if need_z else None,
        dscale if need_scale else None,
        doffset if need_offset else None,
    )
    return *wanted, *(None,) * 7


_blocks.register_autograd(_blocks_backward, setup_context=_blocks_context)
_blocks_gradient.register_autograd(checks.no_double_backward)


@register_flop_formula(torch.ops.fastclip.block_statistics)
def _blocks_flop(z_shape, *args, out_shape=None, **kwargs) -> int:
    return forward_flop(z_shape, *args[3:6])


@register_flop_formula(torch.ops.fastclip.block_statistics_backward)
def _blocks_gradient_flop(z_shape, *args, out_shape=None, **kwargs) -> int:
    return backward_flop(z_shape, *args[3:6])


def forward_flop(z_shape: Sequence[int], way: str, group: str, sizes: Sequence[int]) -> int:
    """Half a product of M x M x D, or over several processes one of this rank's strip."""
    return one_product(z_shape, z_shape, way, group, sizes) // (1 if way else 2)


def backward_flop(z_shape: Sequence[int], way: str, group: str, sizes: Sequence[int]) -> int:
    """One product and a half, or two of the strip."""
    return forward_flop(z_shape, way, group, sizes) * (2 if way else 3)
