"""A rank that dies or waits for data without end takes the others with it, and is named.

Collectives cannot tell: NCCL's wait for hours, gloo's fail with the address of a socket. So every
rank has a thread that gives a sign of life through a small store beside the collectives. The first
rank's reads all signs and pronounces a verdict; every thread ends its process when there is one. A
second thread sees to it that the first does not itself wait for a store that no longer answers.
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

from fastclip.train.distributed import DeadRankError, World

EXIT_STATUS = 4
"""Of a run that ended because another rank did, or because data did not come."""

INTERVAL = 1.0
# Ranks that fail together each report their own error; so long a thread holds back.
GRACE = 3.0
# A wait for a batch so long is told, with what the loaders read, and again at twice the time.
SLOW_BATCH = 30.0
# A thread that slept so much longer than it meant to was suspended, with all others perhaps.
SUSPENDED = 5.0
_SYMPTOMS = ("gloo", "nccl", "connection closed", "connection reset", "socket")


@dataclass
class _Wait:
    """A wait for a batch: when it began, what the loader is at, after how long it is told."""

    since: float
    reading: Callable[[], str]
    told_after: float


class Watch:
    """The watch over all ranks of a run; a context manager around everything they do.

    Args:
        world: this process among the others.
        dead_after: seconds without a sign of life after which a rank counts as dead.
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
        """Around the wait for a batch; `reading` tells what the loader is at, for messages."""
        self._wait = _Wait(time.monotonic(), reading, min(SLOW_BATCH, self.data_within / 2))
        try:
            yield
        finally:
            self._wait = None

    def __enter__(self) -> "Watch":
        # before the first exchange, so that a rank that dies early has a place
        self._sign(0)
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
            # signs go on until all have come here
            self.world.barrier()
        if self._store is None or error is None:
            self._close()
            return
        if _is_symptom(error):
            verdict = self._await_verdict()
            if self.world.is_first:
                # the store goes with this process, and the others have yet to read the verdict
                time.sleep(GRACE)
            self._close()
            raise DeadRankError(f"{verdict} (here: {str(error).splitlines()[0]})") from error
        self._close()
        if not isinstance(error, KeyboardInterrupt):
            # the others may fail alike, each with its own message: theirs come first
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            with contextlib.suppress(RuntimeError):
                self._store.set("verdict", f"rank {self.world.rank} failed: {text}")

    def _open_store(self) -> dist.TCPStore:
        port = 0
        store = None
        wait = timedelta(seconds=self.dead_after)
        # launchers tell the address at which all ranks reach the first
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
                    "rank 0, which keeps the watch, has given no sign of life for "
                    f"{self.dead_after:.0f} s (--dead-rank-timeout)"
                )

    def _look_at_wait(self, wait: "_Wait", now: float, slept: float) -> None:
        """Tell of a wait for a batch that is long, and end the run for one that is too long."""
        wait.since += slept
        seconds = now - wait.since
        if seconds <= min(self.data_within, wait.told_after):
            return
        waited = f"rank {self.world.rank} ({_place()}) has waited {seconds:.0f} s for a batch"
        reading = wait.reading() or "no process is reading"
        if seconds > self.data_within:
            self._pronounce(
                f"{waited}: its loader hangs, or storage does not answer (--data-timeout); "
                f"{reading}"
            )
        else:
            print(f"note: {waited}; {reading}", file=sys.stderr, flush=True)
            wait.told_after *= 2

    def _beat(self) -> None:
        """Give signs of life and read the verdict; the first rank looks after the others."""
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
                self._sign(beats)
                if self.world.is_first:
                    self._look(seen, now)
                verdict = self._verdict()
            except RuntimeError:
                verdict = self._read or "rank 0, which keeps the watch, has ended"
            self._last_round = time.monotonic()
            if verdict is not None:
                self._end(verdict)

    def _sign(self, beats: int) -> None:
        if self._store is not None:
            self._store.set(f"sign/{self.world.rank}", json.dumps([_place(), beats]))

    def _look(self, seen: dict[int, tuple[str, float]], now: float) -> None:
        """Note which ranks gave a new sign; pronounce one dead that has not for too long."""
        assert self._store is not None
        for rank in range(1, self.world.size):
            key = f"sign/{rank}"
            sign = self._store.get(key).decode() if self._store.check([key]) else ""
            if rank not in seen or seen[rank][0] != sign:
                seen[rank] = sign, now
            elif now - seen[rank][1] > self.dead_after:
                place = f" ({json.loads(sign)[0]})" if sign else ""
                self._pronounce(
                    f"rank {rank}{place} has given no sign of life for {self.dead_after:.0f} s "
                    "(--dead-rank-timeout)"
                )

    def _pronounce(self, verdict: str) -> None:
        if self._store is None:
            self._end(verdict)
        elif self._verdict() is None:
            self._store.set("verdict", verdict)

    def _verdict(self) -> str | None:
        assert self._store is not None
        # kept: the store goes with the first rank, which may end before this one has said it
        if self._read is None and self._store.check(["verdict"]):
            self._read = self._store.get("verdict").decode()
        return self._read

    def _await_verdict(self) -> str:
        """The verdict on who ended, when this rank's collective has failed of it."""
        deadline = time.monotonic() + self.dead_after + 5 * INTERVAL
        while time.monotonic() < deadline:
            try:
                verdict = self._verdict()
            except RuntimeError:
                return "rank 0, which keeps the watch, has ended"
            if verdict is not None:
                return verdict
            time.sleep(INTERVAL / 5)
        return "an exchange between the ranks failed, though all give signs of life"

    def _end(self, verdict: str) -> None:
        if self._closing.wait(GRACE):
            return
        print(f"fastclip train: stopped: {verdict}", file=sys.stderr, flush=True)
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
