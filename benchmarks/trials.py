"""Trying candidates in processes of their own: one that crashes or hangs costs no other."""

import json
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# compilations take seconds each, and a machine with a GPU has cores
WORKERS = 14
# the slowest candidate compiles all its kernels in about a minute
TRIAL_SECONDS = 90.0


def run_trials(
    commands: Sequence[Sequence[str]], seconds: float, workers: int = WORKERS
) -> list[tuple[dict[str, Any], str]]:
    """Run commands, `workers` at a time, and read what they print.

    Args:
        commands: of one process each, which prints lines of JSON [name, value] as it goes.
        seconds: in which all must have ended; one that has not is stopped, the rest not begun.
        workers: processes at a time.

    Returns:
        For each command what it said, by name, and how it ended: "ended", "died: ...",
        "hung: ..." or "out of time".
    """
    stop = time.monotonic() + seconds

    def one(command: Sequence[str]) -> tuple[dict[str, Any], str]:
        left = min(stop - time.monotonic(), TRIAL_SECONDS)
        if left <= 0:
            return {}, "out of time"
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            text, _ = process.communicate(timeout=left)
            status = process.returncode
            ended = "ended" if status == 0 else f"died: exit status {status}"
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            ended = f"hung: stopped after {left:.0f} s"
        return dict(json.loads(line) for line in text.splitlines() if line.startswith("[")), ended

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, commands))


def gpu_clocks() -> str | None:
    """Clocks, temperature and power as nvidia-smi has them; None where it does not answer."""
    query = "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw"
    try:
        return subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
