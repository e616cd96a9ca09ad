"""Peak memory of large batches, measured in child processes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

CHILD = textwrap.dedent("""
    import ctypes, gc, json, re, sys
    import torch
    import torch.nn.functional as F
    import torch._dynamo  # torch's operators load it when they are first called
    from fastclip import functional as losses
    from fastclip.ops import kept

    def resident(field):
        return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

    def features(rows, width):
        generator = torch.Generator().manual_seed(rows)
        x = F.normalize(torch.randn(rows, width, generator=generator), dim=-1)
        return x.requires_grad_()

    def run(name, rows, width):
        count = {"nt_xent": 2, "mp_nce": 4, "sup_con": 1}.get(name, 2)
        rows = rows // count if name in ("nt_xent", "mp_nce") else rows
        blocks = [features(rows, width) for _ in range(count)]
        scale = torch.tensor(14.0, requires_grad=True)
        gc.collect()
        # what was freed goes back to the system first, or the next peak would hide in it
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = resident("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
        if name == "mp_nce":
            loss = losses.mp_nce_loss(blocks, [0, 0, 0, 1], scale)
        elif name == "nt_xent":
            loss = losses.nt_xent_loss(*blocks, 1 / scale)
        elif name == "sup_con":
            loss = losses.sup_con_loss(*blocks, torch.arange(rows) // 4, 1 / scale)
        elif name == "siglip":
            loss = losses.siglip_loss(*blocks, scale, -scale)
        else:
            loss = getattr(losses, name + "_loss")(*blocks, scale)
        loss.backward()
        return resident("VmHWM") - before

    names, rows, width, keep = json.loads(sys.argv[1])
    if not keep:
        kept.KEEP_BYTES["cpu"] = 0
    for name in names:
        # libraries, thread pools and code: of a small batch's whole S, and of tiles
        run(name, 64, width)
        run(name, 2112, 64)
    print(json.dumps({name: run(name, rows, width) for name in names}))
""")


def peaks(names: list[str], rows: int, width: int, *, keep: bool = True) -> dict[str, int]:
    """Bytes above the inputs, forward and backward."""
    result = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([names, rows, width, keep])],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        # memory that is freed goes back at once; how much malloc keeps differs from run to run
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    found = json.loads(result.stdout)
    print({name: f"{peak / 1e6:.0f} MB" for name, peak in found.items()})
    return found


NAMES = ["clip", "siglip", "info_nce", "nt_xent", "mp_nce", "sup_con"]

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc/self")


@linux
def test_peak_memory_of_16384_pairs() -> None:
    """One N x N float32 would be 1,024 MiB; the bound is 300 MB above the inputs."""
    assert 0 < peaks(["clip"], 16384, 256)["clip"] <= 300e6


@linux
@pytest.mark.slow
def test_peak_memory_of_every_loss() -> None:
    """12,288 rows: one float32 matrix is 604 MB. Gradients take 6 MB, chunks of S 16 MB each."""
    for name, peak in peaks(NAMES, 12288, 64).items():
        assert 0 < peak <= 60e6, name


@linux
@pytest.mark.slow
def test_peak_memory_beside_the_gradients() -> None:
    """Wide rows: the gradients of all features, a chunk of S of 8 MB, and little else.

    4,096 rows of 1,024 float32 are 17 MB, two blocks of them 34. What is held twice, or whole
    where a part of the width would do, shows.
    """
    for name, peak in peaks(NAMES, 4096, 1024, keep=False).items():
        rows = 17e6 * (2 if name in ("clip", "siglip", "info_nce") else 1)
        # blocks of one symmetric S are joined, and the joined gradient is copied to each
        copies = 3 if name in ("nt_xent", "mp_nce") else 1
        assert 0.9 * rows < peak <= copies * rows + 8e6 + 24e6, name
