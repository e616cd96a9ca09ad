"""Signals in processes that load data, for training and evaluation alike."""

import os
import signal
import threading


def obey_parent_only(worker: int) -> None:
    """In a loader process: outlive a signal that is meant to have the run save and stop, but not
    the training process, even where a read hangs.

    Launchers and schedulers send it to the whole process group, and a loader that died of it would
    take the run down before it has saved. The training process ends its loaders itself.
    """
    if not hasattr(signal, "sigtimedwait"):
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # blocked, so that it comes to the thread below, which sees from whom
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def listen() -> None:
        while os.getppid() == parent:
            sent = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if sent is not None and sent.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=listen, name="signals", daemon=True).start()
