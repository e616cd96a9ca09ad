"""Peak memory of a large batch, measured in a child process."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

CHILD = textwrap.dedent("""
    import re, sys
    import torch
    from fastclip.functional import clip_loss

    def resident(field):
        return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

    def inputs(n):
        generator = torch.Generator().manual_seed(n)
        x, y = (torch.randn(n, 256, generator=generator) for _ in range(2))
        unit = [torch.nn.functional.normalize(t, dim=-1).requires_grad_() for t in (x, y)]
        return *unit, torch.tensor(14.0, requires_grad=True)

    clip_loss(*inputs(64)).backward()   # libraries and thread pools
    arguments = inputs(16384)
    before = resident("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")   # the peak counts from here
    clip_loss(*arguments).backward()
    print(resident("VmHWM") - before)
""")


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc/self")
def test_peak_memory_of_16384_pairs() -> None:
    """One N x N float32 would be 1,024 MiB; the bound is 300 MB above the inputs."""
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, cwd=root
    )
    peak = int(result.stdout)
    print(f"peak above inputs: {peak / 1e6:.0f} MB")
    assert 0 < peak <= 300e6
