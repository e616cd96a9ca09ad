"""How a tile is worked on changes no result: in parts, or with operands by descriptors."""

import pytest
import torch
import torch.nn.functional as F

from fastclip.kernels import finish, launch, merge, sigmoid, similarity
from fastclip.kernels.launch import INTERPRETED, Tiling
from tests.kernels.test_triton import check

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="a GPU is there: fastclip.bench.check runs the kernels on it"
)

TILINGS = {
    "two parts": Tiling(32, 64, 32, 4, 1, parts=2),
    "four parts": Tiling(32, 64, 32, 4, 1, parts=4),
    "descriptors": Tiling(32, 64, 32, 4, 1, tma=True),
    "descriptors, four parts": Tiling(64, 64, 16, 4, 1, group=1, tma=True, parts=4),
    "sums by shared memory": Tiling(32, 64, 32, 4, 1, parts=2, transpose=True),
    "programs that walk": Tiling(32, 64, 32, 4, 1, walkers=1),
}


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
# 48 columns are not a multiple of the step of 32; 77 are not aligned for a descriptor
@pytest.mark.parametrize("width", [48, 77])
@pytest.mark.parametrize("name", ["clip", "clip_grouped", "info_nce", "siglip", "mp_nce"])
def test_against_float64(
    name: str, width: int, tiling: Tiling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "INTERPRETER_TILINGS", (tiling, tiling))
    check(name, 70, width, 14.3, torch.bfloat16, extra=9, chunk=41)


def test_logits_that_span_more_than_an_exponential_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a scale of 1000 log-sum-exps of one tile lie further apart than 96 powers of two."""
    monkeypatch.setattr(launch, "INTERPRETER_TILINGS", (TILINGS["two parts"],) * 2)
    check("clip", 70, 48, 1000.0, torch.float32, correlation=0.6)


def test_descriptors_only_where_lines_are_aligned() -> None:
    tiling = TILINGS["descriptors"]
    x, y = torch.zeros(40, 64, dtype=torch.bfloat16), torch.zeros(70, 64, dtype=torch.bfloat16)
    given = launch.operands(x, y, tiling)
    assert launch.product_options(given[0], tiling)["TMA"]
    assert [d.block_shape for d in given] == [[32, 32], [64, 32]]
    # lines of 154 and 136 bytes; aligned lines of 128 from byte 8 on
    flat = torch.zeros(4 + 40 * 64, dtype=torch.bfloat16)
    long = (torch.zeros(40, width, dtype=torch.bfloat16) for width in (77, 68))
    for off in (*long, flat[4:].view(40, 64)):
        given = launch.operands(off, y, tiling)
        assert given[0] is off and given[1] is y
        assert not launch.product_options(off, tiling)["TMA"]


def test_partial_statistics_are_a_parts() -> None:
    x, y, scale = torch.randn(70, 16), torch.randn(90, 16), torch.tensor(2.0)
    wide, narrow = Tiling(32, 64, 16, 4, 1, parts=2), Tiling(32, 32, 16, 4, 1)
    found = [
        similarity.statistics(x, y, scale, None, None, True, None, tiling)[:4]
        for tiling in (wide, narrow)
    ]
    # a wide tile's second part may lie beyond the last column: a line of nothing
    rows = [[t[: narrow_t.shape[0]] for t, narrow_t in zip(*found, strict=True)], found[1]]
    for mine, want in zip(*rows, strict=True):
        # an exponent of 30 is known to 30 eps
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=0)
    assert found[0][1][-1].eq(0).all() and found[0][1].shape[0] == 4


@pytest.mark.parametrize("tiles", [1, merge.MERGED_TILES, 2 * merge.MERGED_TILES + 3])
def test_any_number_of_tiles_is_merged(tiles: int) -> None:
    """A program reads MERGED_TILES of them at a time."""
    lines, generator = merge.MERGED_LINES + 5, torch.Generator().manual_seed(0)
    part_max = 50 * torch.randn(tiles, lines, generator=generator)
    part_sum, part_dot = torch.rand(2, tiles, lines, generator=generator) + 0.1
    run_max = torch.full((lines,), -torch.inf)
    run_max[::2] = 3.0
    run_sum = (run_max > 0).float()
    offset = torch.tensor(0.7)
    terms = part_max.double() * torch.tensor(2.0).double().log() + offset
    want_max = torch.maximum(terms.amax(0), run_max.double())
    before = run_sum * torch.exp(run_max - want_max)
    weights = torch.exp(terms - want_max)
    wanted = (want_max, before + (weights * part_sum).sum(0), (weights * part_dot).sum(0))
    dot = merge.merge(part_max, part_sum, part_dot, run_max, run_sum, offset)
    for mine, want in zip((run_max, run_sum, dot), wanted, strict=True):
        # an exponent of 100 is known to 100 eps
        torch.testing.assert_close(mine.double(), want, rtol=3e-5, atol=0)


@pytest.mark.parametrize("width", [1, finish.WIDTH, 2 * finish.WIDTH + 1])
def test_rows_of_any_width_are_multiplied_and_finished(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = finish.ROWS + 3
    a, b = (torch.randn(rows, width, generator=generator) for _ in range(2))
    out = torch.empty(rows)
    finish.row_dot(a, b, out)
    torch.testing.assert_close(out, (a * b).sum(1), rtol=1e-5, atol=1e-4)
    coefficient, total = torch.arange(1.0, rows + 1), torch.full((rows, width), torch.nan)
    finish.finish(a, coefficient, b, total)
    torch.testing.assert_close(total, a + coefficient[:, None] * b)


def test_softplus_and_its_slope_over_their_range() -> None:
    """Logits from -30 to 30, none left out; the polynomial of log(1 + e) is good to 3e-8."""
    x, y = torch.zeros(121, 16), torch.zeros(3, 16)
    x[:, 0], y[:, 0] = torch.linspace(-30, 30, 121), 1.0
    out = torch.full(similarity.room_for(121, 3), torch.nan)[:121, :3]
    one, tiling = torch.tensor(1.0), Tiling(16, 32, 16, 4, 1)
    rows, dot, total = sigmoid.sigmoid(
        x, y, one, None, None, None, False, torch.ones(121), out, tiling
    )
    z = x[:, :1].double().expand(121, 3)
    # an exponent of 43 is known to half of 43 eps
    torch.testing.assert_close(rows.double(), F.softplus(z, threshold=99).sum(1), rtol=4e-6, atol=0)
    torch.testing.assert_close(out.double(), z.sigmoid(), rtol=4e-6, atol=0)
    torch.testing.assert_close(dot.double(), (z * z.sigmoid()).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(total.double(), z.sigmoid().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows, columns", [(47, 63), (48, 64), (33, 31)])
def test_the_last_tile_may_pass_the_end_by_one_line(rows: int, columns: int) -> None:
    """In tiles of 16 x 16, two rows of them to a band."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(lines, 17, generator=generator) for lines in (rows, columns))
    tiling = Tiling(16, 32, 16, 4, 1, group=2, parts=2)
    # small: every entry counts in its lines' sums
    scale = torch.tensor(0.125)
    found = similarity.statistics(x, y, scale, None, None, True, None, tiling)
    for top, total, dim in ((*found[:2], 1), (*found[2:4], 0)):
        want = (scale * x @ y.T).logsumexp(dim)
        got = torch.log((total * torch.exp2(top)).sum(0))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("diagonal", [-33, -32, -31, -1, 0, 1, 31, 32, 33])
def test_a_diagonal_that_meets_a_tile_at_a_corner(diagonal: int, parts: int) -> None:
    """By one from a tile's corner to the next; whole tiles, whose borders ask for no test."""
    # logits near zero: each entry counts
    x, y = 0.1 * torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    tiling = Tiling(32, 32 * parts, 16, 4, 1, parts=parts)
    scale = torch.tensor(1.0)
    *_, top, total, _ = similarity.statistics(x, y, scale, None, diagonal, True, None, tiling)
    S = x @ y.T
    rows, columns = torch.arange(64)[:, None], torch.arange(64)
    want = S.masked_fill(columns == rows + diagonal, -torch.inf).logsumexp(0)
    # partial statistics are powers of two
    got = torch.log((total * torch.exp2(top)).sum(0))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [63, 64, 130])
def test_products_that_leave_float32s_range_go_entry_by_entry(columns: int) -> None:
    """In some tiles only: rows from -80 to 90, and one that is NaN."""
    x, y = torch.zeros(70, 16), torch.zeros(columns, 16)
    x[:, 0], y[:, 0] = torch.linspace(-80, 90, 70), 1.0
    x[3] = torch.nan
    out = torch.full(similarity.room_for(70, columns), torch.nan)[:70, :columns]
    one, offset, weight = torch.tensor(1.0), torch.tensor(-1.0), torch.arange(70.0)
    tiling = Tiling(16, 64, 16, 4, 1, parts=1)
    rows, dot, _ = sigmoid.sigmoid(x, y, one, offset, None, None, False, weight, out, tiling)
    z = x[:, :1].double().expand(70, columns) - 1
    # an exponent of 130 is known to half of 130 eps
    want = F.softplus(z, threshold=999).sum(1)
    torch.testing.assert_close(rows.double(), want, rtol=1e-5, atol=0, equal_nan=True)
    want = z.sigmoid() * weight[:, None]
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-30, equal_nan=True)
    assert dot.isnan()
