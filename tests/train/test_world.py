"""A process leaves its group before the interpreter ends.

A gloo thread that frees tensors while the interpreter is closing aborts the process, in some runs
only; so what is tested is the order, not the abort.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastclip.train.distributed import World
from tests.train.conftest import ROOT

SCRIPT = """
import atexit, sys
import torch
import torch.distributed as dist
import torch._dynamo
from fastclip import ClipLoss
from fastclip.train.distributed import world

atexit.register(lambda: print(f"open: {dist.is_initialized()}", flush=True))
with world("cpu") as here:
    features = [torch.randn(8, 4, requires_grad=True) for _ in range(2)]
    loss = ClipLoss(rank=here.rank, world_size=here.size, local_loss=True, gather_with_grad=True)
    loss(*features, torch.tensor(10.0)).backward()
    if sys.argv[1] == "fails":
        sys.exit(3)
"""


@pytest.mark.dist
@pytest.mark.parametrize("end, status", [("well", 0), ("fails", 1)])
def test_the_group_is_closed_before_the_interpreter(end: str, status: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [sys.executable, *launcher, str(script), end],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == status, done.stderr[-2000:]
    assert done.stdout.count("open: False") == 2 and "open: True" not in done.stdout
    assert "terminate called" not in done.stderr
    if status:
        # the launcher reports what the script said, not an abort
        assert "exitcode  : 3" in done.stderr


def environment() -> dict[str, str]:
    """One thread a process, and this checkout's package."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def test_a_process_alone_keeps_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several; DeepSpeed goes by the variable."""
    # both, so that it is gone afterwards
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda *arguments, **options: None)
    World(0, 1, torch.device("cuda", 1)).join_alone()
    assert os.environ["LOCAL_RANK"] == "1"
