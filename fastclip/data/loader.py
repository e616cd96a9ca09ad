"""Batches in the contract's order, whatever the number of workers.

A batch is never short: a sample that cannot be read is replaced by one that a hash of
(seed, epoch, position) chooses, and the fault is reported with the batch.
"""

import itertools
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastclip.data.augment import Augmentation, apply_view, draw_view
from fastclip.data.index import Fault
from fastclip.data.order import Order, hash64
from fastclip.data.samples import Sample, UnreadableSample

REPLACEMENT_ATTEMPTS = 32

Tokenizer = Callable[[list[str]], Tensor]


class Source(Protocol):
    """Where samples come from: declared counts per shard and random access.

    parts: number of shards of each pattern joined by '::'.
    """

    counts: tuple[int, ...]
    parts: tuple[int, ...]

    def read(self, shard: int, index: int, *, pixels: bool = True) -> Sample: ...

    def drain_faults(self) -> list[Fault]: ...


class TrainingSamples(Dataset[dict[str, Any]]):
    """The sample at (epoch, position), augmented and tokenized; a pure function of both.

    One of a sample's captions is drawn anew each epoch.
    """

    def __init__(
        self, source: Source, order: Order, augmentation: Augmentation, tokenizer: Tokenizer
    ) -> None:
        self.source = source
        self.order = order
        self.augmentation = augmentation
        self.tokenizer = tokenizer

    def __getitem__(self, where: tuple[int, int]) -> dict[str, Any]:
        epoch, position = where
        sample, faults = self._read(epoch, position)
        rng = random.Random(hash64(self.order.seed, epoch, position, 2))
        view = draw_view(self.augmentation, sample.image.width, sample.image.height, rng)
        text = sample.texts[int(rng.random() * len(sample.texts))]
        return {
            "image": apply_view(sample.image, view, self.augmentation.size),
            "text": self.tokenizer([text])[0],
            "key": sample.key,
            "faults": faults,
        }

    def _read(self, epoch: int, position: int) -> tuple[Sample, list[Fault]]:
        faults: list[Fault] = []
        candidate = position
        for attempt in range(REPLACEMENT_ATTEMPTS):
            try:
                sample = self.source.read(*self.order.locate(epoch, candidate))
                return sample, faults + self.source.drain_faults()
            except UnreadableSample as error:
                faults.append(error.fault)
            candidate = hash64(self.order.seed, epoch, position, 3, attempt) % len(self.order)
        raise ValueError(
            f"{REPLACEMENT_ATTEMPTS} samples in a row could not be read, the last: {faults[-1]}; "
            "the data is damaged beyond skipping"
        )


class EvaluationSamples(Dataset[dict[str, Any]]):
    """Every sample once in the source's own order; unreadable ones carry only their fault."""

    def __init__(self, source: Source, preprocess: Callable[[Any], Tensor]) -> None:
        self.source = source
        self.order = Order(source.counts, seed=0, window=0)
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict[str, Any]:
        try:
            sample = self.source.read(*self.order.locate(0, position))
        except UnreadableSample as error:
            return {"faults": [error.fault, *self.source.drain_faults()]}
        return {
            "image": self.preprocess(sample.image),
            "texts": sample.texts,
            "label": sample.label,
            "key": sample.key,
            "faults": self.source.drain_faults(),
        }


class _Positions(Sampler[list[tuple[int, int]]]):
    """One rank's batches of (epoch, position) of one epoch from a given step on.

    The ranks' batches of a step lie side by side: together they are the next positions. Each is
    cut into so many micro-batches.
    """

    def __init__(
        self, batch_size: int, micro_batches: int, steps: int, rank: int, world_size: int
    ) -> None:
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.steps = steps
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.first_step = 0

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.steps):
            first = (step * self.world_size + self.rank) * self.micro_batches
            for number in range(first, first + self.micro_batches):
                start = number * self.batch_size
                yield [(self.epoch, start + i) for i in range(self.batch_size)]


class TrainingLoader:
    """Batches of dictionaries: image (B, 3, S, S) uint8, text (B, L) int64, key, faults.

    Args:
        samples: what to load.
        batch_size: samples of a micro-batch on this rank.
        micro_batches: how many of them make a step.
        epoch_samples: samples an epoch; None for all. What does not fill a batch of all ranks is
            left out, so that every rank makes the same number of steps.
        workers: loader processes; 0 loads in this one.
        rank, world_size: which part of each step's samples is loaded here.

    Attributes:
        identity: seed and hash of the counts, which must be the same for positions to mean the
            same samples.

    Raises:
        ValueError: an epoch does not fill a single batch.
    """

    def __init__(
        self,
        samples: TrainingSamples,
        batch_size: int,
        *,
        micro_batches: int = 1,
        epoch_samples: int | None = None,
        workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        available = len(samples.order)
        length = available if epoch_samples is None else min(epoch_samples, available)
        batch = batch_size * micro_batches * world_size
        self.steps_per_epoch = length // batch
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"an epoch of {length} samples does not fill one batch of {batch}; "
                "lower --batch-size or give more data"
            )
        self.identity = {"seed": samples.order.seed, "counts": hash64(*samples.order.counts)}
        self.micro_batches = micro_batches
        self._positions = _Positions(
            batch_size, micro_batches, self.steps_per_epoch, rank, world_size
        )
        self._loader: DataLoader[dict[str, Any]] = DataLoader(
            samples,
            batch_sampler=self._positions,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=obey_parent_only,
            # DataLoader draws a seed from here each epoch; the global stream must stay the
            # model's alone, or a resumed run would draw other numbers than the first
            generator=torch.Generator(),
        )

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[dict[str, Any]]:
        """The micro-batches of `epoch` from `first_step` on, those of a step in a row."""
        self._positions.epoch = epoch
        self._positions.first_step = first_step
        return iter(self._loader)

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[list[dict[str, Any]]]:
        """The micro-batches of each step of `epoch` from `first_step` on."""
        batches = self.batches(epoch, first_step)
        while step := list(itertools.islice(batches, self.micro_batches)):
            yield step


def obey_parent_only(worker: int) -> None:
    """In a loader process: outlive a signal that is meant to have the run save and stop.

    Launchers and schedulers send it to the whole process group, and a loader that died of it would
    take the run down before it has saved. The training process ends its loaders itself.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # blocked, so that it comes to the thread below, which sees from whom
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=listen, name="signals", daemon=True).start()


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors, keep the rest as lists; samples without an image lend only their faults."""
    readable = [sample for sample in samples if "image" in sample]
    batch: dict[str, Any] = {"faults": [fault for sample in samples for fault in sample["faults"]]}
    if not readable:
        return batch
    for name in readable[0]:
        if name == "faults":
            continue
        values = [sample[name] for sample in readable]
        batch[name] = torch.stack(values) if isinstance(values[0], Tensor) else values
    return batch


class FaultLog:
    """Counts faults by kind, each place once, and keeps the first few of a kind to show."""

    EXAMPLES = 3

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Fault]] = {}
        self._seen: set[tuple[str, str]] = set()

    def add(self, faults: list[Fault]) -> list[Fault]:
        """Count faults; returns those worth printing: the first few new ones of each kind."""
        fresh = []
        for fault in faults:
            if (fault.kind, fault.where) in self._seen:
                continue
            self._seen.add((fault.kind, fault.where))
            self.counts[fault.kind] += 1
            examples = self.examples.setdefault(fault.kind, [])
            if len(examples) < self.EXAMPLES:
                examples.append(fault)
                fresh.append(fault)
        return fresh

    def places(self) -> list[str]:
        """The first few faults of each kind, one text each."""
        return [str(fault) for examples in self.examples.values() for fault in examples]

    def report(self) -> str:
        """The summary, and the places below it."""
        return "\n".join([self.summary(), *self.places()])

    def summary(self) -> str:
        """One line, e.g. "3 corrupt image, 1 cut inside a header"; empty where all was well."""
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
