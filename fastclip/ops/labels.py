"""Statistics of S among labeled rows (SupCon's L_out, Khosla et al. 2020).

A row leaves out only itself. The operator returns

    lse_i           = logsumexp of S_ij over j != i
    positive_mean_i = mean of S_ip over the others p of the same label, by class sums: O(M D)
    positives_i     = their number

S is visited as in `symmetric.py`, in one block.

Shape suffixes: M own rows, R rows of a part, D width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.ops import backend as backends
from fastclip.ops import checks, kept, passes, problem, reference
from fastclip.ops.classes import Classes, slices
from fastclip.ops.collectives import Ranks
from fastclip.ops.columns import Part
from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.problem import Options
from fastclip.ops.registration import Backward, Tensors, register
from fastclip.ops.symmetric import backward_flop, forward_flop
from fastclip.ops.tiles.base import LogSumExps, finished


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
    keep_bytes: int | None = None,
    precision: str = "auto",
) -> LabelStatistics:
    """Differentiable statistics of labeled rows; see the module's docstring.

    Args:
        z: (M, D).
        labels: (M,) integers.
        scale: 0-d or (1,) tensor, or a number.
        ranks: the processes whose rows these are part of.
        backend, chunk_bytes, keep_bytes, precision: as
            `fastclip.ops.similarity.similarity_statistics`.

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
            found = reference.label_statistics(z, labels, scale, ranks, compute_dtype)
        return LabelStatistics(*found)
    checks.refuse_transforms(z, scale)
    keep = kept.keep_argument(keep_bytes, chosen, z, scale)
    options = problem.options(compute_dtype, chosen, chunk, ranks, domains=(0,), keep_bytes=keep)
    return LabelStatistics(*_labels(z, scale, labels, **options)[:3])


def _forward(z: Tensor, scale: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, ...]:
    with checks.without_autocast(z.device):
        asked = problem.symmetric(Options(**options), z, scale.reshape(1, 1), None)
        z, tiles, columns = asked.x_ND, asked.tiles, asked.columns
        collected = columns.collect(z)
        classes = Classes(labels, columns.of_all_ranks(labels))
        dot = torch.zeros(len(z), dtype=tiles.dtype, device=z.device)

        def add_class_sums(part: Part) -> None:
            for width in slices(part.features):
                rows = part.features[:, width].to(tiles.dtype)
                dot.add_(tiles.row_dot(z[:, width], classes.sum(rows, part.segments[0].column)))

        rows, _, kept_S = passes.statistics(asked, collected, add_class_sums)
        itself = torch.zeros_like(dot)
        for width in slices(z):
            # added up as above, so that a row alone in its class has 0
            itself.add_(tiles.row_dot(z[:, width], z[:, width]))
        others = classes.others.to(tiles.dtype)
        positive_mean = dot.sub_(itself).mul_(asked.scale_PP[0, 0]).div_(others.clamp(min=1))
    return rows.lse(), positive_mean, others, collected, *kept_S


def _fake(inputs: Tensors, options: Options) -> list[Tensor]:
    z, dtype = inputs[0], accumulator_dtype(options.dtype)
    collected = z.new_empty(problem.collected_shape(z, options), dtype=options.dtype)
    statistics = (z.new_empty(z.shape[0], dtype=dtype) for _ in range(3))
    return [*statistics, collected, *kept.fake_kept(z, z, options)]


def _gradient(
    inputs: Tensors, saved: Tensors, upstream: Tensors, options: Options
) -> tuple[Tensor | None, ...]:
    z, scale, labels = inputs
    collected, lse, positive_mean, *kept_S = saved
    d_lse, d_positive_mean = (torch.zeros_like(lse) if one is None else one for one in upstream)
    with checks.without_autocast(z.device):
        asked = problem.symmetric(options, z, scale.reshape(1, 1), None)
        z_MD, tiles, columns, factor = asked.x_ND, asked.tiles, asked.columns, asked.scale_PP
        classes = Classes(labels, columns.of_all_ranks(labels))
        weight = d_positive_mean / classes.others.clamp(min=1)
        all_weights = columns.of_all_ranks(weight)[:, None]
        of_anchor = (weight * factor[0, 0])[:, None]

        def add_class_sums(total: Tensor, features: Tensor, column: int) -> None:
            # row k is an anchor, and a positive of every other row of its class
            for width in slices(features):
                rows = features[:, width].to(tiles.dtype)
                total[:, width].addcmul_(of_anchor, classes.sum(rows, column))
                rows = rows * all_weights[column : column + len(rows)]
                total[:, width].addcmul_(factor, classes.sum(rows, column))

        of_rows = LogSumExps(lse, d_lse)
        needs = (True, True, options.needs[1])
        if asked.is_triangle:
            found = passes.gradient(asked, collected, kept.Kept(*kept_S), of_rows, of_rows, needs)
            assert found.x is not None
            add_class_sums(found.x, z_MD, 0)
        else:
            of_classes = z.new_zeros(z.shape, dtype=tiles.dtype)
            of_columns = asked.of_all_columns(of_rows)
            found = passes.gradient(
                asked,
                collected,
                kept.Kept(*kept_S),
                of_rows,
                of_columns,
                needs,
                lambda part: add_class_sums(of_classes, part.features, part.segments[0].column),
            )
            assert found.x is not None
            found.x.add_(of_classes)
        dscale = None
        if options.needs[1]:
            dscale = found.tables(factor)[0][0, 0]
            dscale = dscale + (d_positive_mean * positive_mean).sum() / factor[0, 0]
        # not of itself
        dz = finished(tiles, found.x, [(-2 * of_anchor[:, 0], z_MD)], z.dtype)
    return dz, dscale


_labels = register(
    "label_statistics",
    _forward,
    inputs="z scale labels",
    outputs=6,
    record=Options,
    fake=_fake,
    flop=forward_flop,
    backward=Backward(
        _gradient, inputs=2, saved=(3, 0, 1, 4, 5), constant=(2, 3, 4, 5), flop=backward_flop
    ),
)
