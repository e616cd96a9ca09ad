"""Is an implementation right on this device? Every loss against the dense float64 oracle.

`python -m fastclip.bench.check [--device cuda] [--backend triton] [--few] [--part I/K]`: borders of
tiles, widths, scales, dtypes and chunks; hard negatives, groups, chosen positives, banks, smoothing
and per-anchor gradients; bitwise reproducibility; no synchronization with the host; replay from a
CUDA graph. Needs torch alone (and triton for its kernels).
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastclip.bench.losses import OPERATORS
from fastclip.bench.runner import Inputs, Operator, clustered, make_inputs
from fastclip.functional import clip_loss, info_nce_loss, mp_nce_loss

ROWS = (4, 63, 65, 127, 129, 1000)
# on a GPU also: many tiles and several chunks, where an index that overflows would show
LARGE_ROWS = (8192, 20_001)
LARGE_WIDTHS = (768, 1000)
WIDTHS = (16, 77, 512, 1152)
# each is another kernel to compile for a precision: bf16 has all, and the losses' options
WIDTHS_OF = {torch.float32: (77, 512), torch.bfloat16: WIDTHS, torch.float16: (512,)}
SCALES = (0.1, 14.3, 100.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# relative error of dX: float32 carries a few eps times the logits' size; G and dX are rounded to
# 16 bits once each
GREATEST_ERROR = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


# rows of a chunk, or strip: all, or few enough that sums go on across chunks
CHUNKS = (None, 40, 129)


def _more_columns(n: int, width: int, scale: float) -> Inputs:
    x, y, extra = clustered(3, n, width)
    return [x, torch.cat([y, extra[: n // 3 + 1]]), torch.tensor(scale)]


def _ids(rows: int, device: torch.device) -> Tensor:
    # few ids, so that many agree; the same on every device
    return torch.arange(rows, device=device) * 7919 % max(rows // 3, 1)


def _hard_negatives(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return clip_loss(x, y, scale, label_smoothing=0.1, **options)


def _grouped(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    ids = _ids(len(y), y.device)
    return clip_loss(x, y, scale, row_group=ids[: len(x)], column_group=ids, **options)


def _not_kept(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return clip_loss(x, y, scale, keep_bytes=0, **options)


def _per_anchor(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    losses = info_nce_loss(x, y, scale, reduction="none", **options)
    return (losses * torch.linspace(0.5, 1.5, len(x), device=x.device)).mean()


def _chosen(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return info_nce_loss(x, y, scale, _ids(len(x), x.device), **options)


def _bank(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    bank = y[len(x) :]
    return info_nce_loss(x, y[: len(x)], scale, bank=bank, in_batch=False, **options)


def _weighted(*leaves: Tensor, **options: Any) -> Tensor:
    *blocks, scale, offset = leaves
    options |= {"pair_weight": [[0.5, 1.5], [0.0, 1.0]], "keep_bytes": 0}
    return mp_nce_loss(blocks, [0, 1, 1, 0], scale, offset - 3.0, **options)


# beside the losses as they are measured: what their options do
CHECKED: dict[str, Operator] = {
    **OPERATORS,
    **{
        name: Operator(name, _more_columns, ours, (), (0, 0, 0))
        for name, ours in {
            "clip hard negatives": _hard_negatives,
            "clip groups": _grouped,
            "clip not kept": _not_kept,
            "info_nce per anchor": _per_anchor,
            "info_nce chosen": _chosen,
            "info_nce bank": _bank,
        }.items()
    },
    "mp_nce weighted": Operator(
        "mp_nce weighted", OPERATORS["mp_nce"].make, _weighted, (), (0, 0, 0)
    ),
}


@dataclass
class Finding:
    """Errors of one case: of the loss and scalars absolutely, of features' gradients relatively."""

    loss: str
    n: int
    width: int
    scale: float
    dtype: str
    chunk: int | None
    ok: bool
    loss_error: float = float("nan")
    feature_error: float = float("nan")
    scalar_error: float = float("nan")
    failure: str = ""


def widths_of(name: str, dtype: torch.dtype) -> tuple[int, ...]:
    """The widths at which a loss of `CHECKED` is checked in a precision."""
    if name in OPERATORS:
        return WIDTHS_OF[dtype]
    return (77, 512) if dtype == torch.bfloat16 else ()


def findings(
    device: str,
    backend: str,
    few: bool = False,
    deadline: float | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Finding]:
    """All cases in a shuffled order, until the deadline (`time.monotonic`); or a few.

    With `part` (i, k) every k-th of them from the i-th: most of the time goes into compiling, which
    processes can share.
    """
    # what chunks are asked of is not left to the fastest: small batches have none
    chunks = (None,) if backend == "auto" else CHUNKS
    cases = [
        (name, n, width, scale, dtype, chunk)
        for name in CHECKED
        for n in ROWS
        for width in WIDTHS
        for scale in SCALES
        for dtype in DTYPES
        for chunk in chunks
        if width in widths_of(name, dtype)
    ]
    random.Random(0).shuffle(cases)
    chosen = cases[:: 250 if few else len(chunks)]
    if device == "cuda" and backend != "auto" and not few:
        large = [
            (name, n, width, 14.3, torch.bfloat16, None)
            for n, width in zip(LARGE_ROWS, LARGE_WIDTHS, strict=True)
            for name in (*OPERATORS, "clip not kept")
        ]
        chosen = large + chosen
    for name, n, width, scale, dtype, chunk in chosen[part[0] :: part[1]]:
        if deadline is not None and time.monotonic() > deadline:
            return
        yield compare(CHECKED[name], n, width, scale, dtype, chunk, device, backend)


def compare(
    operator: Operator,
    n: int,
    width: int,
    scale: float,
    dtype: torch.dtype,
    chunk: int | None,
    device: str,
    backend: str,
) -> Finding:
    """One case; a failure is a finding too."""
    finding = Finding(operator.name, n, width, scale, str(dtype)[6:], chunk, ok=False)
    try:
        _compare(finding, operator, dtype, device, backend)
    except Exception as error:
        # a kernel that does not compile, say: the other cases are still of use
        finding.failure = f"{type(error).__name__}: {str(error)[:200]}"
    return finding


def _compare(
    finding: Finding, operator: Operator, dtype: torch.dtype, device: str, backend: str
) -> None:
    n, width, scale = finding.n, finding.width, finding.scale
    inputs = make_inputs(operator, n, width, scale, dtype, device)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    # a loss scale, as training in float16 has one: the mean's gradients would vanish there
    upstream = 16.0 * n / max(scale, 1.0) if dtype == torch.float16 else 1.0
    # a dense float64 S of many rows does not fit; the chunked one is a walk of its own
    truth = _outputs(operator, wide, "torch" if n >= LARGE_ROWS[0] else "reference", upstream)
    chunk_bytes = None if finding.chunk is None else 4 * len(inputs[0]) * finding.chunk
    got = _outputs(operator, inputs, backend, upstream, chunk_bytes)
    errors = [(a.double() - b).norm().item() for a, b in zip(got, truth, strict=True)]
    finding.loss_error = errors[0] / max(truth[0].abs().item(), 1.0)
    features = [i for i, t in enumerate(inputs, 1) if t.ndim == 2 and t.shape[1] == width]
    # SupCon's gradient is a difference of means, and may be nothing but their rounding
    floor = upstream * scale / n**0.5 if operator.name == "sup_con" else 1e-30
    finding.feature_error = max(errors[i] / max(truth[i].norm().item(), floor) for i in features)
    scalars = [i for i in range(1, len(errors)) if i not in features]
    # a temperature's gradient is the scale's times its square
    unit = max(scale**2, 1.0) if operator.name in ("nt_xent", "sup_con") else 1.0
    unit = unit * n if operator.name == "siglip" else unit
    finding.scalar_error = max(errors[i] / (unit * upstream) for i in scalars)
    limit = GREATEST_ERROR[dtype]
    # a gradient that is all rounding has no relative error to speak of
    negligible = all(truth[i].norm() < 1e-4 * upstream * scale / n for i in features)
    exact = finding.feature_error < limit or negligible
    finding.ok = exact and finding.loss_error < limit and finding.scalar_error < limit


def same_bits(device: str, backend: str, repeats: int, n: int = 1000) -> list[str]:
    """Losses whose bits differ between runs; none should."""
    differ = []
    for name, operator in OPERATORS.items():
        inputs = make_inputs(operator, n, 128, 14.3, torch.bfloat16, device)
        first = _outputs(operator, inputs, backend)
        for _ in range(repeats):
            again = _outputs(operator, inputs, backend)
            if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
                differ.append(name)
                break
    return differ


def synchronizing(backend: str) -> list[str]:
    """Losses that read from the GPU on the host; none should."""
    culprits = []
    for name, operator in OPERATORS.items():
        inputs = make_inputs(operator, 256, 64, 14.3, torch.bfloat16, "cuda")
        _outputs(operator, inputs, backend)
        torch.cuda.set_sync_debug_mode("error")
        try:
            _outputs(operator, inputs, backend)
        except RuntimeError:
            culprits.append(name)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return culprits


def not_graphable(backend: str) -> list[str]:
    """Losses whose forward and backward do not replay from a CUDA graph with the same bits."""
    culprits = []
    for name, operator in OPERATORS.items():
        inputs = make_inputs(operator, 256, 64, 14.3, torch.bfloat16, "cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                want = _outputs(operator, inputs, backend)
        torch.cuda.current_stream().wait_stream(stream)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = _outputs(operator, inputs, backend)
            graph.replay()
            torch.cuda.synchronize()
            if not all(torch.equal(a, b) for a, b in zip(captured, want, strict=True)):
                culprits.append(name)
        except RuntimeError as error:
            culprits.append(f"{name} ({str(error).splitlines()[0][:60]})")
    return culprits


def report(
    device: str,
    backend: str,
    few: bool = False,
    deadline: float | None = None,
    part: tuple[int, int] = (0, 1),
    save: Callable[[Finding], object] = lambda finding: None,
) -> tuple[list[Finding], bool]:
    """Run everything that the device allows and print it; (all findings, whether all is well).

    Repeats, synchronization and graphs are the first part's, and come first. `save` receives each
    finding at once.
    """
    problems = _problems(device, backend, few) if part[0] == 0 else {}
    found = []
    for finding in findings(device, backend, few, deadline, part):
        found.append(finding)
        save(finding)
    bad = [finding for finding in found if not finding.ok]
    print(f"{backend} on {device}: {len(found)} cases against float64, {len(bad)} wrong")
    for finding in bad[:20]:
        print("  wrong:", finding)
    print(f"{'dX error':14}" + "".join(f"{'scale ' + str(s):>14}" for s in SCALES))
    for dtype in {finding.dtype for finding in found}:
        worst = [
            max(
                (f.feature_error for f in found if (f.dtype, f.scale) == (dtype, s) and f.ok),
                default=0.0,
            )
            for s in SCALES
        ]
        print(f"  {dtype:12}" + "".join(f"{error:14.1e}" for error in worst))
    return found, not bad and not any(problems.values())


def _problems(device: str, backend: str, few: bool) -> dict[str, list[str]]:
    """Losses, by what is wrong with them besides their values; printed as they are found."""
    looks: dict[str, Callable[[], list[str]]] = {
        "bits that differ": lambda: same_bits(
            device, backend, 5 if few else 50, 64 if few else 1000
        )
    }
    if device == "cuda":
        looks["host synchronization"] = lambda: synchronizing(backend)
        looks["no CUDA graph"] = lambda: not_graphable(backend)
    problems = {}
    for what, look in looks.items():
        problems[what] = look()
        print(f"  {what}: {', '.join(problems[what]) or 'none'}", flush=True)
    return problems


def _outputs(
    operator: Operator,
    inputs: Inputs,
    backend: str,
    upstream: float = 1.0,
    chunk_bytes: int | None = None,
) -> list[Tensor]:
    loss = operator.ours(*inputs, backend=backend, chunk_bytes=chunk_bytes)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, inputs)]


def main() -> int:
    """Exit status 1 where anything is wrong."""
    parser = argparse.ArgumentParser(prog="fastclip.bench.check", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="triton" if torch.cuda.is_available() else "torch")
    parser.add_argument("--few", action="store_true", help="a few cases only")
    parser.add_argument(
        "--fill", action="store_true", help="new memory is NaN: reads of it would show"
    )
    parser.add_argument("--part", default="0/1", help="I/K: every K-th case from the I-th")
    parser.add_argument("--until", type=float, help="begin no case after this, in epoch seconds")
    parser.add_argument("--output", type=Path, help="file for the findings, a line of JSON each")
    options = parser.parse_args()
    first, count = map(int, options.part.split("/"))
    if options.fill:
        # torch then fills it, by default
        torch.use_deterministic_algorithms(True, warn_only=True)
    deadline = None
    if options.until is not None:
        # what passed while Python began counts
        deadline = time.monotonic() + options.until - time.time()
    if options.output:
        options.output.write_text("")

    def save(finding: Finding) -> None:
        if options.output:
            # at once: whoever ends the process has what it found
            with options.output.open("a") as file:
                file.write(json.dumps(asdict(finding)) + "\n")

    part = (first, count)
    _, well = report(options.device, options.backend, options.few, deadline, part, save)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
