"""Memory of the losses against the batch: what is kept for the backward, and the peak.

    saved   bytes that autograd keeps between forward and backward, the inputs themselves left
            out; each storage counts once
    peak    bytes above the inputs, forward and backward, as `runner.py` measures them

fastclip's losses are measured without what is held within a constant budget, the small S of
`ops/dense.py` and the exponentials of `ops/kept.py`: as they are in large batches.

A size's scaling exponent is the power of n by which bytes grew since the size before: 1 is linear,
2 the similarity matrix.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.bench.losses import OPERATORS
from fastclip.bench.runner import (
    Inputs,
    Operator,
    Settings,
    autocast,
    candidates,
    gradient_of,
    leaves,
    peak_since,
    reset_peak,
    status_of,
    why_not,
)
from fastclip.ops import dense, kept


@dataclass
class MemoryRow:
    """One baseline at one size, with its scaling exponents, see above."""

    operator: str
    baseline: str
    n: int
    width: int
    status: str = "ok"
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    saved_exponent: float | None = None
    peak_exponent: float | None = None


def run(
    names: Sequence[str],
    sizes: Sequence[int],
    widths: Sequence[int],
    settings: Settings,
    add: Callable[[list[MemoryRow]], None],
) -> list[MemoryRow]:
    """Measure losses and baselines at every size, smallest first; `add` receives each size's."""
    rows: list[MemoryRow] = []
    for name in names:
        for width in widths:
            before: dict[str, MemoryRow] = {}
            for n in sorted(sizes):
                with dense.switched_off(), kept.switched_off():
                    measured = measure(OPERATORS[name], n, width, settings)
                for row in measured:
                    _compare(row, before.get(row.baseline))
                    before[row.baseline] = row
                rows += measured
                add(measured)
    return rows


def measure(operator: Operator, n: int, width: int, settings: Settings) -> list[MemoryRow]:
    """All baselines at one size, fastclip first."""
    inputs = leaves(operator, n, width, settings)
    rows = []
    for baseline in candidates(operator):
        row = MemoryRow(operator.name, baseline.name, n, width)
        rows.append(row)
        row.status = why_not(baseline, n, settings) or "ok"
        if row.status != "ok":
            continue
        try:
            loss_function = baseline.build(inputs)
            # what is compiled or allocated once is no part of a step
            gradient_of(loss_function, inputs, settings)
            with autocast(settings):
                row.saved_bytes = saved_bytes(loss_function, inputs)
            before = reset_peak(settings.device)
            gradient_of(loss_function, inputs, settings)
            row.peak_bytes = peak_since(settings.device, before)
        except Exception as error:
            # somebody else's code may fail in any way
            if baseline.name == "fastclip":
                raise
            row.status = status_of(error)
    return rows


def saved_bytes(loss_function: Callable[..., Tensor], inputs: Inputs) -> int:
    """Bytes of all storages that the backward of a loss keeps, the inputs' own left out."""
    own = {t.untyped_storage().data_ptr() for t in inputs}
    # held, so that no address is used twice
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_function(*inputs)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def _compare(row: MemoryRow, before: MemoryRow | None) -> None:
    if before is None:
        return
    ratio = math.log(row.n / before.n)
    for name in ("saved", "peak"):
        now, then = getattr(row, f"{name}_bytes"), getattr(before, f"{name}_bytes")
        if now and then and ratio:
            setattr(row, f"{name}_exponent", math.log(now / then) / ratio)
