"""Tiles about a common anchor, and those that it does not serve, against float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.kernels import flags, launch, lean, similarity
from fastclip.kernels.launch import INTERPRETED, Tiling, count_launches
from fastclip.kernels.lean import Logits
from fastclip.ops.tiles.base import LogSumExps, SoftmaxStats, Tile
from fastclip.ops.tiles.torch import TorchTiles
from fastclip.ops.tiles.triton import TritonTiles

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="a GPU is there: fastclip.bench.check runs the kernels on it"
)

ROWS, COLUMNS, WIDTH = 40, 75, 24
EPS = torch.finfo(torch.float32).eps


def features(lines: int, norm: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return norm * F.normalize(torch.randn(lines, WIDTH, generator=generator), dim=1)


def tile(scale: float, offset: float | None = None, norm: float = 1.0, ids: Any = None) -> Tile:
    given = None if offset is None else torch.tensor(offset)
    x, y = features(ROWS, norm, 1), features(COLUMNS, norm, 2)
    return Tile(x, y, torch.tensor(scale), given, 3, *(ids or (None, None)))


def wide(tile: Tile) -> Tile:
    x, y, scale = tile.x_CD.double(), tile.y_SD.double(), tile.scale.double()
    offset = None if tile.offset is None else tile.offset.double()
    return tile._replace(x_CD=x, y_SD=y, scale=scale, offset=offset)


def statistics(tiles: Any, tile: Tile, columns: bool = True) -> list[SoftmaxStats]:
    counts = (len(tile.x_CD), len(tile.y_SD)) if columns else (len(tile.x_CD),)
    found = [SoftmaxStats.empty(n, tile.x_CD, tiles.dtype) for n in counts]
    tiles.statistics(tile, *found, *([] if columns else [None]))
    return found


def gradient(tiles: Any, tile: Tile, lines: list[LogSumExps]) -> tuple[Tensor, Tensor, Tensor]:
    out = tiles.gradient_buffer(len(tile.x_CD), tile.y_SD)
    dot, total = tiles.gradient(tile, lines[0], lines[1] if lines[1:] else None, out, True)
    return out.clone(), dot, total


def kept_gradient(tile: Tile, lines: list[LogSumExps]) -> tuple[Tensor, Tensor]:
    """From the exponentials, which stay as they are; what is around them is not read."""
    tiles = TritonTiles(torch.float32, maxima=False)
    rows, columns = len(tile.x_CD), len(tile.y_SD)
    E = torch.full(similarity.room_for(rows, columns), math.nan)[:rows, :columns]
    running = [SoftmaxStats.empty(len(line.lse), line.lse, torch.float32) for line in lines]
    other = running[1] if running[1:] else None
    tiles.statistics_and_exponentials(tile, running[0], other, E)
    before = E.clone()
    out = tiles.gradient_buffer(rows, tile.y_SD).fill_(math.nan)
    of_columns = lines[1] if lines[1:] else None
    total = tiles.gradient_of_exponentials(
        tile, lines[0], of_columns, E, out, tile.offset is not None
    )
    assert torch.equal(E.view(torch.int32), before.view(torch.int32))
    return out.clone(), total


def weights(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(n, generator=generator) / n for n in sizes]


def close(got: Tensor, want: Tensor, allowed: float) -> None:
    """Relative to the largest; NaN where NaN is due."""
    assert torch.equal(got.isnan(), want.isnan())
    size = want.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1e-300)
    error = (got.double() - want).nan_to_num(0.0).abs().max() / size
    assert error <= allowed, (error, allowed)


def check(tile: Tile, weight: list[Tensor] | None = None, columns: bool = True) -> None:
    """Statistics, then the gradient from exact log-sum-exps."""
    exact = wide(tile)
    largest = (exact.x_CD @ exact.y_SD.T).nan_to_num(0.0).abs().max() * exact.scale.abs()
    # an exponent is known to as many eps as it is large
    allowed = EPS * (16 + 4 * largest.item() + (tile.offset or torch.zeros(())).abs().item())
    want = statistics(TorchTiles(torch.float64), exact, columns)
    for maxima in (True, False):
        tiles = TritonTiles(torch.float32)
        tiles.maxima = maxima
        found = statistics(tiles, tile, columns)
        for got, due in zip(found, want, strict=True):
            empty = due.lse() == -math.inf
            assert torch.equal(got.lse() == -math.inf, empty)
            close(got.lse()[~empty], due.lse()[~empty], allowed)
            if maxima:
                known = due.max.isfinite()
                close(got.max[known], due.max[known], allowed)
    weight = weight or weights(ROWS, COLUMNS)
    lines = [LogSumExps(w.lse(), a.double()) for w, a in zip(want, weight, strict=False)]
    single = [LogSumExps(a.lse.float(), a.upstream.float()) for a in lines]
    got_G, got_dot, got_total = gradient(TritonTiles(torch.float32), tile, single)
    want_G, want_dot, want_total = gradient(TorchTiles(torch.float64), exact, lines)
    close(got_G, want_G, 4 * allowed)
    kept_G, kept_total = kept_gradient(tile, single)
    close(kept_G, want_G, 4 * allowed)
    cosines = exact.x_CD @ exact.y_SD.T
    if not want_G.isnan().any():
        terms = (want_G / exact.scale * cosines).abs().sum()
        assert (got_dot - want_dot).abs() <= 4 * allowed * terms
        if tile.offset is not None:
            bound = 4 * allowed * want_G.abs().sum() / abs(exact.scale)
            assert (got_total - want_total).abs() <= bound
            assert (kept_total - want_total).abs() <= bound


@pytest.mark.parametrize("scale", [1e-4, 14.3, 100.0, 1e4, -300.0])
def test_any_scale(scale: float) -> None:
    check(tile(scale))


@pytest.mark.parametrize("norm", [1e-3, 7.0, 1e3])
def test_features_that_are_not_normalized(norm: float) -> None:
    check(tile(10.0, norm=norm))


@pytest.mark.parametrize("scale, offset", [(14.3, 300.0), (-100.0, -300.0), (14.3, 0.5)])
def test_offsets(scale: float, offset: float) -> None:
    check(tile(scale, offset))


@pytest.mark.parametrize("scale", [14.3, 1000.0])
def test_rows_alone(scale: float) -> None:
    check(tile(scale, 2.0), columns=False)


def test_the_next_tile_is_not_counted() -> None:
    """A tile is read whole, and beyond its last column the next one's exponentials may begin."""
    one = tile(14.3, 2.0)
    left, right = one._replace(y_SD=one.y_SD[:37]), one._replace(y_SD=one.y_SD[37:], diagonal=-34)
    room = torch.full(similarity.room_for(ROWS, COLUMNS), math.nan)[:ROWS, :COLUMNS]
    out = torch.full(similarity.room_for(ROWS, COLUMNS), math.nan)[:ROWS, :COLUMNS]
    rows = SoftmaxStats.empty(ROWS, one.x_CD, torch.float32)
    tiles = TritonTiles(torch.float32, maxima=False)
    places = (left, slice(0, 37)), (right, slice(37, COLUMNS))
    for part, place in places:
        tiles.statistics_and_exponentials(part, rows, None, room[:, place])
    (weight,) = weights(ROWS)
    lines = LogSumExps(rows.lse(), weight)
    totals = [
        tiles.gradient_of_exponentials(part, lines, None, room[:, place], out[:, place], True)
        for part, place in places
    ]
    exact = LogSumExps(statistics(TorchTiles(torch.float64), wide(one), False)[0].lse(), weight)
    want, _, total = gradient(TorchTiles(torch.float64), wide(one), [exact])
    close(out, want, 1e-4)
    assert sum(totals).item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(32, 64, 16, 4, 1, parts=2, group=2),
        Tiling(16, 32, 16, 4, 1, group=1),
        Tiling(128, 64, 16, 4, 1, parts=4),
        Tiling(256, 64, 16, 4, 1),
    ],
    ids=lambda t: f"{t.rows}x{t.columns}:{t.parts}",
)
def test_any_tiling(tiling: Tiling, monkeypatch: pytest.MonkeyPatch) -> None:
    """With features of a norm that flags some lines."""
    monkeypatch.setattr(launch, "INTERPRETER_TILINGS", (tiling, tiling))
    check(tile(14.3, 1.0, norm=4.0))


def raised(tile: Tile) -> tuple[Tensor, Tensor]:
    """Which rows and columns the anchor does not serve."""
    tiling = Tiling(32, 64, 16, 4, 1, group=2)
    logits = Logits(tile.x_CD, tile.y_SD, tile.scale, tile.offset, None, tile.diagonal)
    found = lean.statistics(logits, True, False, None, tiling)
    running = [
        SoftmaxStats.empty(len(side), side, torch.float32) for side in (tile.x_CD, tile.y_SD)
    ]
    flag = flags.totals(logits, found, *running)
    assert found.raised.item() == flag.any().int().item()
    rows, columns = flag.split([len(tile.x_CD), len(tile.y_SD)])
    for one, lines in ((rows, running[0]), (columns, running[1])):
        # flagged ones are left for the second launch
        assert torch.equal(lines.sum == 0, one > 0)
    return rows, columns


def test_a_single_pair_far_out_flags_its_row_and_column_only() -> None:
    one = tile(14.3)
    one.x_CD[11] *= 40
    one.y_SD[17] = 40 * F.normalize(one.x_CD[11], dim=0)
    rows, columns = raised(one)
    assert rows[11] == 1 and 0 < rows.sum() < ROWS
    assert columns[17] == 1 and 0 < columns.sum() < COLUMNS
    check(one)


def test_nothing_is_flagged_in_training() -> None:
    for scale in (1.0, 14.3, 100.0):
        rows, columns = raised(tile(scale))
        assert rows.sum() == 0 and columns.sum() == 0


def test_a_sum_is_judged_by_its_total() -> None:
    """Of entries near 2^-126 and one that makes the sum 2^-79, or 2^-81."""
    scale = 130 * math.log(2)
    # as large as the anchor allows for, so that it is 30 powers of two
    for power, flagged in ((-79.0, 0), (-81.0, 1)):
        one = tile(scale)
        one.x_CD.zero_()[:, 0] = 1.0
        one.y_SD.zero_()[:, 0] = (-125.5 + 30) / 130
        one.y_SD[:, 0][::64] = (power + 30) / 130
        one = one._replace(y_SD=one.y_SD[:64].clone(), diagonal=None)
        rows, _ = raised(one)
        assert torch.equal(rows, torch.full_like(rows, flagged))
        want = statistics(TorchTiles(torch.float64), wide(one))
        got = statistics(TritonTiles(torch.float32), one)
        for a, b in zip(got, want, strict=True):
            close(a.lse(), b.lse(), 1e-5)


def test_a_nan_stays_in_its_row_and_the_columns_see_it() -> None:
    one = tile(14.3)
    one.x_CD[5] = math.nan
    check(one)


def test_a_row_that_is_left_out_whole() -> None:
    row_id, column_id = torch.arange(ROWS), torch.full((COLUMNS,), 7)
    column_id[3:] = torch.arange(COLUMNS - 3) + 200
    row_id[20] = 7
    one = tile(14.3, ids=(row_id, column_id))
    check(one)
    everything = one._replace(column_id_S=torch.full((COLUMNS,), 7))
    check(everything)


@pytest.mark.parametrize("power", [24, 100, -100])
def test_upstream_gradients_of_any_size(power: int) -> None:
    """A loss scale of 2^24, and rows whose positives are saturated."""
    scaled = [w * 2.0**power for w in weights(ROWS, COLUMNS)]
    check(tile(14.3), scaled)


def test_saturated_rows_beside_others() -> None:
    row, column = weights(ROWS, COLUMNS)
    row[::7] *= 2.0**-120
    row[3::7] = 0.0
    column[::5] *= 2.0**60
    check(tile(14.3, norm=2.0), [row, column])
    # of rows alone, so that the smallest are seen
    one = tile(100.0)
    exact = statistics(TorchTiles(torch.float64), wide(one), columns=False)[0].lse()
    got, *_ = gradient(TritonTiles(torch.float32), one, [LogSumExps(exact.float(), row)])
    want, *_ = gradient(TorchTiles(torch.float64), wide(one), [LogSumExps(exact, row.double())])
    for line in (0, 1, 7, 14):
        close(got[line] * 2.0**20, want[line] * 2.0**20, 2e-4)


def test_repeated_bit_by_bit() -> None:
    one = tile(14.3, 1.0)
    one.x_CD[11] *= 40
    lines = [
        LogSumExps(torch.full((n,), 8.0), w)
        for n, w in zip((ROWS, COLUMNS), weights(ROWS, COLUMNS), strict=True)
    ]
    results = []
    for _ in range(50):
        found = statistics(TritonTiles(torch.float32), one)
        results.append([*found[0], *found[1], *gradient(TritonTiles(torch.float32), one, lines)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_launches_of_a_tile() -> None:
    one = tile(14.3)
    lines = [
        LogSumExps(torch.full((n,), 8.0), w)
        for n, w in zip((ROWS, COLUMNS), weights(ROWS, COLUMNS), strict=True)
    ]
    with count_launches() as count:
        statistics(TritonTiles(torch.float32), one)
        gradient(TritonTiles(torch.float32), one, lines)
    assert sum(count.values()) == 7
