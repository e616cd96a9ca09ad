"""How many kernels a stage of a GPU session compiles, counted by what Triton would distinguish."""

from collections import Counter
from typing import Any

import pytest
import torch

from fastclip.bench import attention_check, check, tile_sweep
from fastclip.bench.attention_sweep import TABLES
from fastclip.bench.gpu_lab import STAGES
from fastclip.bench.losses import OPERATORS
from fastclip.bench.runner import make_inputs
from fastclip.kernels import finish, flagged, flags, launch, lean, merge, sigmoid, similarity
from fastclip.kernels.launch import INTERPRETED, Tiling
from fastclip.ops import passes

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU is there: kernels would be launched")

MOST = 150


class Recorder:
    """Stands for the launch: notes what is compiled and runs nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels: set[tuple[Any, ...]] = set()
        for module in (finish, flagged, flags, lean, merge, sigmoid, similarity):
            monkeypatch.setattr(module, "launch", self)
        for module in (similarity, sigmoid):
            monkeypatch.setattr(module, "INTERPRETED", False, raising=False)
        # nor the host's products, of what no kernel has written
        monkeypatch.setattr(passes, "product", lambda a, b, out: out)
        monkeypatch.setattr(passes, "add_product", lambda total, a, b: total)

        def tiling(kernel: str, variant: Any, dtype: torch.dtype, device: Any, n: int) -> Tiling:
            return launch.tiling_of("sm_90", kernel, variant, launch.precision_of(dtype))

        monkeypatch.setattr("fastclip.ops.tiles.triton.tiling", tiling)

    def __call__(self, kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        names = kernel.arg_names
        seen = [self._kind(name, value) for name, value in zip(names, arguments, strict=False)]
        self.kernels.add((kernel.fn.__name__, *seen, *sorted(options.items())))

    @staticmethod
    def _kind(name: str, value: Any) -> Any:
        """What the JIT makes another kernel of: dtypes, and integers that are 1 or aligned."""
        if isinstance(value, torch.Tensor):
            return str(value.dtype)
        if isinstance(value, int) and (name.startswith("stride") or name == "width"):
            return value == 1, value % 16 == 0
        return str(getattr(value, "block_shape", type(value).__name__))


def run_check(recorder: Recorder) -> None:
    """What the check's cases compile; scales and further chunks make no other kernel."""
    for name, operator in check.CHECKED.items():
        for n in (4, 129, 1000):
            for dtype in check.DTYPES:
                for width in check.widths_of(name, dtype):
                    inputs = make_inputs(operator, n, width, 14.3, dtype, "cpu")
                    for chunk_bytes in (None, 4 * len(inputs[0]) * 40):
                        options = {"backend": "triton", "chunk_bytes": chunk_bytes}
                        torch.autograd.grad(operator.ours(*inputs, **options), inputs)


def test_the_losses_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    candidates = [tile_sweep.candidates_with_shipped(p, "cpu") for p in tile_sweep.CANDIDATES]
    swept = sum(map(len, candidates)) * len(tile_sweep.KERNELS)
    run_check(recorder)
    checked = len(recorder.kernels)
    for operator in OPERATORS.values():
        inputs = make_inputs(operator, 256, 64, 14.3, torch.bfloat16, "cpu")
        torch.autograd.grad(operator.ours(*inputs, backend="triton"), inputs)
    print(Counter(kernel[0] for kernel in recorder.kernels))
    assert checked > 20
    assert swept + len(recorder.kernels) <= MOST, (swept, len(recorder.kernels))


def test_the_attention_stage() -> None:
    jobs = [(kind, n, p) for kind, table in TABLES.items() for n in table for p in table[n]]
    assert len(set(jobs)) == len(jobs)
    seconds = {part.name: part.seconds for part in STAGES["attention"]}["attention-check"]
    checked = [*attention_check.drawn_cases("cuda", seconds, 0), *attention_check._repeated("cuda")]
    # of each case the forward and the gradient; the last part runs plans that were tried
    assert len(jobs) + 2 * len(checked) <= MOST
