"""Processes of their own, forked from one that has imported what they need.

A new interpreter imports for seconds before it does anything, and some tests start a dozen. What is
tested of launchers and of new interpreters starts one all the same.
"""

import atexit
import contextlib
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastclip.cli import main

ROOT = Path(__file__).parents[1]
# one list for all tests: the first of a session starts the process that imports
PRELOADED = ["tests.preloaded", "tests.processes"]


class Forked:
    """A process under way, with what tests use of `subprocess.Popen`'s.

    Args:
        target: a function of a module; what it returns is the exit status.
        arguments: of `target`.
        environment: in addition to this process's.
        own_group: whether it leads a process group, of its children.
    """

    def __init__(
        self,
        target: Callable[..., int | None],
        *arguments: Any,
        environment: dict[str, str] | None = None,
        own_group: bool = False,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._output, self._errors = (
            # removed with this
            tempfile.NamedTemporaryFile("r", prefix="fastclip-", errors="replace")  # noqa: SIM115
            for _ in range(2)
        )
        outputs = self._output.name, self._errors.name
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self._process = context.Process(
            target=_call, args=(target, arguments, surroundings, own_group, outputs)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative the signal that ended it; None while it is under way."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def output(self) -> str:
        """What it has written so far on standard output."""
        self._output.seek(0)
        return self._output.read()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; the exit status."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; what was written on standard output and on standard error."""
        self.wait(timeout)
        self._errors.seek(0)
        return self.output(), self._errors.read()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, where it is under way."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def _call(
    target: Callable[..., int | None],
    arguments: Sequence[Any],
    environment: dict[str, str],
    own_group: bool,
    outputs: tuple[str, str],
) -> None:
    if own_group:
        os.setsid()
    for number, path in enumerate(outputs, start=1):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    os.chdir(ROOT)
    _settle(environment)
    sys.exit(target(*arguments))


def _settle(environment: dict[str, str]) -> None:
    """As a new process would be in this environment, which is not that of the imports."""
    # Python makes the method by which this process was started its own default
    multiprocessing.set_start_method(None, force=True)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)


def start_command(*arguments: str, **options: Any) -> Forked:
    """Start `fastclip COMMAND ...`; options are `Forked`'s."""
    return Forked(main, list(arguments), **options)


def free_port() -> int:
    """A port that nobody has, outside those that systems give out by themselves.

    One of those could be taken by any connection before it is used.
    """
    while True:
        # of the system's own, which no test seeds
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port


def start_ranks(count: int, target: Callable[..., int | None], *arguments: Any) -> list[Forked]:
    """Ranks on this machine without a launcher, which would end all where one dies."""
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    # what DeepSpeed's launcher says besides, and what it would find on a CPU
    where |= {"LOCAL_SIZE": str(count), "DS_ACCELERATOR": "cpu"}
    return [
        Forked(target, *arguments, environment={**where, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(count)
    ]


def finish(ranks: Sequence[Forked], timeout: float = 300) -> str:
    """Wait for the end of all, which must be well; what they wrote on standard error."""
    try:
        errors = [rank.communicate(timeout)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n".join(errors)[-4000:]
    return "".join(errors)


def train_pair(*flags: str) -> str:
    """`fastclip train` on two ranks; what they wrote on standard error."""
    return finish(start_ranks(2, main, ["train", *flags]))


def on_ranks(work: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """`work(rank, *arguments)` on so many processes at once; the first failure is raised."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        _rank, (dict(os.environ), work, arguments), nprocs=ranks, start_method="forkserver"
    )


def _rank(
    rank: int, environment: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    _settle(environment)
    work(rank, *arguments)


def run_script(*words: str) -> None:
    """As `python SCRIPT ARGUMENT ...`."""
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


def main_without(package: str, arguments: Sequence[str]) -> int:
    """The command line as where a package is not installed."""
    sys.modules[package] = None  # type: ignore[assignment]
    return main(arguments)


@atexit.register
def _leave_none() -> None:
    """Of a test that failed: Python waits for its children, and one may never end."""
    for process in multiprocessing.active_children():
        process.kill()
