"""The examples run as they stand: SLURM's script with stand-ins for `srun` and `scontrol`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastclip.models import checkpoint
from tests.train.conftest import ROOT, tiny_model, train_flags

__all__ = ["tiny_model", "train_flags"]  # fixtures

SRUN = """#!/bin/bash
# two tasks; options of srun's own come first
while [ "${1#-}" != "$1" ]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=2 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_NTASKS=2 "$@" & second=$!
if [ -n "$STOP_AFTER" ]; then
    until [ "$(wc -l < "$STOP_AFTER" 2>/dev/null || echo 0)" -ge 5 ]; do sleep 0.1; done
    kill -USR1 $first $second
fi
wait $first; status=$?
wait $second; other=$?
exit $((status > other ? status : other))
"""
SCONTROL = """#!/bin/bash
case "$1" in show) echo localhost ;; requeue) echo "requeued $2" ;; esac
"""


@pytest.mark.slow
@pytest.mark.dist
def test_slurm_saves_requeues_and_goes_on(train_flags: list[str], tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tools / "python").symlink_to(sys.executable)
    run = tmp_path / "logs" / "slurm-4711"
    flags = [*train_flags, "--train-num-samples", "400", "--log-sample-ids"]
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.pathsep.join(sys.path)}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "localhost",
        "OMP_NUM_THREADS": "1",
    }

    def submit(**extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "examples/slurm.sbatch", *flags],
            cwd=ROOT,
            env={**environment, **extra},
            capture_output=True,
            text=True,
            timeout=200,
        )

    first = submit(STOP_AFTER=str(run / "samples.jsonl"))
    assert "requeued 4711" in first.stdout, first.stderr[-2000:]
    latest = checkpoint.find_latest(run / "checkpoints")
    assert latest is not None and latest.name.startswith("step_")
    second = submit()
    assert second.returncode == 0, second.stderr[-2000:]
    assert f"resuming {latest}" in second.stderr
    lines = (run / "samples.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 50


def test_the_hostfile_is_deepspeeds_format() -> None:
    lines = (ROOT / "examples" / "hostfile").read_text().splitlines()
    machines = [line for line in lines if not line.startswith("#")]
    assert machines == ["node-1 slots=8", "node-2 slots=8"]
