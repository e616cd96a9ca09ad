"""What the GPU gives bare products and copies: the ceilings that an operator is held against.

`python -m fastclip.bench.ceilings [OUT.json]`: a large product, a copy, and the three products of a
chunk of G at several numbers of rows; the default chunk should be where dX and dY run near the
first. Random data: on zeros a GPU runs faster.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastclip.bench.runner import Settings, interleave
from fastclip.ops.gemm import add_product, product

WIDTHS = (512, 768, 1024)
# 4224, 5632 and 8448 rows fill whole waves of 132 multiprocessors at some of the widths
CHUNKS = (2048, 4096, 4224, 5632, 8192, 8448)
COLUMNS = 65536


def ceilings(device: str = "cuda", columns: int = COLUMNS, side: int = 8192) -> dict[str, Any]:
    """TFLOP/s of products in bf16 and TB/s of a copy, bytes read and written."""
    x, y = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    seconds = _seconds({"product": lambda: x @ y, "copy": lambda: x.repeat(16, 1)}, device)
    found: dict[str, Any] = {
        "product": 2 * side**3 / seconds["product"] / 1e12,
        "copy": (1 + 16) * x.nbytes / seconds["copy"] / 1e12,
        "chunks": [],
    }
    print(f"product {found['product']:.0f} TFLOP/s, copy {found['copy']:.2f} TB/s", flush=True)
    for width in WIDTHS:
        for rows in (rows for rows in CHUNKS if rows <= columns):
            found["chunks"].append(_chunk(rows, columns, width, device))
            print(*(f"{k} {v:.0f}" for k, v in found["chunks"][-1].items()), flush=True)
    return found


def _chunk(rows: int, columns: int, width: int, device: str) -> dict[str, float]:
    x, y = (torch.randn(n, width, device=device).bfloat16() for n in (rows, columns))
    G = torch.randn(rows, columns, device=device).bfloat16()
    S, dx = torch.empty_like(G), torch.empty(rows, width, device=device)
    dy = torch.zeros(columns, width, device=device)
    runs: dict[str, Callable[[], Any]] = {
        "S": lambda: torch.mm(x, y.T, out=S),
        "dX": lambda: product(G, y, out=dx),
        "dY": lambda: add_product(dy, G.T, x),
    }
    flop = 2 * rows * columns * width / 1e12
    rates = {name: flop / found for name, found in _seconds(runs, device).items()}
    return {"width": width, "rows": rows, **rates}


def _seconds(runs: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    found, failed = interleave(runs, 9, Settings(device=device))
    assert not failed, failed
    return {name: sorted(seconds)[4] for name, seconds in found.items()}


def main() -> int:
    """On the current GPU."""
    if not torch.cuda.is_available():
        print("no CUDA device: ceilings are a GPU's", file=sys.stderr)
        return 1
    found = ceilings()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
