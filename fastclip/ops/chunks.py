"""How much of S is held in memory at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Large enough that the products run at full speed and dY is swept few times, small enough that
# the sweeps over a chunk stay near the cache. Fixed, so that a shape has one summation order.
DEFAULT_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
MINIMUM_CHUNK_ROWS = 16
# more of them speed up no product; few columns would make a chunk the operator's peak
MOST_CHUNK_ROWS = {"cpu": 512}


@contextmanager
def with_budgets(budgets: dict[Any, int], amount: int = 0) -> Iterator[None]:
    """Inside, all budgets are 0, or of another amount."""
    before = dict(budgets)
    budgets.update(dict.fromkeys(budgets, amount))
    try:
        yield
    finally:
        budgets.update(before)


def chunk_rows(rows: int, columns: int, itemsize: int, chunk_bytes: int, device_type: str) -> int:
    """Rows of S held at a time, `itemsize` bytes an entry; `chunk_bytes` 0 means the default."""
    budget = chunk_bytes or DEFAULT_CHUNK_BYTES.get(device_type, 64 << 20)
    fitting = max(budget // (columns * itemsize), 1 if chunk_bytes else MINIMUM_CHUNK_ROWS)
    if not chunk_bytes:
        fitting = min(fitting, MOST_CHUNK_ROWS.get(device_type, fitting))
    # equal chunks: a short last one would run its products at a worse rate
    count = -(-rows // fitting)
    size = -(-rows // count)
    return whole_tiles(size, fitting) if device_type == "cuda" else size


def whole_tiles(size: int, most: int) -> int:
    """Rows rounded to whole tiles of 128, up if `most` allows: aligned lines for the products."""
    up, down = -(-size // 128) * 128, size // 128 * 128
    return up if up <= most else max(down, min(size, 128))


def chunks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) in pieces of `size`."""
    return [(a, min(a + size, stop)) for a in range(start, stop, size)]
