"""Device helpers of the kernels that form a tile of S = scale * X @ Y.T: order, product, mask.

Shapes: X (R, D) and Y (S, D), rows contiguous; a tile is BLOCK_R x BLOCK_S.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# a logit whose exponential is 0 and whose product with 0 is too, which -inf's is not
LEFT_OUT = tl.constexpr(-1e30)
# a diagonal that meets no tile
NO_DIAGONAL = 1 << 30


@triton.jit
def tile_indices(
    index, rows, columns, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, GROUP: tl.constexpr
):
    """Row and column of a tile, walked in bands of GROUP row tiles to share L2 lines."""
    tiles_r = tl.cdiv(rows, BLOCK_R)
    tiles_s = tl.cdiv(columns, BLOCK_S)
    band = index // (GROUP * tiles_s)
    first = band * GROUP
    height = min(tiles_r - first, GROUP)
    within = index % (GROUP * tiles_s)
    return first + within % height, within // height


@triton.jit
def visits(rows, columns, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, FLATTEN: tl.constexpr):
    """How many tiles a program visits, itself first and then each `num_programs` further on."""
    tiles = tl.cdiv(rows, BLOCK_R) * tl.cdiv(columns, BLOCK_S)
    return tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0)) if FLATTEN else 1


@triton.jit
def cosines(
    x_ptr,
    y_ptr,
    stride_x,
    stride_y,
    rows,
    columns,
    width,
    first_r,
    first_s,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """X @ Y.T of one tile in float32; with TMA `x_ptr` and `y_ptr` are descriptors.

    Lines past the end hold zeros or repeat the last one; mask them.
    """
    acc = tl.zeros((BLOCK_R, BLOCK_S), dtype=tl.float32)
    if TMA:
        for d in range(0, width, BLOCK_D):
            x = x_ptr.load([first_r, d])
            y = y_ptr.load([first_s, d]).T
            acc = _add_product(acc, x, y, PRECISION, EMULATE)
    else:
        o_d = tl.arange(0, BLOCK_D)
        o_r = tl.minimum(tl.arange(0, BLOCK_R), rows - first_r - 1)
        o_s = tl.minimum(tl.arange(0, BLOCK_S), columns - first_s - 1)
        # the tile's corner in 64 bits, offsets inside it in 32: half the registers
        p_x = x_ptr + first_r.to(tl.int64) * stride_x + (o_r[:, None] * stride_x + o_d[None, :])
        p_y = y_ptr + first_s.to(tl.int64) * stride_y + (o_s[None, :] * stride_y + o_d[:, None])
        for d in range(0, width, BLOCK_D):
            if EVEN_D:
                x = tl.load(p_x)
                y = tl.load(p_y)
            else:
                m_d = o_d < width - d
                x = tl.load(p_x, mask=m_d[None, :], other=0.0)
                y = tl.load(p_y, mask=m_d[:, None], other=0.0)
            acc = _add_product(acc, x, y, PRECISION, EMULATE)
            p_x += BLOCK_D
            p_y += BLOCK_D
    return acc


@triton.jit
def _add_product(acc, x, y, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    if EMULATE:
        # the interpreter's 16-bit product is wrong
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def parts_of(tile, PARTS: tl.constexpr):
    """A tile's columns in 1, 2 or 4 parts, as a tuple."""
    if PARTS == 1:
        parts = (tile,)
    else:
        parts = _halves(tile)
        if PARTS == 4:
            parts = _halves(parts[0]) + _halves(parts[1])
    return parts


@triton.jit
def _halves(tile):
    R: tl.constexpr = tile.shape[0]
    S: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (R, 2, S // 2)), (0, 2, 1)))


@triton.jit
def over_rows(
    tile, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, MAXIMUM: tl.constexpr,
    TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """Sums, or maxima, of a tile's columns.

    Where 16 rows are a warp's, as on Hopper, eight warps' results are combined by halves: `tl.sum`
    would exchange every column once more, with two barriers for each few of them. Where 32 rows
    are a warp's, as on Blackwell, shuffles would be the limit. With TRANSPOSE the tile goes through
    shared memory once instead: after it is halved, a thread holds many rows of few columns.
    """
    if TRANSPOSE:
        a, b = tl.split(tl.permute(tl.reshape(tile, (2, BLOCK_R // 2, BLOCK_S)), (1, 2, 0)))
        found = _reduced(_combined(a, b, MAXIMUM), MAXIMUM)
    elif BLOCK_R < 128:
        found = _reduced(tile, MAXIMUM)
    else:
        tile = _reduced(tl.reshape(tile, (BLOCK_R // 128, 128, BLOCK_S)), MAXIMUM)
        tile = _reduced(tl.permute(tl.reshape(tile, (8, 16, BLOCK_S)), (1, 0, 2)), MAXIMUM)
        a, b = tl.split(tl.permute(tl.reshape(tile, (2, 4, BLOCK_S)), (1, 2, 0)))
        tile = _combined(a, b, MAXIMUM)
        a, b = tl.split(tl.permute(tl.reshape(tile, (2, 2, BLOCK_S)), (1, 2, 0)))
        tile = _combined(a, b, MAXIMUM)
        a, b = tl.split(tl.permute(tile, (1, 0)))
        found = _combined(a, b, MAXIMUM)
    return found


@triton.jit
def _reduced(tile, MAXIMUM: tl.constexpr):
    return tl.max(tile, 0) if MAXIMUM else tl.sum(tile, 0)


@triton.jit
def _combined(a, b, MAXIMUM: tl.constexpr):
    return tl.maximum(a, b) if MAXIMUM else a + b


@triton.jit
def leave_out(
    logits,
    row_id_ptr,
    column_id_ptr,
    rows,
    columns,
    diagonal,
    i_r,
    i_s,
    first_r,
    first_s,
    HAS_DIAGONAL: tl.constexpr,
    HAS_IDS: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """VALUE where the tile passes the matrix, meets the diagonal, or joins equal ids.

    Tiles inside, which are nearly all, skip the test.
    """
    special = (first_r + BLOCK_R > rows) | (first_s + BLOCK_S > columns)
    if HAS_DIAGONAL:
        gap = first_s - first_r - diagonal
        special = special | ((gap > -BLOCK_S) & (gap < BLOCK_R))
    if HAS_IDS:
        # always true, but a branch: without one Triton 3.6 fails to compile for sm_100
        special = rows > 0
    if special:
        keep = (i_r < rows)[:, None] & (i_s < columns)[None, :]
        if HAS_DIAGONAL:
            keep = keep & ((i_r + diagonal)[:, None] != i_s[None, :])
        if HAS_IDS:
            row_id = tl.load(row_id_ptr + i_r, mask=i_r < rows, other=0)
            column_id = tl.load(column_id_ptr + i_s, mask=i_s < columns, other=0)
            keep = keep & (row_id[:, None] != column_id[None, :])
        logits = tl.where(keep, logits, VALUE)
    return logits


@triton.jit
def biases(bias_ptr, i, mask):
    """Biases of lines in powers of two, 0 for -inf, and which are not -inf."""
    bias = tl.load(bias_ptr + i, mask=mask, other=0.0) * LOG2E
    return finite(bias), bias != float("-inf")


@triton.jit
def any_raised(flag_ptr, flags, COUNT: tl.constexpr = 1024):
    """`flags` if any flag is raised, else 0: how far a walk over flagged tiles goes."""
    raised = tl.zeros((COUNT,), dtype=tl.int32)
    for start in range(0, flags, COUNT):
        i = start + tl.arange(0, COUNT)
        raised |= tl.load(flag_ptr + i, mask=i < flags, other=0)
    return tl.where(tl.max(raised, 0) > 0, flags, 0)


@triton.jit
def rounded(value, pointer, EMULATE: tl.constexpr):
    """float32 `value` in the type that `pointer` points to, rounded to nearest even."""
    target: tl.constexpr = pointer.dtype.scalar.element_ty
    if EMULATE and target == tl.bfloat16:
        # the interpreter would cut the low bits off
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & -65536).to(tl.float32, bitcast=True)
    return value.to(target)


@triton.jit
def finite(anchor):
    """-inf replaced by 0: of a line that is left out whole exp2 then makes 0 and not NaN."""
    return tl.where(anchor == float("-inf"), 0.0, anchor)
