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
from fastclip.messages import logger
from fastclip.ops.gemm import add_product, product

WIDTHS = (512, 768, 1024)
# 4224, 5632 and 8448 rows fill whole waves of 132 multiprocessors at some of the widths
CHUNKS = (2048, 4096, 4224, 5632, 8192, 8448)
COLUMNS = 65536
# rows of 8192 float32 numbers: 2 GiB
COPIED = 65536


def ceilings(device: str = "cuda", columns: int = COLUMNS, side: int = 8192) -> dict[str, Any]:
    """TFLOP/s of products in bf16 and TB/s of a copy, bytes read and written."""
    x, y = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    # far larger than any L2 cache; every byte is read once and written once
    source = torch.randn(COPIED if device == "cuda" else side, side, device=device)
    target = torch.empty_like(source)
    seconds = _seconds({"product": lambda: x @ y, "copy": lambda: target.copy_(source)}, device)
    work = {"product": 2 * side**3, "copy": 2 * source.nbytes}
    found: dict[str, Any] = {
        name: work[name] / taken / 1e12 for name, taken in seconds.items() if taken is not None
    }
    found["chunks"] = []
    print(*(f"{k} {found[k]:.2f} T/s" for k in work if k in found), flush=True)
    for width in WIDTHS:
        for rows in (rows for rows in CHUNKS if rows <= columns):
            found["chunks"].append(_chunk(rows, columns, width, device))
            said = found["chunks"][-1].items()
            print(*(f"{k} -" if v is None else f"{k} {v:.0f}" for k, v in said), flush=True)
    return found


def _chunk(rows: int, columns: int, width: int, device: str) -> dict[str, float | None]:
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
    taken = _seconds(runs, device)
    rates = {name: None if found is None else flop / found for name, found in taken.items()}
    return {"width": width, "rows": rows, **rates}


def _seconds(runs: dict[str, Callable[[], Any]], device: str) -> dict[str, float | None]:
    found, failed = interleave(runs, 9, Settings(device=device))
    for name, status in failed.items():
        print(f"{name}: {status}", flush=True)
    return {name: sorted(found[name])[4] if name in found else None for name in runs}


def main() -> int:
    """On the current GPU."""
    if not torch.cuda.is_available():
        logger.error("no CUDA device: ceilings are a GPU's")
        return 1
    found = ceilings()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
