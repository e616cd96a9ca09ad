"""The JSON files of all benchmarks: where and how it was measured, and the rows.

    {"benchmark": "losses", "environment": {...}, "settings": {...}, "results": [{...}, ...]}

Files from before `benchmark` was written are recognized by their rows' fields.
"""

import functools
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastclip
from fastclip.atomic import write_text

# The fields that name a row, by benchmark: equal ones are the same measurement.
KEYS: dict[str, tuple[str, ...]] = {
    "losses": ("operator", "n", "width", "baseline"),
    "attention": ("operator", "n", "width", "causal", "baseline"),
    "data": ("task", "loader"),
    "train-step": ("model", "batch_size", "baseline"),
    "memory": ("operator", "n", "width", "baseline"),
    "collectives": ("operator", "ranks", "n", "width", "baseline"),
}
# The fields that are read as text, and as true or false; all others are numbers.
_TEXTS = {"operator", "baseline", "task", "loader", "model", "status"}
_FLAGS = {"causal", "repeatable"}
# What distinguishes files without the name: a field that only one kind of row has.
_DISTINCTIVE = {"causal": "attention", "loader": "data", "operator": "losses"}
# What a field of older files was called, and of the first.
_OLD_NAMES = {
    "rival": "baseline",
    "roof_share": "matmul_share",
    "saved_order": "saved_exponent",
    "peak_order": "peak_exponent",
}
_FIRST_NAMES = {"name": "baseline"}
_FIRST_MATMUL = {"four bare products": "bare products"}


@dataclass(frozen=True)
class Record:
    """One file.

    Attributes:
        name: the file's, without its folder.
        benchmark: a key of `KEYS`.
        environment: date, versions, device, threads; see `environment`.
        settings: how it was measured.
        rows: what was measured; times in seconds, memory in bytes, None where there is nothing.
    """

    name: str
    benchmark: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]

    def key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        """What names a row among all of this benchmark."""
        return tuple(row.get(field) for field in KEYS[self.benchmark])


def environment(device: str) -> dict[str, Any]:
    """What a result depends on: versions and commit, device, threads and time."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fastclip": fastclip.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def is_busy(load: float | None, cores: int) -> bool:
    """Whether a machine has so much else to do that times are not reliable; False if not known."""
    return load is not None and load > cores / 2


def prepare(path: Path | None) -> None:
    """Make the folder of a file to be written, before minutes are spent on what goes into it.

    Raises:
        ValueError: the file cannot be written there.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; give a file in it")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path}: its folder cannot be written to; give another")


def write(
    path: Path,
    benchmark: str,
    settings: Any,
    rows: Sequence[Any],
    device: str,
    load_average: float | None = None,
    **more: Any,
) -> None:
    """Write rows and settings, dataclasses both, with the environment in front.

    `load_average` is the machine's when the run began.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": benchmark,
        "environment": {**environment(device), "load_average": load_average},
        "settings": {name: _plain(value) for name, value in asdict(settings).items()},
        **more,
        "results": [asdict(row) for row in rows],
    }
    write_text(path, json.dumps(content, indent=1) + "\n", named=True)


def read(path: Path) -> Record:
    """Read a file of `write`'s, of this version or an earlier one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else; the message says what is missing.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no file {path}; give a JSON file that `fastclip bench ... --output` wrote"
        ) from error
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder; give a JSON file in it") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text; give a JSON file of `fastclip bench`") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise _foreign(path, f"it holds a {type(content).__name__}, not an object")
    for name, kind in (("environment", dict), ("results", list)):
        if not isinstance(content.get(name), kind):
            raise _foreign(path, f"it has no {name!r}")
    rows = content["results"]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise _foreign(path, "its results are not rows")
    rows = [{_OLD_NAMES.get(field, field): row[field] for field in row} for row in rows]
    if "benchmark" not in content and "name" in rows[0]:
        rows = [_of_the_first_files(row) for row in rows]
    guessed = next((kind for field, kind in _DISTINCTIVE.items() if field in rows[0]), None)
    benchmark = content.get("benchmark", guessed)
    if not isinstance(benchmark, str) or benchmark not in KEYS:
        raise _foreign(path, f"its rows are of no benchmark known here ({', '.join(KEYS)})")
    for field in ("device", "date"):
        if field not in content["environment"]:
            raise _foreign(path, f"its environment has no {field!r}")
    measured = "p50" if benchmark != "memory" else "peak_bytes"
    for number, row in enumerate(rows):
        for field in (*KEYS[benchmark], measured):
            if field not in row or (field != measured and row[field] is None):
                raise _foreign(path, f"row {number} has no {field!r}")
        for field, value in row.items():
            wanted, word = _kind_of(field)
            if value is not None and not isinstance(value, wanted):
                raise _foreign(path, f"{field!r} of row {number} is {value!r}, not {word}")
        row.setdefault("status", "ok")
    settings = content.get("settings", {})
    if not isinstance(settings, dict):
        raise _foreign(path, "its 'settings' are not an object")
    return Record(path.name, benchmark, content["environment"], settings, rows)


def _kind_of(field: str) -> tuple[type | tuple[type, ...], str]:
    """What a field of a row is read as, and that in words."""
    if field in _TEXTS:
        return str, "text"
    return (bool, "true or false") if field in _FLAGS else ((int, float), "a number")


def _of_the_first_files(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the files that knew the CLIP loss alone."""
    named = {_FIRST_NAMES.get(name, name): value for name, value in row.items()}
    baseline = str(named.get("baseline"))
    # their ratio was to open_clip, and is computed anew where it is needed
    named.pop("ratio", None)
    return {**named, "operator": "clip", "baseline": _FIRST_MATMUL.get(baseline, baseline)}


def _foreign(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is not a result of `fastclip bench`: {why}")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, (torch.dtype, torch.device, Path)) else value


@functools.cache  # a file is written anew after each size
def _commit() -> str | None:
    """The checkout's, with "+" where tracked files differ; None of an installed package."""
    root = Path(fastclip.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names) or 1} cores"
