"""Statistics of S among labelled rows (SupCon's L_out, Khosla et al. 2020).

A row leaves out only itself. The operator returns

    lse_i           = logsumexp of S_ij over j != i
    positive_mean_i = mean of S_ip over the others p of the same label, by class sums: O(M D)
    positives_i     = their number

The walks are those of `symmetric.py`: `triangle.py` for one process, `strip.py` over several.

Shape suffixes: M own rows, R rows of a part, D width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastclip.ops import backend as backends
from fastclip.ops import checks, reference, strip, triangle
from fastclip.ops.classes import Classes, slices
from fastclip.ops.collectives import Ranks, plain, rows_of_all, unplain
from fastclip.ops.columns import columns_of
from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.similarity import collected_shape
from fastclip.ops.symmetric import backward_flop, forward_flop
from fastclip.ops.tiles import away_from_zero, finished, tiles_of
from fastclip.ops.triangle import Blocks


class LabelStatistics(NamedTuple):
    """Each (M,), float32 (float64 for float64 features)."""

    lse: Tensor
    positive_mean: Tensor
    positives: Tensor


def label_statistics(
    z: Tensor,
    labels: Tensor,
    scale: Tensor | float,
    *,
    ranks: Ranks | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    precision: str = "auto",
) -> LabelStatistics:
    """Differentiable statistics of labelled rows; see the module's docstring.

    Args:
        z: (M, D).
        labels: (M,) integers.
        scale: 0-d or (1,) tensor, or a number.
        ranks: the processes whose rows these are part of.
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
        with checks.without_autocast(z.device):
            if ranks is not None:
                return _shared_reference(z, labels, scale, ranks, compute_dtype)
            return LabelStatistics(*reference.label_statistics(z, labels, scale, compute_dtype))
    checks.refuse_transforms(z, scale)
    options = (*plain(ranks), compute_dtype, chosen, chunk)
    return LabelStatistics(*_labels(z, labels, scale, *options)[:3])


def _shared_reference(
    z: Tensor, labels: Tensor, scale: Tensor, ranks: Ranks, compute_dtype: torch.dtype
) -> LabelStatistics:
    """Every rank computes the whole of S and takes the lines that are its own."""
    z, labels = (rows_of_all(own, ranks, ranks.sizes) for own in (z, labels))
    first = sum(ranks.sizes[: ranks.rank])
    own = slice(first, first + ranks.sizes[ranks.rank])
    found = reference.label_statistics(z, labels, scale, compute_dtype)
    return LabelStatistics(*(line[own] for line in found))


@torch.library.custom_op("fastclip::label_statistics", mutates_args=())
def _labels(
    z: Tensor,
    labels: Tensor,
    scale: Tensor,
    way: str,
    group: str,
    sizes: Sequence[int],
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = Blocks(z.shape[0], (0,))
    ranks = unplain(way, group, sizes)
    columns = columns_of(ranks, [z.shape[0]])
    with checks.without_autocast(z.device):
        tiles = tiles_of(backend, compute_dtype)
        z = z.to(compute_dtype)
        table = away_from_zero(scale.reshape(1, 1), tiles.dtype)
        collected = columns.collect(z)
        classes = Classes(labels, columns.all_lines(labels))
        dot = torch.zeros(z.shape[0], dtype=tiles.dtype, device=z.device)

        def see(rows: Tensor, column: int) -> None:
            for part in slices(rows):
                dot.add_(
                    tiles.row_dot(z[:, part], classes.sum(rows[:, part].to(tiles.dtype), column))
                )

        if ranks is None:
            lines = triangle.statistics(tiles, z, table, None, shape, chunk_bytes)
            see(z, 0)
        else:
            lines = strip.statistics(
                tiles,
                z,
                collected,
                table,
                None,
                shape,
                columns,
                chunk_bytes,
                lambda part: see(part.features, part.segments[0].column),
            )
        itself = torch.zeros_like(dot)
        for part in slices(z):
            # added up as above, so that a row alone in its class has 0
            itself.add_(tiles.row_dot(z[:, part], z[:, part]))
        others = classes.others.to(tiles.dtype)
        positive_mean = dot.sub_(itself).mul_(table[0, 0]).div_(others.clamp(min=1))
    return lines.lse(), positive_mean, others, collected


@_labels.register_fake
def _(z, labels, scale, way, group, sizes, compute_dtype, *rest):
    dtype = accumulator_dtype(compute_dtype)
    collected = collected_shape(unplain(way, group, sizes), z)
    lines = (z.new_empty(z.shape[0], dtype=dtype) for _ in range(3))
    return *lines, z.new_empty(collected, dtype=compute_dtype)


@torch.library.custom_op("fastclip::label_statistics_backward", mutates_args=())
def _labels_gradient(
    z: Tensor,
    labels: Tensor,
    scale: Tensor,
    way: str,
    group: str,
    sizes: Sequence[int],
    collected: Tensor,
    lse: Tensor,
    positive_mean: Tensor,
    d_lse: Tensor,
    d_positive_mean: Tensor,
    need_scale: bool,
    compute_dtype: torch.dtype,
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    shape = Blocks(z.shape[0], (0,))
    ranks = unplain(way, group, sizes)
    columns = columns_of(ranks, [z.shape[0]])
    with checks.without_autocast(z.device):
        tiles = tiles_of(backend, compute_dtype)
        features = z.to(compute_dtype)
        table = away_from_zero(scale.reshape(1, 1), tiles.dtype)
        classes = Classes(labels, columns.all_lines(labels))
        weight = d_positive_mean / classes.others.clamp(min=1)
        all_weights = columns.all_lines(weight)[:, None]
        of_anchor = (weight * table[0, 0])[:, None]

        def see(total: Tensor, rows: Tensor, column: int) -> None:
            # row k is an anchor, and a positive of every other row of its class
            for part in slices(rows):
                wide = rows[:, part].to(tiles.dtype)
                total[:, part].addcmul_(of_anchor, classes.sum(wide, column))
                wide = wide * all_weights[column : column + len(wide)]
                total[:, part].addcmul_(table, classes.sum(wide, column))

        if ranks is None:
            total, dscale, _ = triangle.statistics_gradient(
                tiles, features, table, None, shape, lse, d_lse, need_scale, chunk_bytes
            )
            see(total, features, 0)
        else:
            of_classes = z.new_zeros(z.shape, dtype=tiles.dtype)
            total, dscale, _ = strip.statistics_gradient(
                tiles,
                features,
                collected,
                table,
                None,
                shape,
                columns,
                lse,
                d_lse,
                need_scale,
                chunk_bytes,
                lambda part: see(of_classes, part.features, part.segments[0].column),
            )
            total.add_(of_classes)
        if need_scale:
            dscale[0, 0] += (d_positive_mean * positive_mean).sum() / table[0, 0]
        # not of itself
        dz = finished(tiles, total, [(-2 * of_anchor[:, 0], features)], z.dtype)
    return dz, dscale.to(scale.dtype).reshape(scale.shape)


@_labels_gradient.register_fake
def _(z, labels, scale, *rest):
    return z.new_empty(z.shape), scale.new_empty(scale.shape)


def _labels_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, labels, scale, *ctx.where = inputs[:6]
    lse, positive_mean, positives, collected = output
    ctx.mark_non_differentiable(positives, collected)
    ctx.save_for_backward(z, labels, scale, collected, lse, positive_mean)
    ctx.options = inputs[6:]


def _labels_backward(
    ctx: Any, d_lse: Tensor, d_positive_mean: Tensor, *rest: Any
) -> tuple[Any, ...]:
    need_z, _, need_scale = ctx.needs_input_grad[:3]
    z, labels, scale, *saved = ctx.saved_tensors
    dz, dscale = _labels_gradient(
        z, labels, scale, *ctx.where, *saved, d_lse, d_positive_mean, need_scale, *ctx.options
    )
    return dz if need_z else None, None, dscale if need_scale else None, *(None,) * 6


_labels.register_autograd(_labels_backward, setup_context=_labels_context)
_labels_gradient.register_autograd(checks.no_double_backward)


@register_flop_formula(torch.ops.fastclip.label_statistics)
def _labels_flop(z_shape, *args, out_shape=None, **kwargs) -> int:
    return forward_flop(z_shape, *args[2:5])


@register_flop_formula(torch.ops.fastclip.label_statistics_backward)
def _labels_gradient_flop(z_shape, *args, out_shape=None, **kwargs) -> int:
    return backward_flop(z_shape, *args[2:5])
