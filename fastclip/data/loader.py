"""Batches in the contract's order, whatever the number of loader processes."""

import itertools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastclip.data.order import Order, hash64
from fastclip.data.samples import Source, UnreadableSample
from fastclip.data.training_samples import TrainingSamples
from fastclip.data.watchdog import LoaderDiedError, ReadingBoard

# What torch says of a process that has gone; of one that raised it says "Caught ...".
_DIED = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? (?P<processes>[\d, ]+)\) (?:is killed|exited)"
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
        # as they are now: another epoch may be asked for before this one is through
        return self._batches(self.epoch, self.first_step)

    def _batches(self, epoch: int, first_step: int) -> Iterator[list[tuple[int, int]]]:
        for step in range(first_step, self.steps):
            first = (step * self.world_size + self.rank) * self.micro_batches
            for number in range(first, first + self.micro_batches):
                start = number * self.batch_size
                yield [(epoch, start + i) for i in range(self.batch_size)]


class TrainingLoader:
    """Batches of dictionaries.

    images: V tensors (B, 3, S, S) uint8, one a view. params: (B, V, PARAMS) float32, see
    `AugmentationParams.encode`. texts: T tensors (B, L) int64, one a text view. captions: the
    texts themselves. negatives: (B, K, L) int64, where hard negatives are asked for, and
    false_captions, their texts. cut: how many of each sample's texts, negatives included, were
    longer than the tokenizer's context. label: (B,) int64, -1 for none, where labels are asked for.
    group: (B,) int64, the same for duplicates, where groups are asked for.
    teacher_image_features, teacher_text_features: (B, E) float32, where they are asked for.
    key, position: of each sample. index: (B,) int64, its place in the data at any epoch.
    faults: what could not be read on the way. Samples without a tokenizer have nothing of texts.
    Samples without pixels have, instead of images, what `fastclip.data.dali` takes: encoded, all
    files end to end (bytes,) uint8; lengths, of each; draws, of each its V views'.

    Args:
        samples: what to load.
        batch_size: samples of a micro-batch on this rank.
        micro_batches: how many of them make a step.
        epoch_samples: samples an epoch; None for all. What does not fill a batch of all ranks is
            left out, so that every rank makes the same number of steps.
        workers: loader processes; 0 loads in this one.
        pin_memory: have batches in memory that a GPU can fetch from by itself.
        rank, world_size: which part of each step's samples is loaded here.

    Attributes:
        epoch_samples: of the data that an epoch is made of; the last may fill no step.
        identity: seed and hash of the counts, which must be the same for positions to mean the
            same samples.

    Raises:
        ValueError: an epoch does not fill a single batch.

    Examples:
        >>> from fastclip.data.augment import Augmentation
        >>> from fastclip.data.loader import TrainingLoader
        >>> from fastclip.data.order import Order
        >>> from fastclip.data.sources import open_source
        >>> from fastclip.data.training_samples import TrainingSamples
        >>> source = open_source("scenes", split="train", count=100)
        >>> samples = TrainingSamples(source, Order(source.counts, seed=0), Augmentation(32), None)
        >>> loader = TrainingLoader(samples, batch_size=8)
        >>> batch = next(loader.batches(epoch=0))
        >>> loader.steps_per_epoch, batch["images"][0].shape
        (12, torch.Size([8, 3, 32, 32]))
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
        self.epoch_samples = length
        self.samples = samples
        self.samples.board = ReadingBoard(workers)
        self.identity = {"seed": samples.order.seed, "counts": hash64(*samples.order.counts)}
        self.batch_size = batch_size
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
        """The micro-batches of an epoch, those of a step in a row.

        Args:
            epoch: from 0 on.
            first_step: the step of the epoch to begin with.
        """
        self._positions.epoch = epoch
        self._positions.first_step = first_step
        return iter(self._loader)

    def waiting_for(self) -> str:
        """What each loader process is reading now, and since when; empty if none is reading."""
        return self.samples.board.describe(self.samples.source.place)

    @contextmanager
    def reporting_worker_failure(self) -> Iterator[None]:
        """Around everything that the loader may interrupt when one of its processes has died.

        Raises:
            LoaderDiedError: it names the shard that the process was reading.
        """
        try:
            yield
        except RuntimeError as error:
            died = _DIED.match(str(error))
            if died is None:
                raise
            processes = [int(number) for number in re.findall(r"\d+", died["processes"])]
            board, place = self.samples.board, self.samples.source.place
            reading = [text for number in processes if (text := board.describe(place, number))]
            raise LoaderDiedError(
                f"{'; '.join([str(error).splitlines()[0], *reading])}. A process that is killed "
                "has most often used up the memory: lower --workers"
            ) from error

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[list[dict[str, Any]]]:
        """The micro-batches of each step of an epoch.

        Args:
            epoch: from 0 on.
            first_step: the step of the epoch to begin with.
        """
        batches = self.batches(epoch, first_step)
        while step := list(itertools.islice(batches, self.micro_batches)):
            yield step


def evaluation_loader(samples: Dataset[Any], workers: int, **options: Any) -> DataLoader[Any]:
    """Batches in order, for an evaluation in the middle of a run: torch's random state stays as it
    is, and loader processes outlive signals as those of the training do.

    Args:
        samples: see `EvaluationSamples`.
        workers: processes that load; 0 loads in this one.
        options: of `torch.utils.data.DataLoader`: how batches are made.
    """
    return DataLoader(
        samples,
        num_workers=workers,
        worker_init_fn=obey_parent_only,
        generator=torch.Generator(),
        **options,
    )


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


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors, keep the rest as lists; samples without an image lend only their faults.

    A list of tensors becomes a list of stacks; encoded images, which differ in length, are laid end
    to end, their lengths beside them: one piece of shared memory instead of one an image.
    """
    readable = [sample for sample in samples if "key" in sample]
    batch: dict[str, Any] = {"faults": [fault for sample in samples for fault in sample["faults"]]}
    if not readable:
        return batch
    for name, first in readable[0].items():
        values = [sample[name] for sample in readable]
        if name == "encoded":
            batch[name] = torch.cat(values)
            batch["lengths"] = [len(value) for value in values]
        elif isinstance(first, Tensor):
            batch[name] = torch.stack(values)
        elif isinstance(first, list) and first and isinstance(first[0], Tensor):
            batch[name] = [torch.stack(column) for column in zip(*values, strict=True)]
        elif name != "faults":
            batch[name] = values
    return batch
