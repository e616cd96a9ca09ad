"""`fastclip study recipe|captions|uniclip|robustness|all|systems|cifar10|global`."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from fastclip.command_line import parse_flags
from fastclip.flags import check_positive
from fastclip.screen import on_screen
from fastclip.study import captions, cifar10, global_loss, recipe, robustness, systems, uniclip
from fastclip.study.question import Question, Settings, answer

QUESTIONS: dict[str, Question] = {
    "recipe": recipe.QUESTION,
    "captions": captions.QUESTION,
    "uniclip": uniclip.QUESTION,
    "robustness": robustness.QUESTION,
}


@dataclass(frozen=True)
class Asked:
    """Flags of a paper's question, asked in miniature."""

    data: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder that `fastclip convert cifar10` wrote. captions and uniclip can do without it: their
    collages are then made of drawn shapes instead of photographs."""
    quick: bool = False
    """One seed and a quarter of the training: takes minutes, gives neither spread nor verdicts."""
    seeds: int | None = None
    """Runs per arm; by default as many as the study was designed for."""
    first_seed: int = 0
    """Seed of the first run of each arm, e.g. 100 for a pilot with other seeds."""
    only: tuple[str, ...] = ()
    """Arms to train, by the labels in the report's table; by default all. A comparison with an arm
    that is not trained gets no verdict."""
    jobs: int = 1
    """Parallel runs; on two cores, two small ones are a quarter faster than one by one."""
    output: Path | None = None
    """Folder for runs and report, by default study/QUESTION; finished runs in it are reused."""
    flags: str = ""
    """Flags of `fastclip train` for all runs, as one word: --flags='--lr 1e-3 --workers 2'."""

    names: ClassVar[tuple[str, ...]]

    def run(self) -> None:
        """Answer; prints the report.

        Raises:
            ValueError: there are no seeds.
        """
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"--seeds is {self.seeds}; give at least 1")
        for name in self.names:
            question = QUESTIONS[name]
            folder = self.output or Path("study", name)
            if self.output and len(self.names) > 1:
                folder = self.output / name
            seeds = self.seeds or (1 if self.quick else question.design.seeds)
            settings = Settings(
                folder,
                self.data,
                range(self.first_seed, self.first_seed + seeds),
                self.jobs,
                self.quick,
                self.only,
                tuple(shlex.split(self.flags)),
            )
            print(on_screen(answer(question, settings)))
            print(f"written to {folder}")


@dataclass(frozen=True)
class Recipe(Asked):
    """CLIP without and with a non-contrastive term, by a basic and by a strong recipe."""

    names = ("recipe",)


@dataclass(frozen=True)
class Captions(Asked):
    """Alt-text, short or dense captions, sentences of these, hard negatives."""

    names = ("captions",)


@dataclass(frozen=True)
class Uniclip(Asked):
    """UniCLIP against CLIP and SLIP, and with each of its parts switched off."""

    names = ("uniclip",)


@dataclass(frozen=True)
class Robustness(Asked):
    """Five possible causes of CLIP's robustness to distribution shift."""

    names = ("robustness",)


@dataclass(frozen=True)
class All(Asked):
    """These four studies, one after another."""

    names = tuple(QUESTIONS)


@dataclass(frozen=True)
class Systems:
    """Train each system with its recipe for the embedded scenes, in minutes each; one table."""

    only: tuple[str, ...] = systems.SYSTEMS
    """Systems to train; by default all."""
    output: Path = Path("study/systems")
    """Folder for runs and report; finished runs in it are reused."""
    flags: str = ""
    """Flags of `fastclip train` for all runs, as one word: --flags='--train-num-samples 2560'."""

    def run(self) -> None:
        """Compare; prints the report."""
        print(on_screen(systems.study(self.output, self.only, shlex.split(self.flags))))
        print(f"written to {self.output}")


@dataclass(frozen=True)
class Cifar10:
    """CLIP, CLIP-Rocket and UniCLIP on CIFAR-10 with equal training time."""

    data: Annotated[Path, tyro.conf.Positional]
    """Folder that `fastclip convert cifar10` wrote."""
    minutes: float = 5
    """Training time of each run in minutes."""
    seeds: int = 2
    """Runs per system."""
    output: Path = Path("study/cifar10")
    """Folder for runs and report; finished runs in it are reused."""
    flags: str = ""
    """Flags of `fastclip train` for all runs, as one word: --flags='--lr 1e-3 --workers 2'."""

    def run(self) -> None:
        """Compare; prints the report."""
        check_positive(self, "seeds", "minutes")
        flags = shlex.split(self.flags)
        found = cifar10.study(self.data, self.output, self.minutes, self.seeds, flags)
        print(on_screen(found))
        print(f"written to {self.output}")


@dataclass(frozen=True)
class Global:
    """Global contrastive losses beside the CLIP loss on CIFAR-10, in small batches."""

    data: Annotated[Path, tyro.conf.Positional]
    """Folder that `fastclip convert cifar10` wrote."""
    epochs: int = 2
    """Epochs of each run."""
    seeds: int = 3
    """Runs per loss."""
    output: Path = Path("study/global")
    """Folder for runs and report; finished runs in it are reused."""
    flags: str = ""
    """Flags of `fastclip train` for all runs, as one word: --flags='--lr 1e-3 --workers 2'."""

    def run(self) -> None:
        """Compare; prints the report."""
        check_positive(self, "seeds", "epochs")
        flags = shlex.split(self.flags)
        found = global_loss.study(self.data, self.output, self.epochs, self.seeds, flags)
        print(on_screen(found))
        print(f"written to {self.output}")


Study = (
    Annotated[Recipe, tyro.conf.subcommand("recipe")]
    | Annotated[Captions, tyro.conf.subcommand("captions")]
    | Annotated[Uniclip, tyro.conf.subcommand("uniclip")]
    | Annotated[Robustness, tyro.conf.subcommand("robustness")]
    | Annotated[All, tyro.conf.subcommand("all")]
    | Annotated[Systems, tyro.conf.subcommand("systems")]
    | Annotated[Cifar10, tyro.conf.subcommand("cifar10")]
    | Annotated[Global, tyro.conf.subcommand("global")]
)


def main(arguments: Sequence[str]) -> int:
    """Run a study; prints its report."""
    parse_flags(Study, arguments, "fastclip study").run()
    return 0
