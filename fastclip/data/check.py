"""Checking shards before they are trained on: every header, every image, every caption.

A shard's count in `sizes.json` is the number of samples that `ShardSource` indexes, since the order
of training rests on it. Samples whose image or caption turns out to be unreadable stay in that
count: training replaces each by another, and the report says how many they are. The index for
NVIDIA DALI's reader, which cannot pass over a sample, lists the good ones only.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from fastclip.atomic import write_text
from fastclip.data.counts import declared_counts
from fastclip.data.index import Fault, dali_line, index_file
from fastclip.data.remote import FetchError, ShardCache, is_remote
from fastclip.data.samples import SampleReader
from fastclip.data.shards import open_shard
from fastclip.data.writing import add_sizes
from fastclip.printable import printable_line

PLACES_SHOWN = 3
# A shard is cut into parts of about so many bytes, so that a large one keeps all processes busy.
PART_BYTES = 64 << 20

# bytes that all processes have read so far
_done: Any = None


@dataclass
class Report:
    """What a check found.

    samples: as many as training counts. good: those that it can read. bytes: of all shards that
    were opened. counts: faults of each kind. places: of the first few. written: paths of files.
    """

    shards: int = 0
    samples: int = 0
    good: int = 0
    bytes: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)

    def add(self, fault: Fault, count: int = 1) -> None:
        """Count a fault, or so many of its kind of which it is the next; keep the first places."""
        self.counts[fault.kind] += count
        places = self.places.setdefault(fault.kind, [])
        if len(places) < PLACES_SHOWN:
            places.append(printable_line(fault.place))

    def merge(self, later: "Report") -> None:
        """Add what was found in later shards."""
        self.samples += later.samples
        self.good += later.good
        self.bytes += later.bytes
        self.counts += later.counts
        for kind, places in later.places.items():
            mine = self.places.setdefault(kind, [])
            mine.extend(places[: PLACES_SHOWN - len(mine)])


class _Task(NamedTuple):
    """One of a shard's parts, which hold the same number of its samples."""

    name: str
    part: int
    parts: int
    reader: SampleReader
    cache: ShardCache


@dataclass
class _Found:
    """What came of a task; that of a shard's first part reports on the whole shard as well.

    indexed: samples of the shard, None in other parts and where it could not be read. hashes: 64
    bits for each of their keys. lines: of DALI's index, one for each good sample of the part.
    """

    report: Report = field(default_factory=Report)
    indexed: int | None = None
    hashes: bytes = b""
    lines: list[str] = field(default_factory=list)


def check_shards(
    names: Sequence[str],
    reader: SampleReader | None = None,
    cache: ShardCache | None = None,
    *,
    workers: int = 1,
    write: bool = True,
    progress: bool = False,
) -> Report:
    """Read all of the given shards, in so many processes.

    Memory grows by 8 bytes a sample, by 32 when keys are compared at the end.

    Args:
        names: paths and URLs, as `expand_shards` gives them; one that comes twice is read once.
        reader: of the kind that will read them; by default one for images with a text.
        cache: where remote shards are fetched to.
        write: put the counts into `sizes.json` and the good samples into NAME.idx, beside the
            shards that are local, unless there is no good sample at all.
        progress: show a bar.

    Raises:
        ValueError: there are no names or no workers, or `sizes.json` or `_stats.json` is damaged.
        OSError: a shard's size cannot be read, a file cannot be written, or a process died.
    """
    if not names or workers < 1:
        raise ValueError(f"{len(names)} shards and --workers {workers}: give at least one of each")
    start = time.monotonic()
    names = list(dict.fromkeys(names))
    reader, cache = reader or SampleReader(("txt",)), cache or ShardCache()
    sizes = {name: os.path.getsize(name) for name in names if not is_remote(name)}
    declared = declared_counts(list(sizes))
    tasks = []
    for name in names:
        parts = sizes.get(name, 0) // PART_BYTES + 1
        tasks.append([_Task(name, part, parts, reader, cache) for part in range(parts)])
    report = Report(shards=len(names))
    counts: dict[Path, dict[str, int]] = {}
    hashes = []
    # how much remote shards hold is not known before they are fetched
    total = sum(sizes.values()) if len(sizes) == len(names) else None
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for name, found in zip(names, _run(tasks, workers, bar), strict=True):
            for each in found:
                report.merge(each.report)
            hashes.append(np.frombuffer(found[0].hashes, np.uint64))
            indexed, count = found[0].indexed, declared.get(name)
            if indexed is None:
                continue
            if count is not None and count != indexed:
                kind = f"{'fewer' if indexed < count else 'more'} samples than declared"
                report.add(Fault(kind, name, f"{indexed:,} readable, {count:,} declared"))
            if write and name in sizes:
                counts.setdefault(Path(name).parent, {})[Path(name).name] = indexed
                if lines := [line for each in found for line in each.lines]:
                    path = Path(name.removesuffix(".tar") + ".idx")
                    write_text(path, "\n".join([f"v1.2 {len(lines)}", *lines, ""]))
                    report.written.append(str(path))
    _add_duplicates(report, tasks, hashes)
    for folder, of_folder in counts.items() if report.good else ():
        add_sizes(folder, of_folder)
        report.written.append(str(folder / "sizes.json"))
    report.seconds = time.monotonic() - start
    return report


def _run(tasks: list[list[_Task]], workers: int, bar: Any) -> Iterator[list[_Found]]:
    """What comes of each shard's tasks, in order, while the bar is kept moving."""
    done = multiprocessing.Value("d")
    with ProcessPoolExecutor(workers, initializer=_begin, initargs=(done,)) as pool:
        # taken off the list one by one, so that what they found is not kept
        waiting = deque([pool.submit(_check_part, task) for task in shard] for shard in tasks)
        try:
            while waiting:
                unfinished = set(shard := waiting.popleft())
                while unfinished:
                    _, unfinished = wait(unfinished, timeout=0.2)
                    bar.update(int(done.value) - bar.n)
                yield [future.result() for future in shard]
        except BrokenProcessPool as error:
            place = tasks[-len(waiting) - 1][0].name
            raise ChildProcessError(
                f"a process died at {place} or soon behind it; if memory is short, lower --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(done: Any) -> None:
    """In a new process: where to count bytes; Ctrl-C and a kill are for the first process."""
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def _check_part(task: _Task) -> _Found:
    found = _Found()
    try:
        with open_shard(task.name, task.cache) as file:
            _check_file(task, file, found)
    except OSError as error:
        if task.part == 0:
            kind = "shard not fetched" if isinstance(error, FetchError) else "shard not readable"
            found.report.add(Fault(kind, task.name, str(error)))
    return found


def _check_file(task: _Task, file: BinaryIO, found: _Found) -> None:
    report, size = found.report, os.fstat(file.fileno()).st_size
    index = index_file(file, task.name, task.reader.required)
    count = len(index.samples)
    if task.part == 0:
        found.indexed, report.samples, report.bytes = count, count, size
        keys = (key.encode() for key, _ in index.samples)
        found.hashes = b"".join(blake2b(key, digest_size=8).digest() for key in keys)
        for fault in index.faults:
            report.add(fault, 0)
        report.counts.update(index.counts)
    first, last = (count * part // task.parts for part in (task.part, task.part + 1))
    for key, files in index.samples[first:last]:
        faults, readable = task.reader.check(file, key, files, f"{task.name}:{key}")
        for fault in faults:
            report.add(fault)
        if readable:
            report.good += 1
            found.lines.append(dali_line(key, files))
        with _done.get_lock():
            _done.value += size / count


def _add_duplicates(report: Report, tasks: list[list[_Task]], hashes: list[Any]) -> None:
    """Count the samples whose key an earlier shard has, and name the first of them."""
    together = np.concatenate(hashes)
    order = np.argsort(together, kind="stable")
    again = order[1:][np.diff(together[order]) == 0]
    ends = np.cumsum([len(each) for each in hashes])
    for number, place in enumerate(np.sort(again)[:PLACES_SHOWN].tolist()):
        earlier = np.flatnonzero(together == together[place])[0]
        shard, other = np.searchsorted(ends, (place, earlier), side="right").tolist()
        task, original = tasks[shard][0], tasks[other][0].name
        with open_shard(task.name, task.cache) as file:
            key, _ = index_file(file, task.name, task.reader.required).samples[place - ends[shard]]
        fault = Fault("key of an earlier shard", f"{task.name}:{key}", f"as in {original}")
        # the first stands for all
        report.add(fault, 0 if number else len(again))
