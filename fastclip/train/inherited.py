"""The run that a command line resumes: where it is, and the settings that are taken from it."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastclip.models import checkpoint

SETTINGS_FILE = "config.yaml"
LATEST = "latest"


def is_run(path: Path) -> bool:
    """Whether a path is a run directory of `fastclip train`, with or without a checkpoint."""
    return (path / SETTINGS_FILE).is_file() and (path / "checkpoints").is_dir()


def settings_of(values: Mapping[str, Any], *, new: bool) -> Path | None:
    """The settings of the run that is resumed; None where none is, or where it has none.

    A run without a checkpoint begins anew: as its flags have it, if they would do for a new one.

    Args:
        values: of all flags, by name.
        new: whether the flags would do for a new run: they say what to train, or on what.

    Raises:
        ValueError: `--resume latest` finds no run, and no flag says what a new one would be.
        FileNotFoundError: RUN@best is given and no checkpoint is known to be the best.
    """
    resume, logs, name = values["resume"], Path(values["logs"]), values["name"]
    if resume is None or (resume == LATEST and name is None):
        return None
    run = logs / name if resume == LATEST else checkpoint.run_of(Path(resume))
    if resume == LATEST and not checkpoint.named(run / "checkpoints", ""):
        # the first start of a job and its restarts can have the same command line
        if new:
            return None
        if not is_run(run):
            raise ValueError(
                f"--resume latest: there is no run {run}{_nearest(logs, name)}; check --name and "
                "--logs, or give a new run its --train-data"
            )
    return run / SETTINGS_FILE if is_run(run) else None


def _nearest(logs: Path, name: str) -> str:
    runs = [path.name for path in logs.iterdir() if is_run(path)] if logs.is_dir() else []
    near = difflib.get_close_matches(name, runs, n=1)
    return f" (there is {near[0]})" if near else ""
