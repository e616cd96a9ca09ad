"""Being asked to stop: the run saves after the step under way and says so by its exit status."""

import os
import signal
import threading
from types import FrameType, TracebackType

EXIT_STATUS = 75
"""Of a run that was asked to stop and saved: EX_TEMPFAIL, "try again" (--resume latest)."""


class StoppedError(RuntimeError):
    """The run was asked to stop and has saved a checkpoint."""


class StopSignals:
    """Within the block SIGTERM and SIGUSR1 (which SLURM sends ahead of a time limit) are noted.

    A second one ends the process as if nobody listened. Outside the main thread Python hears no
    signals, and nothing is noted.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

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
        if self.received is not None or os.getpid() != self._process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number)
