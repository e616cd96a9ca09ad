"""`fastclip bench all`: every part in turn, a folder of JSON files, and the report of them."""

import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastclip.bench.runner import CannotRunHere
from fastclip.cli.bench.operators import (
    AttentionConfig,
    CollectivesConfig,
    LossConfig,
    MemoryConfig,
)
from fastclip.cli.bench.training import DataConfig, TrainStepConfig
from fastclip.cli.bench.written import ReportConfig

PARTS: dict[str, type[Any]] = {
    "losses": LossConfig,
    "memory": MemoryConfig,
    "train-step": TrainStepConfig,
    "collectives": CollectivesConfig,
    "attention": AttentionConfig,
    "data": DataConfig,
}


@dataclass(frozen=True)
class AllConfig:
    """Measure everything beside its baselines, and write a report with tables and plots.

    Each part runs with the defaults of its own command; with --quick, in minutes on two CPU cores.
    If a part fails, the others still run and the exit status is 1.
    """

    output: Path = Path("bench")
    """Folder for the JSON files and the report."""
    quick: bool = False
    """Small sizes and few rounds: a check that everything works, not a measurement."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure."""

    def run(self) -> int:
        """Run the parts in turn; a part that cannot run here is said and left out."""
        began, written, status = time.monotonic(), [], 0
        for name, part in PARTS.items():
            print(f"\n== {name}, after {time.monotonic() - began:.0f} s", flush=True)
            file = self.output / f"{name}.json"
            before = _changed(file)
            try:
                status |= part(quick=self.quick, device=self.device, output=file).run()
            except ModuleNotFoundError as error:
                print(f"left out: it needs the package {error.name!r}")
            except CannotRunHere as error:
                print(f"left out: {error}")
            except Exception:
                # hours of the other parts are not lost with this one
                traceback.print_exc()
                print(f"{name} failed")
                status = 1
            # one of an earlier run stays where it is, but is not reported as this one's
            if _changed(file) != before:
                written.append(file)
        print(f"\n== report, after {time.monotonic() - began:.0f} s", flush=True)
        return status | ReportConfig(tuple(written), self.output).run()


def _changed(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None
