"""Statistics of S among the rows of one set of several views and texts.

Z is made of B blocks of N rows in the same pair order. Row i's negatives are all rows of other
pairs, of every domain, less those of its group; its positives are the rows of its own pair in the
other blocks (UniCLIP's MP-NCE, Lee et al. 2022; NT-Xent has two blocks of one domain). The operator
returns

    lse_i       = logsumexp of S_ij over the negatives of i, and max_i, their maximum, on request
    positive_qk = S between the two rows of pair k in the q-th couple of blocks (b < c)

with S_ij = scale[p, q] * <z_i, z_j> + offset[p, q] for domains p, q of i and j.

Every pair of rows is visited once (`schedule.py`): half a product of M x M x D forward, one and a
half backward, or one where the exponentials are kept (`kept.py`), since with u_i = a_i exp(-lse_i)
the gradient of a pair is symmetric, exp(S_ij) (u_i + u_j), and serves both of its sides. Over
several processes a rank has all blocks of its own pairs and visits its strip of S: one product of
it forward, two or one backward. G is symmetric there too: with the log-sum-exps and upstream
gradients of all rows at hand (8 bytes a row) the strip gives this rank's dZ whole, so no gradient
is sent.

`labels.py` is the other operator on a symmetric S.

Shape suffixes: B blocks, N pairs, M = B N rows, D width, P domains, Q couples of blocks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastclip.ops import backend as backends
from fastclip.ops import checks, kept, passes, problem, reference
from fastclip.ops.collectives import Ranks
from fastclip.ops.gemm import accumulator_dtype
from fastclip.ops.problem import Options, Problem, couples
from fastclip.ops.registration import Backward, Tensors, register
from fastclip.ops.tiles.base import LogSumExps, finished_room


class BlockStatistics(NamedTuple):
    """(M,), (M,) or empty, and (B (B - 1) / 2, N), float32 (float64 for float64 features)."""

    lse: Tensor
    max: Tensor
    positive: Tensor


def block_statistics(
    z: Tensor,
    domains: Sequence[int],
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    pair_group: Tensor | None = None,
    maxima: bool = False,
    ranks: Ranks | None = None,
    backend: str = "auto",
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
    precision: str = "auto",
) -> BlockStatistics:
    """Differentiable statistics of the blocks of z; see the module's docstring.

    Args:
        z: (B N, D), block after block.
        domains: the domain of each block, in [0, P).
        scale, offset: (P, P), symmetric, on z's device; offset None is 0.
        pair_group: (N,) integer ids; rows of other pairs of a row's group are no negatives.
        ranks: the processes whose pairs these are part of.
        backend, chunk_bytes, keep_bytes, precision: as
            `fastclip.ops.similarity.similarity_statistics`.

    Raises:
        ValueError: on shapes, dtypes, devices or options that do not fit together.
    """
    compute_dtype = checks.compute_dtype_of(z, precision)
    chunk = checks.chunk_argument(chunk_bytes)
    checks.check_features("features", z)
    if pair_group is not None:
        checks.check_ids("row_group", pair_group, z.shape[0] // len(domains), z.device)
        pair_group = pair_group.contiguous()
    chosen = backends.choose("symmetric", backend, z.device, compute_dtype)
    keep = kept.keep_argument(keep_bytes, chosen, z, scale, offset)
    options = problem.options(
        compute_dtype,
        chosen,
        chunk,
        ranks,
        maxima=maxima,
        domains=tuple(domains),
        keep_bytes=keep,
    )
    if chosen == "reference":
        with checks.without_autocast(z.device):
            found = reference.block_statistics(z, scale, offset, pair_group, Options(**options))
        return BlockStatistics(*found)
    checks.refuse_transforms(*(t for t in (z, scale, offset) if t is not None))
    return BlockStatistics(*_blocks(z, scale, offset, pair_group, **options)[:3])


def _forward(
    z: Tensor, scale: Tensor, offset: Tensor | None, pair_group: Tensor | None, **options: Any
) -> tuple[Tensor, ...]:
    with checks.without_autocast(z.device):
        asked = problem.symmetric(Options(**options), z, scale, offset, pair_group)
        collected = asked.columns.collect(asked.x_ND)
        rows, _, kept_S = passes.statistics(asked, collected)
        positive = _positive_cosines(asked)
        positive.mul_(_entries(asked.scale_PP, asked))
        if asked.offset_PP is not None:
            positive.add_(_entries(asked.offset_PP, asked))
    row_max = rows.max if asked.options.maxima else positive.new_empty(0)
    return rows.lse(), row_max, positive, collected, *kept_S


def _fake(inputs: Tensors, options: Options) -> list[Tensor]:
    z, blocks, dtype = inputs[0], len(options.domains), accumulator_dtype(options.dtype)
    rows, positives = z.shape[0], (blocks * (blocks - 1) // 2, z.shape[0] // blocks)
    collected = z.new_empty(problem.collected_shape(z, options), dtype=options.dtype)
    sizes = rows, rows if options.maxima else 0, positives
    statistics = (z.new_empty(size, dtype=dtype) for size in sizes)
    return [*statistics, collected, *kept.fake_kept(z, z, options)]


def _gradient(
    inputs: Tensors, saved: Tensors, upstream: Tensors, options: Options
) -> tuple[Tensor | None, ...]:
    z, scale, offset, pair_group = inputs
    collected, lse, *kept_S = saved
    d_lse, d_positive = upstream
    d_lse = torch.zeros_like(lse) if d_lse is None else d_lse
    need_scalars = options.needs[1] or options.needs[2]
    with checks.without_autocast(z.device):
        asked = problem.symmetric(options, z, scale, offset, pair_group)
        rows = LogSumExps(lse, d_lse)
        columns = rows if asked.is_triangle else asked.of_all_columns(rows)
        needs = True, True, need_scalars
        found = passes.gradient(asked, collected, kept.Kept(*kept_S), rows, columns, needs)
        assert found.x is not None
        if d_positive is None:
            shape = len(couples(len(options.domains))), len(z) // len(options.domains)
            d_positive = lse.new_zeros(shape)
        dz = _add_positives(asked, found.x, d_positive * _entries(asked.scale_PP, asked), z.dtype)
        if not need_scalars:
            return dz, None, None
        dscale, doffset = found.tables(asked.scale_PP)
        cosines = _positive_cosines(asked)
        for index, (b, c) in enumerate(couples(len(options.domains))):
            entry = asked.domains[b], asked.domains[c]
            dscale[entry] += (d_positive[index] * cosines[index]).sum()
            doffset[entry] += d_positive[index].sum()
    return dz, dscale, None if offset is None else doffset


def _positive_cosines(asked: Problem) -> Tensor:
    """Cosines of each pair's rows, (Q, N)."""
    blocks, z_MD = asked.row_blocks, asked.x_ND
    found = [asked.tiles.row_dot(z_MD[blocks[b]], z_MD[blocks[c]]) for b, c in _couples(asked)]
    return torch.stack(found)


def _entries(table_PP: Tensor, asked: Problem) -> Tensor:
    """The entries of a table by domain pair for each couple of blocks, (Q, 1)."""
    domains = asked.domains
    return torch.stack([table_PP[domains[b], domains[c]] for b, c in _couples(asked)])[:, None]


def _couples(asked: Problem) -> list[tuple[int, int]]:
    return couples(len(asked.domains))


def _add_positives(
    asked: Problem, dz_MD: Tensor, coefficient_QN: Tensor, dtype: torch.dtype
) -> Tensor:
    """Add coefficient * partner to both rows of each positive pair, and cast."""
    out_MD, blocks, z_MD = finished_room(dz_MD, dtype), asked.row_blocks, asked.x_ND
    for block, rows in enumerate(blocks):
        terms = [
            (coefficient_QN[index], z_MD[blocks[c if b == block else b]])
            for index, (b, c) in enumerate(_couples(asked))
            if block in (b, c)
        ]
        asked.tiles.finish(dz_MD[rows], terms, out_MD[rows])
    return out_MD


def forward_flop(shapes: Sequence[Any], options: Options) -> int:
    """Half a product of M x M x D, or over several processes one of this rank's strip."""
    strip = problem.one_product(shapes[0], shapes[0], options)
    return strip if options.exchange else strip // 2


def backward_flop(shapes: Sequence[Any], options: Options) -> int:
    """One product and a half, or two of the strip; one of either where S was kept."""
    again = not kept.kept_entries(shapes[0][0], shapes[0][0], options)
    return forward_flop(shapes, options) * (again + (1 if options.exchange else 2))


_blocks = register(
    "block_statistics",
    _forward,
    inputs="z scale offset? pair_group?",
    outputs=6,
    record=Options,
    fake=_fake,
    flop=forward_flop,
    backward=Backward(
        _gradient, inputs=3, saved=(3, 0, 4, 5), constant=(1, 3, 4, 5), flop=backward_flop
    ),
)
