"""Being asked to stop: the run saves after the step under way and says so by its exit status.

SIGTERM and SIGUSR1 (which SLURM sends ahead of a time limit) ask for it, and Ctrl-C in a terminal.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TypeVar

EXIT_STATUS = 75
"""Of a run that was asked to stop and saved: EX_TEMPFAIL, "try again" (--resume latest)."""

Result = TypeVar("Result")


class StoppedError(RuntimeError):
    """The run was asked to stop and has saved a checkpoint."""


class _SignalReceived(BaseException):
    """Raised by the handler, as KeyboardInterrupt is."""


class StopSignals:
    """Within the block the three are noted, SIGINT (Ctrl-C) once training has begun.

    A second one ends the process as if nobody listened. Outside the main thread Python hears no
    signals, and nothing is noted.

    Attributes:
        received: the signal that was noted.
        training: whether there is something to save; before that Ctrl-C interrupts.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.training = False
        self._at_once = False

    def at_once(self, action: Callable[[], Result]) -> Result | None:
        """Do what a resumed run does again; the first signal ends it.

        Returns:
            What the action returns; None after a signal, which is noted as always.
        """
        try:
            # inside: a signal may come as soon as this is set
            self._at_once = True
            return action()
        except _SignalReceived:
            return None
        finally:
            self._at_once = False

    def __enter__(self) -> "StopSignals":
        self._process = os.getpid()
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # loader processes inherit the handler, and must die when asked to
        elsewhere = os.getpid() != self._process
        if elsewhere and number == signal.SIGINT:
            # the terminal sends it to all; the training process decides
            return
        if self.received is not None or elsewhere:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if number == signal.SIGINT:
            if not self.training:
                raise KeyboardInterrupt
            # the step under way may be long; a handler may write, but not log
            if os.environ.get("RANK", "0") == "0" and not self._at_once:
                os.write(
                    2, b"\nstopping: the run saves after this step; Ctrl-C again ends it now\n"
                )
        self.received = signal.Signals(number)
        if self._at_once:
            raise _SignalReceived
