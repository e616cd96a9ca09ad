"""When a rank dies or waits for data without end, the others end too and report which one failed.

Collectives do not report it: NCCL's wait for hours, gloo's fail with the address of a socket. So
every rank has a thread that sends a heartbeat through a small store beside the collectives. The
first rank's reads all heartbeats and declares a failure with its reason; every thread then ends its
process. A second thread makes sure that the first does not itself wait for a store that no longer
answers.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from fastclip.messages import logger
from fastclip.train.distributed import DeadRankError, World

EXIT_STATUS = 4
"""Of a run that ended because another rank did, or because data did not come."""

INTERVAL = 1.0
# Ranks that fail together each report their own error; so long a thread holds back.
GRACE = 3.0
# A wait for a batch so long is reported, with what the loaders read, and again at twice the time.
SLOW_BATCH = 30.0
# A thread that slept so much longer than it meant to was suspended, with all others perhaps.
SUSPENDED = 5.0
_SYMPTOMS = ("gloo", "nccl", "connection closed", "connection reset", "socket")


@dataclass
class _Wait:
    """A wait for a batch: when it began, what the loader is at, after how long it is reported."""

    since: float
    reading: Callable[[], str]
    report_after: float


class Watch:
    """The watch over all ranks of a run; a context manager around everything they do.

    Args:
        world: this process among the others.
        dead_after: seconds without a heartbeat after which a rank counts as dead.
        data_within: seconds that a rank may wait for its next batch.
    """

    def __init__(self, world: World, *, dead_after: float, data_within: float) -> None:
        self.world, self.dead_after, self.data_within = world, dead_after, data_within
        self._wait: _Wait | None = None
        self._read: str | None = None
        self._last_round = time.monotonic()
        self._closing = threading.Event()
        self._store = self._open_store() if world.size > 1 else None
        self._threads = [
            threading.Thread(target=target, name=target.__name__, daemon=True)
            for target in ([self._guard] if self._store is None else [self._guard, self._beat])
        ]

    @contextlib.contextmanager
    def waiting_for_data(self, reading: Callable[[], str]) -> Iterator[None]:
        """Around the wait for a batch; `reading` says what the loader is at, for messages."""
        self._wait = _Wait(time.monotonic(), reading, min(SLOW_BATCH, self.data_within / 2))
        try:
            yield
        finally:
            self._wait = None

    def __enter__(self) -> "Watch":
        # before the first exchange, so that a rank that dies early has a place
        self._send_heartbeat(0)
        self._last_round = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            # heartbeats continue until all have come here
            self.world.barrier()
        if self._store is None or error is None:
            self._close()
            return
        if _is_symptom(error):
            reason = self._await_reason()
            if self.world.is_first:
                # the store goes with this process, and the others have yet to read the reason
                time.sleep(GRACE)
            self._close()
            raise DeadRankError(f"{reason} (here: {str(error).splitlines()[0]})") from error
        self._close()
        if not isinstance(error, KeyboardInterrupt):
            # the others may fail alike, each with its own message: theirs come first
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            with contextlib.suppress(RuntimeError):
                self._store.set("failure", f"rank {self.world.rank} failed: {text}")

    def _open_store(self) -> dist.TCPStore:
        port = 0
        store = None
        wait = timedelta(seconds=self.dead_after)
        # launchers set the address at which all ranks reach the first
        host = os.environ.get("MASTER_ADDR", "localhost")
        if self.world.is_first:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
            port = store.port
        port = self.world.gather(port)[0]
        if store is None:
            store = dist.TCPStore(host, port, is_master=False, timeout=wait)
        return store

    def _close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=2 * INTERVAL)

    def _guard(self) -> None:
        """Look at this process alone: the wait for a batch, and the store's answers."""
        before = time.monotonic()
        while not self._closing.wait(INTERVAL):
            now = time.monotonic()
            slept, before = now - before, now
            if slept > SUSPENDED:
                # time in which nothing ran counts for nothing
                self._last_round = now
            # another may begin at any time; this one then changes nothing any more
            wait = self._wait
            if wait is not None:
                self._look_at_wait(wait, now, slept if slept > SUSPENDED else 0.0)
            if self._store is not None and now - self._last_round > self.dead_after:
                self._end(
                    "rank 0, which keeps the watch, has sent no heartbeat for "
                    f"{self.dead_after:.0f} s (--dead-rank-timeout)"
                )

    def _look_at_wait(self, wait: "_Wait", now: float, slept: float) -> None:
        """Report a wait for a batch that is long, and end the run for one that is too long."""
        wait.since += slept
        seconds = now - wait.since
        if seconds <= min(self.data_within, wait.report_after):
            return
        waited = f"rank {self.world.rank} ({_place()}) has waited {seconds:.0f} s for a batch"
        reading = wait.reading() or "no process is reading"
        if seconds > self.data_within:
            self._declare(
                f"{waited}: its loader hangs, or storage does not answer (--data-timeout); "
                f"{reading}"
            )
        else:
            logger.warning(f"note: {waited}; {reading}")
            wait.report_after *= 2

    def _beat(self) -> None:
        """Send heartbeats and read whether one failed; the first rank checks the others."""
        beats = 0
        seen: dict[int, tuple[str, float]] = {}
        before = time.monotonic()
        while not self._closing.wait(INTERVAL):
            beats += 1
            now = time.monotonic()
            if now - before > SUSPENDED:
                seen.clear()
            before = now
            try:
                self._send_heartbeat(beats)
                if self.world.is_first:
                    self._check_heartbeats(seen, now)
                reason = self._failure()
            except RuntimeError:
                reason = self._read or "rank 0, which keeps the watch, has ended"
            self._last_round = time.monotonic()
            if reason is not None:
                self._end(reason)

    def _send_heartbeat(self, beats: int) -> None:
        if self._store is not None:
            self._store.set(f"heartbeat/{self.world.rank}", json.dumps([_place(), beats]))

    def _check_heartbeats(self, seen: dict[int, tuple[str, float]], now: float) -> None:
        """Note which ranks sent a new heartbeat; declare one dead that has not for too long."""
        assert self._store is not None
        for rank in range(1, self.world.size):
            key = f"heartbeat/{rank}"
            beat = self._store.get(key).decode() if self._store.check([key]) else ""
            if rank not in seen or seen[rank][0] != beat:
                seen[rank] = beat, now
            elif now - seen[rank][1] > self.dead_after:
                place = f" ({json.loads(beat)[0]})" if beat else ""
                self._declare(
                    f"rank {rank}{place} has sent no heartbeat for {self.dead_after:.0f} s "
                    "(--dead-rank-timeout)"
                )

    def _declare(self, reason: str) -> None:
        if self._store is None:
            self._end(reason)
        elif self._failure() is None:
            self._store.set("failure", reason)

    def _failure(self) -> str | None:
        assert self._store is not None
        # kept: the store goes with the first rank, which may end before this one has printed it
        if self._read is None and self._store.check(["failure"]):
            self._read = self._store.get("failure").decode()
        return self._read

    def _await_reason(self) -> str:
        """Why another rank ended, when this rank's collective has failed because of it."""
        deadline = time.monotonic() + self.dead_after + 5 * INTERVAL
        while time.monotonic() < deadline:
            try:
                reason = self._failure()
            except RuntimeError:
                return "rank 0, which keeps the watch, has ended"
            if reason is not None:
                return reason
            time.sleep(INTERVAL / 5)
        return "an exchange between the ranks failed, though all send heartbeats"

    def _end(self, reason: str) -> None:
        if self._closing.wait(GRACE):
            return
        # not through the logger, whose lock a hanging thread may hold
        print(f"fastclip train: stopped: {reason}", file=sys.stderr, flush=True)
        # the main thread may hang inside a collective or a read: no exception reaches it
        os._exit(EXIT_STATUS)


def _place() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"


def _is_symptom(error: BaseException) -> bool:
    """Whether a collective failed, of another rank's end perhaps; gloo's errors have no type."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return type(error) is RuntimeError and any(word in text for word in _SYMPTOMS)
