"""Launching kernels: counting, tilings by device, and the interpreter's particulars."""

import functools
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run under Triton's interpreter; fixed when Triton is imported."""

VARIANTS = {
    "statistics": {"biased", "ids", "kept", "maxima", "rows"},
    "gradient": {"biased", "frozen", "ids", "offset", "rows"},
    "sigmoid": {"ids", "loss"},
    "own_statistics": {"ids", "kept", "rows"},
    "own_gradient": {"ids", "offset", "rows"},
}
"""What may be asked of a kernel beyond the plain one: what ids say of entries, exponentials kept,
maxima; rows only; biases; no sums for scale and offset; an offset; the loss without a gradient.
"""

TILINGS_FILE = Path(__file__).with_name("tilings.json")


@dataclass(frozen=True)
class Tiling:
    """Sides of a tile of S, the step along the width, and how a program runs it."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int
    group: int = 8
    tma: bool = False
    """Whether operands come through the tensor memory accelerator, where they are aligned."""
    parts: int = 1
    """Parts of a tile's columns that are worked on one after the other: registers hold one."""
    registers: int | None = None
    """The most a thread may use; None is the compiler's choice."""
    transpose: bool = False
    """Whether sums of columns go through shared memory (`tile.over_rows`)."""

    walkers: int = 0
    """Programs a multiprocessor that walk over all tiles; 0 is a program for each tile."""

    def options(self) -> dict[str, int]:
        """As keyword arguments of a kernel."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {
            "BLOCK_R": self.rows,
            "BLOCK_S": self.columns,
            "BLOCK_D": self.width,
            "GROUP": self.group,
            "PARTS": self.parts,
            "num_warps": self.warps,
            "num_stages": self.stages,
            **limit,
        }


# the first is small, so that few rows already make several tiles; a large one costs the
# interpreter no more than a small one
INTERPRETER_TILINGS = (
    Tiling(32, 64, 32, 4, 1, group=2),
    Tiling(128, 256, 64, 4, 1, group=2, tma=True, parts=2),
)

_counts: list[Counter[str]] = []


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Count the kernels launched inside the block, by name."""
    count: Counter[str] = Counter()
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Run `kernel` on a grid of `programs`; its first argument is a tensor or descriptor."""
    for count in _counts:
        count[kernel.fn.__name__] += 1
    device = getattr(arguments[0], "base", arguments[0]).device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[(programs,)](*arguments, **options)
        return
    # Triton launches on the current device, whatever device the tensors are on
    with torch.cuda.device(device):
        kernel[(programs,)](*arguments, **options)


def precision_of(dtype: torch.dtype) -> str:
    """How products of `dtype` are formed: torch's setting for float32 holds for us too.

    torch.set_float32_matmul_precision, allow_tf32 and fp32_precision all show in the last.
    """
    if dtype != torch.float32:
        return "16bit"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tiling(
    kernel: str, variant: frozenset[str], dtype: torch.dtype, device: torch.device, entries: int
) -> Tiling:
    """The tiling of a kernel's variant (`tiling_of`) for so many entries of S."""
    if INTERPRETED:
        return INTERPRETER_TILINGS[entries > 100_000]
    return tiling_of(architecture(device), kernel, variant, precision_of(dtype))


@functools.cache
def tiling_of(architecture: str, kernel: str, variant: frozenset[str], precision: str) -> Tiling:
    """The table's entry of a kernel that names most of a variant's words, and no other.

    Without such an entry that of the plain kernel serves.

    Args:
        architecture: a row of the table.
        kernel: "statistics", "gradient", "sigmoid", "own_statistics" or "own_gradient".
        variant: what is asked of it beyond the plain kernel: some of VARIANTS.
        precision: as `precision_of` names it.
    """
    found = {
        name: entries[precision]
        for name, entries in tilings()[architecture].items()
        if precision in entries
        and name.split()[0] == kernel
        and variant.issuperset(name.split()[1:])
    }
    return found[max(found, key=lambda name: len(name.split()))]


def operands(x: torch.Tensor, y: torch.Tensor, tiling: Tiling) -> tuple[Any, Any]:
    """`x` and `y` as a kernel takes them: both tensors, or both descriptors of their blocks."""
    if not tiling.tma or not all(map(_has_map, (x, y))):
        return x, y
    return (
        TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [tiling.rows, tiling.width]),
        TensorDescriptor(y, list(y.shape), [y.stride(0), 1], [tiling.columns, tiling.width]),
    )


def _has_map(x: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can read rows of a tensor."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0
    # rows that are one and the same in memory (expanded) have no map
    return aligned and x.stride(0) >= x.shape[1]


def product_options(x: Any, tiling: Tiling) -> dict[str, Any]:
    """Keyword arguments of a kernel that forms a tile of S from what `operands` gave for rows."""
    tma = isinstance(x, TensorDescriptor)
    x = x.base if tma else x
    return {
        "TMA": tma,
        # descriptors fill up with zeros
        "EVEN_D": tma or x.shape[1] % tiling.width == 0,
        "PRECISION": "tf32" if precision_of(x.dtype) == "tf32" else "ieee",
        "EMULATE": INTERPRETED,
        **tiling.options(),
    }


def persistent_programs(device: torch.device, tiles: int, walkers: int = 1) -> int:
    """How many programs walk over so many tiles: `walkers` a multiprocessor at most."""
    return min(walkers * _multiprocessors(device), tiles)


def programs_of(tiling: Tiling, device: torch.device, tiles: int) -> tuple[int, bool]:
    """How many programs do so many tiles, and whether they walk over them."""
    if tiling.walkers == 0:
        return tiles, False
    return persistent_programs(device, tiles, tiling.walkers), True


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: torch.device) -> str:
    """The row of the table that serves a device."""
    name = true_architecture(device)
    if name in tilings():
        return name
    if name.startswith("sm_10"):
        # a B300's are a B200's
        return "sm_100"
    # consumer parts have a third less shared memory; sm_80's entries that fit are "small"
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the field
    shared: int = properties.shared_memory_per_block_optin
    return "sm_80" if shared >= 160 << 10 else "small"


def true_architecture(device: torch.device) -> str:
    """ "sm_90" and the like, whether the table has it or not."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def tilings() -> dict[str, dict[str, dict[str, Tiling]]]:
    """The table: architecture; kernel, with words of a variant behind it; precision."""
    table = json.loads(TILINGS_FILE.read_text())["tilings"]
    return {
        name: {
            kernel: {precision: Tiling(*numbers) for precision, numbers in entries.items()}
            for kernel, entries in kernels.items()
        }
        for name, kernels in table.items()
    }
