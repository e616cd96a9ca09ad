"""One session on a GPU, a stage at a time: right, then fast, beside the baselines.

`benchmarks/gpu_lab.sh --output DIR [--stage STAGE] [--budget SECONDS]` needs a machine with one
NVIDIA GPU and nothing but Python, torch and its triton; baselines that are installed as well take
part. Stages are losses, small, attention, train-step and data: each a few parts, every part in a
process of its own that is ended when its time is up: one that crashes or hangs costs no other. What
a part found is in DIR after every row. DIR/lab.tar.gz, or --archive, has everything after every
part; the last lines are a short table.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastclip.bench import (
    attention,
    attention_check,
    attention_sweep,
    lab_losses,
    records,
    small,
    tile_sweep,
)
from fastclip.bench.ceilings import ceilings
from fastclip.bench.losses import OPERATORS
from fastclip.bench.runner import MATMUL, Row, Settings, gradient_of, leaves
from fastclip.bench.screen import Rows
from fastclip.bench.trials import gpu_clocks
from fastclip.messages import logger

# processes of each implementation
CHECKERS = {"triton": 9, "auto": 3, "torch": 1}
# seconds after its time in which a process of the check may end its case
CHECK_GRACE = 4.0
BUDGET = 420.0
# seconds in which results are packed and the table is printed
CLOSING = 10.0


@dataclass(frozen=True)
class Part:
    """A part of a stage: the most seconds it may take, and whether a failure means wrong results.

    The last part of a stage takes what is left.
    """

    name: str
    seconds: float
    judges: bool = False


STAGES = {
    "losses": [
        Part("ceilings", 40.0),
        Part("tilings", 120.0),
        Part("check", 90.0, judges=True),
        Part("profile", 30.0),
        Part("losses", 400.0, judges=True),
    ],
    "attention": [
        Part("attention-plans", 130.0),
        Part("attention-check", 90.0, judges=True),
        Part("attention", 400.0),
    ],
    "small": [Part("check", 60.0, judges=True), Part("small", 400.0)],
    "train-step": [Part("train-step", 400.0)],
    "data": [Part("data", 400.0)],
}
# packages of stages that run a command: torch and triton are enough for the others
NEEDED = {
    "train-step": ("tyro", "yaml", "numpy", "PIL", "webdataset"),
    "data": ("tyro", "yaml", "numpy", "PIL", "webdataset", "braceexpand", "simplejpeg"),
}

# lines of a summary: what matters first comes first
MOST_LINES = 40


def summary(rows: list[Row]) -> list[str]:
    """A line for each loss and size: times, share of the bare products' speed, and baselines.

    `host` is the time in which the host queued the work, `runs` the kernels, copies and fills;
    after a baseline's name stands how many times as fast fastclip is, and open_clip's host time and
    runs.
    """
    lines = [
        f"{'loss':9} {'n':>6} {'D':>5} {'ms':>8} {'host':>6} {'runs':>5} {'share':>5} {'MiB':>7}"
        "  fastclip is × faster than"
    ]
    for ours in (row for row in rows if row.baseline == "fastclip" and row.p50 is not None):
        beside = [
            r
            for r in rows
            if (r.operator, r.n, r.width) == (ours.operator, ours.n, ours.width)
            and r.baseline not in ("fastclip", MATMUL)
        ]
        ratios = [f"{r.baseline} {r.ratio:.2f}{_queued(r)}" for r in beside if r.ratio is not None]
        memory = [f"{r.baseline} {r.status}" for r in beside if r.status == "out of memory"]
        assert ours.p50 is not None
        share = "" if ours.matmul_share is None else f"{ours.matmul_share:.0%}"
        host = "" if ours.host is None else f"{1e3 * ours.host:.2f}"
        runs = "" if ours.launches is None else str(ours.launches)
        lines.append(
            f"{ours.operator:9} {ours.n:6} {ours.width:5} {1e3 * ours.p50:8.2f} {host:>6} "
            f"{runs:>5} {share:>5} {(ours.peak_bytes or 0) / 2**20:7.0f}  "
            f"{', '.join(ratios + memory)}"
        )
    left = len(lines) - MOST_LINES
    return lines if left <= 0 else [*lines[: MOST_LINES - 1], f"and {left + 1} more rows"]


def _queued(row: Row) -> str:
    if row.baseline != "open_clip" or row.host is None or row.launches is None:
        return ""
    return f" ({1e3 * row.host:.2f} ms host, {row.launches} runs)"


def check_all(output: Path, seconds: float, quick: bool) -> bool:
    """Check the implementations in parallel processes; their findings go to JSON files."""
    until = time.time() + seconds
    command = [sys.executable, "-m", "fastclip.bench.check", "--device", "cuda"]
    command += ["--until", str(until)]
    # by "auto" small batches hold S whole
    parts = [(backend, part, count) for backend, count in CHECKERS.items() for part in range(count)]
    processes = {}
    for backend, part, count in parts:
        file = output / f"check-{backend}-{part}.jsonl"
        flags = ["--backend", backend, "--part", f"{part}/{count}", "--output", str(file)]
        few = ["--few"] if quick or backend == "torch" else []
        # in every other one what is read before it is written is NaN
        few += ["--fill"] if part % 2 else []
        with file.with_suffix(".log").open("w") as log:
            processes[file] = subprocess.Popen(
                [*command, *flags, *few], stdout=log, stderr=subprocess.STDOUT
            )
    well = True
    findings: dict[str, list[Any]] = {backend: [] for backend in CHECKERS}
    for file, process in processes.items():
        try:
            status = process.wait(max(until + CHECK_GRACE - time.time(), 0.1))
        except subprocess.TimeoutExpired:
            # it compiles; what it has found counts
            process.kill()
            process.wait()
            print(f"{file.stem}: ended while a case was under way", flush=True)
            status = 0
        well = well and status == 0
        if status != 0 or file.stem.endswith("-0"):
            print(file.with_suffix(".log").read_text(), flush=True)
        if file.exists():
            lines = file.read_text().splitlines()
            findings[file.stem.split("-")[1]] += map(json.loads, lines)
            file.unlink()
        file.with_suffix(".log").unlink()
    for backend, found in findings.items():
        wrong = sum(not finding["ok"] for finding in found)
        well = well and not wrong
        print(f"{backend}: {len(found)} cases against float64, {wrong} wrong")
        (output / f"check-{backend}.json").write_text(json.dumps(found) + "\n")
    return well


def ceilings_part(output: Path, seconds: float, quick: bool) -> bool:
    """What bare products and copies reach."""
    found = ceilings(columns=8192) if quick else ceilings()
    (output / "ceilings.json").write_text(json.dumps(found, indent=1) + "\n")
    return True


def tilings_part(output: Path, seconds: float, quick: bool) -> bool:
    """Find tilings; what was found is what is checked and measured by the parts that follow."""

    def save(result: Any) -> None:
        (output / "sweep.json").write_text(json.dumps(result, indent=1) + "\n")
        tile_sweep.write_table(result)
        table = tile_sweep.launch.TILINGS_FILE.read_text()
        (output / "tilings.json").write_text(table)

    tile_sweep.sweep(seconds, save=save)
    return True


def losses_part(output: Path, seconds: float, quick: bool) -> bool:
    """All losses beside their baselines, the sizes that matter most first."""
    well = lab_losses.measure(output, seconds, quick)
    if (output / lab_losses.FILE).exists():
        rows = records.read(output / lab_losses.FILE).rows
        print("\n".join(summary([Row(**row) for row in rows])))
    return well


def small_part(output: Path, seconds: float, quick: bool) -> bool:
    """Up to which size S is held whole: both ways of each loss, the limits printed."""
    settings = small.settings_for("cuda", rounds=3 if quick else 10)
    with Rows("losses", settings, "cuda", output / "small.json") as rows:
        small.run(small.SIZES[:3] if quick else small.SIZES, settings, rows.add)
    return True


def profile_part(output: Path, seconds: float, quick: bool) -> bool:
    """Nsight Compute's figures of the statistics and gradient kernels, where it is installed."""
    sections = ("SpeedOfLight", "WarpStateStats", "InstructionStats", "Occupancy", "LaunchStats")
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off"]
    command += [word for section in sections for word in ("--section", section)]
    command += ["--kernel-name", "regex:lean_(statistics|gradient)_kernel"]
    command += [sys.executable, "-m", "fastclip.bench.gpu_lab", "--profiled"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"no profile: {type(error).__name__}")
        return True
    (output / "profile.txt").write_text(found.stdout + found.stderr)
    return True


def profiled() -> None:
    """What is profiled: a forward and backward of the CLIP loss, after one that compiles.

    Nothing is kept between the two, so that the gradient's kernel has its exponentials to compute.
    """
    settings = Settings(dtype=torch.bfloat16, autocast=True, device="cuda")
    loss = functools.partial(OPERATORS["clip"].ours, keep_bytes=0)
    inputs = leaves(OPERATORS["clip"], 32768, 768, settings)
    gradient_of(loss, inputs, settings)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    gradient_of(loss, inputs, settings)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def attention_part(output: Path, seconds: float, quick: bool) -> bool:
    """Attention beside its baselines."""
    settings = Settings(torch.bfloat16, rounds=15, warmup=3, device="cuda")
    tokens = 1 << (14 if quick else 18)
    # flex attention compiles for minutes
    with Rows("attention", settings, "cuda", output / "attention.json", tokens=tokens) as rows:
        attention.baselines(settings, rows.add, tokens, flex=False)
    return True


def attention_plans_part(output: Path, seconds: float, quick: bool) -> bool:
    """Find plans of the attention kernels."""
    attention_sweep.sweep(seconds, output, 1 << (14 if quick else 18))
    return True


def bench_part(name: str, *flags: str) -> Callable[[Path, float, bool], bool]:
    """A part of `fastclip bench`, on the GPU."""

    def part(output: Path, seconds: float, quick: bool) -> bool:
        command = [sys.executable, "-m", "fastclip.cli", "bench", name, "--device", "cuda"]
        command += ["--output", str(output / f"{name}.json"), *(["--quick"] if quick else flags)]
        return subprocess.run(command).returncode == 0

    return part


PARTS: dict[str, Callable[[Path, float, bool], bool]] = {
    "ceilings": ceilings_part,
    "tilings": tilings_part,
    "check": check_all,
    "profile": profile_part,
    "losses": losses_part,
    "small": small_part,
    "attention-plans": attention_plans_part,
    "attention-check": lambda output, seconds, quick: attention_check.check(
        "cuda", seconds, output
    ),
    "attention": attention_part,
    "train-step": bench_part(
        "train-step", "--towers", "ViT-B-32:256", "ViT-B-16:256", "--precision", "amp_bf16"
    ),
    "data": bench_part("data", "--workers", "12"),
}


def lacking(stage: str) -> list[str]:
    """The packages that a stage needs and that are not installed, by pip's names."""
    names = {"yaml": "pyyaml", "PIL": "pillow"}
    needed = NEEDED.get(stage, ())
    return [names.get(name, name) for name in needed if importlib.util.find_spec(name) is None]


def part_command(part: Part, output: Path, seconds: float, quick: bool) -> list[str]:
    """The process of one part."""
    command = [sys.executable, "-m", "fastclip.bench.gpu_lab", "--output", str(output)]
    command += ["--part", part.name, "--seconds", f"{seconds:.0f}"]
    return command + ["--quick"] * quick


# What a part has started ends with it. Not a session of its own, which what ends a command that
# took too long would not reach.
_OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
)


def run_stage(
    stage: str,
    output: Path,
    budget: float,
    quick: bool = False,
    command: Callable[[Part, Path, float, bool], Sequence[str]] = part_command,
    archive: Path | None = None,
) -> dict[str, str]:
    """Run a stage's parts in turn, and pack what they left after each.

    Args:
        stage: a key of `STAGES`.
        output: folder of the results and of a log for each part.
        budget: seconds in which the stage ends.
        quick: few cases and small sizes.
        command: makes the command line of a part's process.
        archive: what is packed; by default `lab.tar.gz` in the folder.

    Returns:
        The status of each part: "ok", "wrong", "failed", "ran out of time" or "left out".
    """
    stop = time.monotonic() + budget - CLOSING
    statuses: dict[str, str] = {}
    for part in STAGES[stage]:
        seconds = min(part.seconds, stop - time.monotonic())
        if seconds <= 1:
            statuses[part.name] = "left out"
            continue
        print(f"== {part.name}, at most {seconds:.0f} s", flush=True)
        with (output / f"{part.name}.log").open("w") as log:
            process = subprocess.Popen(
                # a part that keeps its time ends by itself before it is ended
                command(part, output, 0.9 * seconds, quick),
                stdout=log,
                stderr=subprocess.STDOUT,
                **_OWN_GROUP,
            )
            try:
                status = process.wait(timeout=seconds)
                failure = "wrong" if part.judges and status == 1 else f"failed ({status})"
                statuses[part.name] = "ok" if status == 0 else failure
            except subprocess.TimeoutExpired:
                statuses[part.name] = "ran out of time"
            finally:
                _end(process)
        print(f"   {statuses[part.name]}", flush=True)
        # each time: the session may be ended from outside
        _note(statuses, stage, output, archive)
    _note(statuses, stage, output, archive)
    return statuses


def _note(statuses: dict[str, str], stage: str, output: Path, archive: Path | None) -> None:
    (output / "stage.json").write_text(json.dumps({stage: statuses}, indent=1) + "\n")
    pack(output, archive)


def _end(process: subprocess.Popen[bytes]) -> None:
    # also where the part itself has ended: its children may not have
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pack(output: Path, archive: Path | None = None) -> Path:
    """Put all results and logs of a folder into an archive, by default its lab.tar.gz."""
    archive = archive or output / "lab.tar.gz"
    partial = archive.with_name(f".{archive.name}")
    with tarfile.open(partial, "w:gz") as tar:
        for file in sorted(output.iterdir()):
            if file.suffix in (".json", ".jsonl", ".log", ".txt"):
                tar.add(file, arcname=file.name)
    partial.rename(archive)
    return archive


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage; exit status 1 where an implementation is wrong or a part failed."""
    parser = argparse.ArgumentParser(prog="gpu_lab", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for results and logs")
    parser.add_argument("--archive", type=Path, help="packed results, by default in --output")
    parser.add_argument("--stage", choices=list(STAGES), default="losses")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for the stage")
    parser.add_argument("--quick", action="store_true", help="few cases and small sizes")
    parser.add_argument("--part", choices=list(PARTS), help="one part alone, in this process")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for that part")
    parser.add_argument("--profiled", action="store_true", help="what a profiler is to watch")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        logger.error("no CUDA device: nothing measured")
        return 1
    if options.profiled:
        profiled()
        return 0
    if options.output is None:
        parser.error("--output: give a folder for the results")
    if missing := lacking(options.stage):
        logger.error(f"the stage {options.stage} needs packages: pip install {' '.join(missing)}")
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    if options.part:
        return 0 if PARTS[options.part](options.output, options.seconds, options.quick) else 1
    environment = {**records.environment("cuda"), "clocks": gpu_clocks()}
    (options.output / "environment.json").write_text(json.dumps(environment) + "\n")
    print(json.dumps(environment))
    # so that the part under way ends too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    statuses = run_stage(
        options.stage, options.output, options.budget, options.quick, archive=options.archive
    )
    last = options.output / f"{list(statuses)[-1]}.log"
    print("\n".join((last.read_text() if last.exists() else "").splitlines()[-40:]))
    return 0 if set(statuses.values()) == {"ok"} else 1


if __name__ == "__main__":
    sys.exit(main())
