"""`fastclip study systems|uniclip|cifar10`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.study import cifar10, systems, uniclip


@dataclass(frozen=True)
class Systems:
    """Train every system from its recipe for the embedded scenes, minutes each; one table."""

    only: tuple[str, ...] = systems.SYSTEMS
    """Systems to train; by default all."""
    output: Path = Path("study/systems")
    """Folder for runs and report; runs that are there already are not made again."""
    flags: tuple[str, ...] = ()
    """Flags of `fastclip train` for all runs, e.g. --train-num-samples=2560."""

    def run(self) -> str:
        """The report."""
        return systems.study(self.output, self.only, self.flags)


@dataclass(frozen=True)
class Uniclip:
    """UniCLIP with each of its parts switched off, on the embedded scenes; a table with spreads."""

    seeds: int = 3
    """Runs of each variant."""
    output: Path = Path("study/uniclip")
    """Folder for runs and report; runs that are there already are not made again."""
    flags: tuple[str, ...] = ()
    """Flags of `fastclip train` for all runs."""

    def run(self) -> str:
        """The report."""
        return uniclip.study(self.output, self.seeds, self.flags)


@dataclass(frozen=True)
class Cifar10:
    """CLIP, CLIP-Rocket and UniCLIP on CIFAR-10 in equal training time."""

    data: Annotated[Path, tyro.conf.Positional]
    """Folder that `fastclip convert cifar10` wrote."""
    minutes: float = 5
    """Of training, for each run."""
    seeds: int = 2
    """Runs of each."""
    output: Path = Path("study/cifar10")
    """Folder for runs and report; runs that are there already are not made again."""
    flags: tuple[str, ...] = ()
    """Flags of `fastclip train` for all runs."""

    def run(self) -> str:
        """The report."""
        return cifar10.study(self.data, self.output, self.minutes, self.seeds, self.flags)


Study = (
    Annotated[Systems, tyro.conf.subcommand("systems")]
    | Annotated[Uniclip, tyro.conf.subcommand("uniclip")]
    | Annotated[Cifar10, tyro.conf.subcommand("cifar10")]
)


def main(arguments: Sequence[str]) -> int:
    """Run a study; prints its report."""
    kind: type = Study  # type: ignore[assignment]
    study: Systems | Uniclip | Cifar10 = tyro.cli(kind, args=list(arguments), prog="fastclip study")
    print(study.run())
    print(f"written to {study.output}")
    return 0
