"""The examples run as they stand: SLURM's script with stand-ins for `srun` and `scontrol`."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastclip.models import checkpoint
from tests.processes import Forked, run_script
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


SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run_example(*words: str) -> str:
    """What a script prints; it must end well."""
    process = Forked(run_script, *words)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-2000:]
    return output


def run_under_torchrun(script: str) -> str:
    """What it prints on two ranks; it must end well."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={**environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        # under torch alone too, gloo's threads now and then abort a process that closes its group
        if "exitcode: -6" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    """Those that a pattern's group finds."""
    return [float(found) for found in re.findall(pattern, text)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_short_and_says_how_to_run_it(name: str) -> None:
    text = (ROOT / "examples" / name).read_text()
    assert len(text.splitlines()) <= 80
    assert f"examples/{name}" in (ast.get_docstring(ast.parse(text)) or "")


@pytest.mark.slow
def test_the_drop_in_has_open_clips_losses() -> None:
    pattern = r"loss (\d+\.\d+)"
    ours = run_example("examples/drop_in_open_clip.py")
    theirs = run_example("examples/drop_in_open_clip.py", "--without")
    assert "computed by fastclip" in ours and "computed by open_clip" in theirs
    for one, other in zip(numbers(pattern, ours), numbers(pattern, theirs), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("micro_batches", ["1", "8"])
def test_the_large_batch_has_the_plain_gradient(micro_batches: str) -> None:
    message = run_example("examples/large_batch_plain_pytorch.py", micro_batches)
    differences = numbers(r"differs by (\S+)", message)
    assert len(differences) == 5 and max(differences) < 1e-5
    losses = numbers(r"loss (\d+\.\d+)", message)
    assert losses[-1] < losses[0] - 1


def test_simclr_and_sup_con_learn() -> None:
    message = run_example("examples/simclr_lightly.py")
    lines = re.findall(r"loss (\S+) -> (\S+)", message)
    assert len(lines) == 2 and all(float(after) < float(before) for before, after in lines)


@pytest.mark.parametrize("data", ["scenes", "shards"])
def test_uniclip_learns_from_views(data: str, make_shard: Callable[..., Path]) -> None:
    shards = [] if data == "scenes" else [str(make_shard(samples=400))]
    losses = numbers(r"loss (\d+\.\d+)", run_example("examples/uniclip_views.py", *shards))
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_transformers_fine_tunes_without_logits() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    message = run_example("examples/finetune_transformers.py")
    before, after = numbers(r"(\d+\.\d+) (?:before|after)", message)
    assert before == pytest.approx(after, abs=2e-5) and "logits_per_image is None" in message
    losses = numbers(r"step \d+: loss (\d+\.\d+)", message)
    assert losses[-1] < losses[0]


@pytest.mark.dist
def test_several_processes_have_the_whole_batchs_gradient() -> None:
    message = run_under_torchrun("examples/distributed.py")
    # the two may print on one line: unbuffered, a line and its end are written apart
    assert len(numbers(r"differs by ([\d.]+e[-+]\d+)", message)) == 2


FRAMEWORKS = ("fsdp2", "trainer_accelerate", "trainer_lightning", "trainer_transformers")

ONE_AFTER_THE_OTHER = """
import runpy
import torch.distributed as dist

dist.init_process_group("gloo")
end = dist.destroy_process_group
# one group for all examples, each of which would make its own
dist.init_process_group = dist.destroy_process_group = lambda *arguments, **options: None
for name in {names}:
    runpy.run_path(f"examples/{{name}}.py", run_name="__main__")
end()
"""


@pytest.mark.dist
def test_under_each_framework_it_is_the_whole_batchs_gradient(tmp_path: Path) -> None:
    """One launch for all: what takes longest is to import them."""
    for library in ("accelerate", "pytorch_lightning", "transformers"):
        pytest.importorskip(library)
    script = tmp_path / "all.py"
    script.write_text(ONE_AFTER_THE_OTHER.format(names=FRAMEWORKS))
    differences = numbers(r"differs by ([\d.]+e[-+]\d+)", run_under_torchrun(str(script)))
    assert len(differences) == 2 * len(FRAMEWORKS) and max(differences) < 1e-5
    for name in FRAMEWORKS:
        assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 60


def test_the_hostfile_is_deepspeeds_format() -> None:
    lines = (ROOT / "examples" / "hostfile").read_text().splitlines()
    machines = [line for line in lines if not line.startswith("#")]
    assert machines == ["node-1 slots=8", "node-2 slots=8"]
