"""Is an implementation right on this device? Every loss against the dense float64 oracle.

`python -m fastclip.bench.check [--device cuda] [--backend triton] [--few]`: borders of tiles,
widths, scales and dtypes; the same bits again; no synchronisation with the host; replay from a
CUDA graph. Needs torch alone (and triton for its kernels).
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.bench.losses import OPERATORS
from fastclip.bench.runner import Inputs, Operator

ROWS = (4, 63, 65, 127, 129, 1000)
WIDTHS = (16, 77, 512, 1152)
SCALES = (0.1, 14.3, 100.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# relative error of dX: float32 carries a few eps times the logits' size; G and dX are rounded to
# 16 bits once each
GREATEST_ERROR = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


@dataclass
class Finding:
    """Errors of one case: of the loss and scalars absolutely, of features' gradients relatively."""

    loss: str
    n: int
    width: int
    scale: float
    dtype: str
    loss_error: float
    feature_error: float
    scalar_error: float
    ok: bool


def findings(device: str, backend: str, few: bool = False) -> Iterator[Finding]:
    """All cases, or a diagonal through them."""
    cases = [
        (n, width, scale, dtype)
        for n in ROWS
        for width in WIDTHS
        for scale in SCALES
        for dtype in DTYPES
    ]
    for index, operator in enumerate(OPERATORS.values()):
        for n, width, scale, dtype in cases[index % 7 :: 53] if few else cases:
            yield compare(operator, n, width, scale, dtype, device, backend)


def compare(
    operator: Operator,
    n: int,
    width: int,
    scale: float,
    dtype: torch.dtype,
    device: str,
    backend: str,
) -> Finding:
    """One case."""
    inputs = leaves(operator, n, width, scale, dtype, device)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    # a loss scale, as training in float16 has one: the mean's gradients would vanish there
    upstream = 16.0 * n / max(scale, 1.0) if dtype == torch.float16 else 1.0
    truth = _outputs(operator, wide, "reference", upstream)
    got = _outputs(operator, inputs, backend, upstream)
    errors = [(a.double() - b).norm().item() for a, b in zip(got, truth, strict=True)]
    loss_error = errors[0] / max(truth[0].abs().item(), 1.0)
    features = [i for i, t in enumerate(inputs, 1) if t.ndim == 2 and t.shape[1] == width]
    feature_error = max(errors[i] / max(truth[i].norm().item(), 1e-30) for i in features)
    scalars = [i for i in range(1, len(errors)) if i not in features]
    # a temperature's gradient is the scale's times its square
    unit = max(scale**2, 1.0) if operator.name in ("nt_xent", "sup_con") else 1.0
    unit = unit * n if operator.name == "siglip" else unit
    scalar_error = max(errors[i] / (unit * upstream) for i in scalars)
    limit = GREATEST_ERROR[dtype]
    # a gradient that is all rounding has no relative error to speak of
    negligible = all(truth[i].norm() < 1e-4 * upstream * scale / n for i in features)
    ok = loss_error < limit and scalar_error < limit and (feature_error < limit or negligible)
    return Finding(
        operator.name, n, width, scale, str(dtype)[6:], loss_error, feature_error, scalar_error, ok
    )


def leaves(
    operator: Operator, n: int, width: int, scale: float, dtype: torch.dtype, device: str
) -> Inputs:
    """The operator's inputs on a device, features in `dtype`."""
    return [
        t.to(device, dtype if t.ndim == 2 and t.shape[1] == width else t.dtype)
        .detach()
        .requires_grad_()
        for t in operator.make(n, width, scale)
    ]


def same_bits(device: str, backend: str, repeats: int, n: int = 1000) -> list[str]:
    """Losses whose bits differ between runs; none should."""
    differ = []
    for name, operator in OPERATORS.items():
        inputs = leaves(operator, n, 128, 14.3, torch.bfloat16, device)
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
        inputs = leaves(operator, 256, 64, 14.3, torch.bfloat16, "cuda")
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
        inputs = leaves(operator, 256, 64, 14.3, torch.bfloat16, "cuda")
        stream = torch.cuda.Stream()
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


def report(device: str, backend: str, few: bool = False) -> tuple[list[Finding], bool]:
    """Run everything that the device allows and print it; (all findings, whether all is well)."""
    found = list(findings(device, backend, few))
    bad = [finding for finding in found if not finding.ok]
    print(f"{backend} on {device}: {len(found)} cases against float64, {len(bad)} wrong")
    for finding in bad[:20]:
        print("  wrong:", finding)
    print(f"{'dX error':14}" + "".join(f"{'scale ' + str(s):>14}" for s in SCALES))
    for dtype in {finding.dtype for finding in found}:
        worst = [
            max((f.feature_error for f in found if (f.dtype, f.scale) == (dtype, s)), default=0.0)
            for s in SCALES
        ]
        print(f"  {dtype:12}" + "".join(f"{error:14.1e}" for error in worst))
    problems = {
        "bits that differ": same_bits(device, backend, 5 if few else 50, 64 if few else 1000)
    }
    if device == "cuda":
        problems["host synchronisation"] = synchronizing(backend)
        problems["no CUDA graph"] = not_graphable(backend)
    for what, culprits in problems.items():
        print(f"  {what}: {', '.join(culprits) or 'none'}")
    return found, not bad and not any(problems.values())


def _outputs(
    operator: Operator, inputs: Inputs, backend: str, upstream: float = 1.0
) -> list[Tensor]:
    loss = operator.ours(*inputs, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, inputs)]


def main() -> int:
    """Exit status 1 where anything is wrong."""
    parser = argparse.ArgumentParser(prog="fastclip.bench.check", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="triton" if torch.cuda.is_available() else "torch")
    parser.add_argument("--few", action="store_true", help="a few cases only")
    options = parser.parse_args()
    return 0 if report(options.device, options.backend, options.few)[1] else 1


if __name__ == "__main__":
    sys.exit(main())
