"""Statistics of S among the rows of one set: several views and texts, or labelled samples.

`block_statistics`: Z is made of B blocks of N rows in the same pair order. Row i's negatives are
all rows of other pairs, of every domain; its positives are the rows of its own pair in the other
blocks (UniCLIP's MP-NCE, Lee et al. 2022; NT-Xent has two blocks of one domain). It returns

    lse_i       = logsumexp of S_ij over the negatives of i, and max_i, their maximum
    positive_qk = S between the two rows of pair k in the q-th couple of blocks (b < c)

with S_ij = scale[p, q] * <z_i, z_j> + offset[p, q] for domains p, q of i and j.

`label_statistics`: one block; a row leaves out only itself (SupCon's L_out, Khosla et al. 2020).

    lse_i           = logsumexp of S_ij over j != i
    positive_mean_i = mean of S_ip over the others p of the same label, by class sums: O(M D)
    positives_i     = their number

Every pair of rows is visited once: half a product of M x M x D forward, one and a half backward.

Shape suffixes: B blocks, N pairs, M = B N rows, D width, P domains, Q couples of blocks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastclip.ops import backend as backends
from fastclip.ops import checks, reference, triangle
from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.rectangle import add_rows_
from fastclip.ops.tiles import tiles_of
from fastclip.ops.triangle import Blocks

ROWS_OF_A_PART = 256


class BlockStatistics(NamedTuple):
    """(M,), (M,) and (B (B - 1) / 2, N), float32 (float64 for float64 features)."""

    lse: Tensor
    max: Tensor
    positive: Tensor


class LabelStatistics(NamedTuple):
    """Each (M,), float32 (float64 for float64 features)."""

    lse: Tensor
    positive_mean: Tensor
    positives: Tensor


def block_statistics(
    z: Tensor,
    domains: Sequence[int],
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    precision: str = "auto",
) -> BlockStatistics:
    """Differentiable statistics of the blocks of z; see the module's docstring.

    Args:
        z: (B N, D), block after block.
        domains: the domain of each block, in [0, P).
        scale, offset: (P, P), symmetric, on z's device; offset None is 0. No scale is zero.
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
        with torch.autocast(z.device.type, enabled=False):
            return BlockStatistics(
                *reference.block_statistics(z, scale, offset, shape, compute_dtype)
            )
    checks.refuse_forward_mode(z, scale)
    return BlockStatistics(*_blocks(z, scale, offset, list(domains), compute_dtype, chosen, chunk))


@torch.library.custom_op("fastclip::block_statistics", mutates_args=())
def _blocks(
    z: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    domains: Sequence[int],
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = Blocks(z.shape[0] // len(domains), domains)
    with torch.autocast(z.device.type, enabled=False):
        tiles = tiles_of(backend, compute_dtype)
        z = z.to(compute_dtype)
        scale = scale.to(tiles.dtype)
        offset = None if offset is None else offset.to(tiles.dtype)
        lines = triangle.statistics(tiles, z, scale, offset, shape, chunk_bytes)
        positive = triangle.positive_cosines(tiles, z, shape)
        positive.mul_(triangle.couple_entries(scale, shape))
        if offset is not None:
            positive.add_(triangle.couple_entries(offset, shape))
    return lines.lse(), lines.max, positive


@_blocks.register_fake
def _(z, scale, offset, domains, compute_dtype, backend, chunk_bytes):
    rows, blocks, dtype = z.shape[0], len(domains), accumulator_dtype(compute_dtype)
    couples = (blocks * (blocks - 1) // 2, rows // blocks)
    return tuple(z.new_empty(size, dtype=dtype) for size in (rows, rows, couples))


@torch.library.custom_op("fastclip::block_statistics_backward", mutates_args=())
def _blocks_gradient(
    z: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    domains: Sequence[int],
    lse: Tensor,
    d_lse: Tensor,
    d_positive: Tensor,
    need_scalars: bool,
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = Blocks(z.shape[0] // len(domains), domains)
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    with torch.autocast(z.device.type, enabled=False):
        tiles = tiles_of(backend, compute_dtype)
        features = z.to(compute_dtype)
        wide = scale.to(tiles.dtype)
        wide_offset = None if offset is None else offset.to(tiles.dtype)
        total, dscale, doffset = triangle.statistics_gradient(
            tiles, features, wide, wide_offset, shape, lse, d_lse, need_scalars, chunk_bytes
        )
        coefficient = d_positive * triangle.couple_entries(wide, shape)
        triangle.finish_positives(tiles, total, features, coefficient, shape, dz)
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
    z, scale, offset, domains, *options = inputs
    lse, maximum, _ = output
    ctx.mark_non_differentiable(maximum)
    ctx.save_for_backward(z, scale, offset, lse)
    ctx.domains, ctx.options = domains, options


def _blocks_backward(ctx: Any, d_lse: Tensor, _: Tensor, d_positive: Tensor) -> tuple[Any, ...]:
    z, scale, offset, lse = ctx.saved_tensors
    need_z, need_scale, need_offset = ctx.needs_input_grad[:3]
    dz, dscale, doffset = _blocks_gradient(
        z,
        scale,
        offset,
        ctx.domains,
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
    return *wanted, *(None,) * 4


_blocks.register_autograd(_blocks_backward, setup_context=_blocks_context)
_blocks_gradient.register_autograd(checks.no_double_backward)


def label_statistics(
    z: Tensor,
    labels: Tensor,
    scale: Tensor | float,
    *,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    precision: str = "auto",
) -> LabelStatistics:
    """Differentiable statistics of labelled rows; see the module's docstring.

    Args:
        z: (M, D).
        labels: (M,) integers.
        scale: 0-d or (1,) tensor, or a number; not zero.
        backend, chunk_bytes, precision: as `fastclip.ops.similarity.similarity_statistics`.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together.
    """
    compute_dtype = checks.compute_dtype_of(z, precision)
    chunk = checks.chunk_argument(chunk_bytes)
    checks.check_features("features", z)
    checks.check_ids("labels", labels, z.shape[0], z.device)
    scale = checks.as_scalar("scale", scale, z)
    chosen = backends.choose("symmetric", backend, z.device, compute_dtype)
    if chosen == "reference":
        with torch.autocast(z.device.type, enabled=False):
            return LabelStatistics(*reference.label_statistics(z, labels, scale, compute_dtype))
    checks.refuse_forward_mode(z, scale)
    return LabelStatistics(*_labels(z, labels, scale, compute_dtype, chosen, chunk))


@torch.library.custom_op("fastclip::label_statistics", mutates_args=())
def _labels(
    z: Tensor,
    labels: Tensor,
    scale: Tensor,
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = Blocks(z.shape[0], (0,))
    with torch.autocast(z.device.type, enabled=False):
        tiles = tiles_of(backend, compute_dtype)
        z = z.to(compute_dtype)
        scale = scale.reshape(1, 1).to(tiles.dtype)
        lines = triangle.statistics(tiles, z, scale, None, shape, chunk_bytes)
        classes = _Classes(labels)
        positives = classes.others(tiles.dtype)
        wide = z.to(tiles.dtype)
        dot = tiles.row_dot(z, classes.sum(wide).sub_(wide))
        positive_mean = dot.mul_(scale[0, 0]).div_(positives.clamp(min=1))
    return lines.lse(), positive_mean, positives


@_labels.register_fake
def _(z, labels, scale, compute_dtype, backend, chunk_bytes):
    dtype = accumulator_dtype(compute_dtype)
    return tuple(z.new_empty(z.shape[0], dtype=dtype) for _ in range(3))


@torch.library.custom_op("fastclip::label_statistics_backward", mutates_args=())
def _labels_gradient(
    z: Tensor,
    labels: Tensor,
    scale: Tensor,
    lse: Tensor,
    d_lse: Tensor,
    d_positive_mean: Tensor,
    need_scale: bool,
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    shape = Blocks(z.shape[0], (0,))
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    with torch.autocast(z.device.type, enabled=False):
        tiles = tiles_of(backend, compute_dtype)
        features = z.to(compute_dtype)
        table = scale.reshape(1, 1).to(tiles.dtype)
        total, dscale, _ = triangle.statistics_gradient(
            tiles, features, table, None, shape, lse, d_lse, need_scale, chunk_bytes
        )
        classes = _Classes(labels)
        weight = d_positive_mean / classes.others(tiles.dtype).clamp(min=1)
        wide = features.to(tiles.dtype)
        # row k is an anchor, and a positive of every other row of its class
        others = classes.sum(wide).sub_(wide)
        if need_scale:
            dscale[0, 0] += (weight * tiles.row_dot(wide, others)).sum()
        total.addcmul_((weight * table[0, 0])[:, None], others)
        weighted = wide.mul((weight * table[0, 0])[:, None])
        total.add_(classes.sum(weighted).sub_(weighted))
        tiles.finish(total, [], dz)
    return dz, dscale.to(scale.dtype).reshape(scale.shape)


@_labels_gradient.register_fake
def _(z, labels, scale, *rest):
    return z.new_empty(z.shape), scale.new_empty(scale.shape)


def _labels_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, labels, scale, *options = inputs
    lse, _, positives = output
    ctx.mark_non_differentiable(positives)
    ctx.save_for_backward(z, labels, scale, lse)
    ctx.options = options


def _labels_backward(
    ctx: Any, d_lse: Tensor, d_positive_mean: Tensor, _: Tensor
) -> tuple[Any, ...]:
    need_z, _, need_scale = ctx.needs_input_grad[:3]
    dz, dscale = _labels_gradient(
        *ctx.saved_tensors, d_lse, d_positive_mean, need_scale, *ctx.options
    )
    return dz if need_z else None, None, dscale if need_scale else None, None, None, None


_labels.register_autograd(_labels_backward, setup_context=_labels_context)
_labels_gradient.register_autograd(checks.no_double_backward)


class _Classes:
    """Sums over rows of one label, without reading a label on the host.

    Classes are numbered by the place of their first row in label order, so that any integers
    serve and the number of classes need not be known.
    """

    def __init__(self, labels: Tensor) -> None:
        ordered, order = torch.sort(labels, stable=True)
        place = torch.arange(len(labels), device=labels.device)
        begins = torch.ones_like(ordered, dtype=torch.bool)
        begins[1:] = ordered[1:] != ordered[:-1]
        # a class is summed in parts: adding its rows one after the other would take long for few
        # large classes
        part = (begins | (place % ROWS_OF_A_PART == 0)).cumsum(0) - 1
        class_of_row = begins.cumsum(0) - 1
        self.part = torch.empty_like(order)
        self.part[order] = part
        self.index = torch.empty_like(order)
        self.index[order] = class_of_row
        # parts that do not exist add their zeros each to a place of its own
        self.class_of_part = place.clone()
        self.class_of_part[part] = class_of_row

    def sum(self, rows_MD: Tensor) -> Tensor:
        """For each row the sum over its class, (M, D)."""
        parts = add_rows_(torch.zeros_like(rows_MD), self.part, rows_MD)
        sums = add_rows_(torch.zeros_like(rows_MD), self.class_of_part, parts)
        return sums.index_select(0, self.index)

    def others(self, dtype: torch.dtype) -> Tensor:
        """For each row the number of others in its class, (M,)."""
        ones = torch.ones((len(self.index), 1), dtype=dtype, device=self.index.device)
        return self.sum(ones).squeeze(1) - 1


@register_flop_formula([torch.ops.fastclip.block_statistics, torch.ops.fastclip.label_statistics])
def _forward_flop(z_shape, *args, out_shape=None, **kwargs) -> int:
    return z_shape[0] * z_shape[0] * z_shape[1]


@register_flop_formula(
    [torch.ops.fastclip.block_statistics_backward, torch.ops.fastclip.label_statistics_backward]
)
def _backward_flop(z_shape, *args, out_shape=None, **kwargs) -> int:
    return 3 * z_shape[0] * z_shape[0] * z_shape[1]
