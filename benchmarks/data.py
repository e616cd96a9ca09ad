"""Loading beside its baselines: images a second from shards to batches of views.

Every loader reads the same shards with the same number of processes or threads, and runs through
an epoch in turn with the others, round after round, from the request to the last batch; nothing
of one is under way while another is measured.

    strong  two views each of CLIP-Rocket's strong augmentation
    plain   one view: open_clip's own augmentation, a crop of 90 % or more
"""

import math
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastclip.bench.runner import quantile
from fastclip.data.augment import Augmentation
from fastclip.data.index import dali_line, index_shard
from fastclip.data.loader import TrainingLoader
from fastclip.data.order import Order
from fastclip.data.remote import is_remote
from fastclip.data.samples import Sample
from fastclip.data.shards import ShardSource
from fastclip.data.training_samples import TrainingSamples
from fastclip.data.writing import write_shards

Epoch = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class DataSettings:
    """What is loaded, and how.

    Attributes:
        shards: see `fastclip.data.shards.expand_shards`; the baselines take local files only.
        size: side of the views, in pixels.
        batch_size: images of a batch.
        workers: loader processes, or DALI's threads.
        rounds: epochs of each loader that count; one more goes before.
        device: where DALI makes views.
    """

    shards: str
    size: int = 224
    batch_size: int = 64
    workers: int = 2
    rounds: int = 5
    device: str = "cpu"


@dataclass
class DataRow:
    """Images a second of one loader: the 20th, 50th and 80th percentile of the rounds."""

    task: str
    loader: str
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    ratio: float | None = None
    """This median over that of fastclip's own loader for this task and device."""
    status: str = "ok"


def run(settings: DataSettings, add: Callable[[list[DataRow]], None]) -> list[DataRow]:
    """Measure all loaders that are installed, a task's in turn; `add` receives each task's."""
    source = ShardSource(settings.shards)
    if any(map(is_remote, source.names)):
        raise ValueError(
            f"{settings.shards}: the baselines read local files only; fetch them first"
        )
    if sum(source.counts) < settings.batch_size:
        raise ValueError(
            f"{settings.shards} holds {sum(source.counts)} samples, less than a batch of "
            f"{settings.batch_size}; give more, or lower --batch-size"
        )
    rows: list[DataRow] = []
    for task in dict.fromkeys(task for task, _ in LOADERS):
        found = _measure(task, settings, source)
        rows += found
        add(found)
    return rows


def _measure(task: str, settings: DataSettings, source: ShardSource) -> list[DataRow]:
    rows: list[DataRow] = []
    epochs: list[tuple[DataRow, Epoch]] = []
    for name, build in ((name, build) for (t, name), build in LOADERS.items() if t == task):
        row = DataRow(task, name)
        rows.append(row)
        try:
            epoch = build(settings, source)
            _load(epoch(), settings.device)
        except ImportError as error:
            row.status = f"not installed: {error.name}"
            continue
        # whatever a baseline makes of these shards, the others are measured
        except Exception as error:
            if name.startswith("fastclip"):
                raise
            row.status = f"failed: {str(error).strip().splitlines()[-1]}"[:80]
            continue
        epochs.append((row, epoch))
    rates: dict[str, list[float]] = {row.loader: [] for row in rows}
    for _ in range(settings.rounds):
        for row, epoch in epochs:
            started = time.perf_counter()
            images = _load(epoch(), settings.device)
            rate = images / (time.perf_counter() - started)
            rates[row.loader].append(rate)
    for row, _ in epochs:
        found = rates[row.loader]
        row.p20, row.p50, row.p80 = (quantile(found, q) for q in (0.2, 0.5, 0.8))
    (own,) = (row for row in rows if row.loader == OWN)
    for row in rows:
        if row.p50 is not None and own.p50 is not None:
            row.ratio = row.p50 / own.p50
    return rows


OWN = "fastclip, torchvision"


def _load(batches: Iterator[Any], device: str) -> int:
    """Load an epoch to its end, views on the device; how many images it had."""
    count = 0
    for batch in batches:
        texts, views = batch if isinstance(batch, tuple) else (batch["texts"][0], batch["images"])
        count += len(texts)
        if device != "cpu":
            for view in views:
                view.to(device, non_blocking=True)
    if device != "cpu":
        torch.cuda.synchronize(device)
    if count == 0:
        raise RuntimeError("a loader gave no image at all")
    return count


def _views(task: str, size: int) -> tuple[Augmentation, ...]:
    return (Augmentation(size),) if task == "plain" else (Augmentation.strong(size),) * 2


def _tokenizer() -> Callable[[list[str]], Tensor]:
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer: Callable[[list[str]], Tensor] = SimpleTokenizer()
    return tokenizer


def _host(task: str) -> Callable[[DataSettings, ShardSource], Epoch]:
    def build(settings: DataSettings, source: ShardSource) -> Epoch:
        order = Order(source.counts, seed=0)
        samples = TrainingSamples(source, order, _views(task, settings.size), _tokenizer())
        pinned = settings.device != "cpu"
        loader = TrainingLoader(
            samples, settings.batch_size, workers=settings.workers, pin_memory=pinned
        )
        return lambda: loader.batches(0)

    return build


def _dali(task: str) -> Callable[[DataSettings, ShardSource], Epoch]:
    def build(settings: DataSettings, source: ShardSource) -> Epoch:
        from fastclip.data.dali import DaliLoader

        order = Order(source.counts, seed=0)
        views = _views(task, settings.size)
        samples = TrainingSamples(source, order, views, _tokenizer(), pixels=False)
        # on a GPU one process cannot read fast enough
        workers = 0 if settings.device == "cpu" else settings.workers
        loader = DaliLoader(
            samples,
            settings.batch_size,
            workers=workers,
            device=settings.device,
            threads=settings.workers,
        )
        return lambda: loader.batches(0)

    return build


def _dali_reader(settings: DataSettings, source: ShardSource) -> Epoch:
    """DALI's own webdataset reader, with a crop that DALI draws."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import feed_ndarray

    folder = tempfile.TemporaryDirectory(prefix="fastclip-bench-")
    indexes = []
    for number, name in enumerate(source.names):
        samples = index_shard(Path(name), ("txt",)).samples
        lines = [f"v1.2 {len(samples)}", *(dali_line(*sample) for sample in samples)]
        indexes.append(Path(folder.name) / f"{number}.idx")
        indexes[-1].write_text("\n".join(lines) + "\n")
    on_gpu = settings.device != "cpu"

    @pipeline_def(
        batch_size=settings.batch_size,
        num_threads=settings.workers,
        device_id=(torch.device(settings.device).index or 0) if on_gpu else None,
        prefetch_queue_depth=1,
        seed=0,
    )
    def graph() -> Any:
        encoded, text = fn.readers.webdataset(
            paths=source.names,
            index_paths=[str(index) for index in indexes],
            ext=["jpg", "txt"],
            random_shuffle=True,
            name="reader",
        )
        images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu")
        views = fn.random_resized_crop(
            images,
            size=settings.size,
            random_area=(0.9, 1.0),
            interp_type=types.INTERP_CUBIC,
            antialias=True,
        )
        return views, text

    pipeline = graph()
    pipeline.build()
    batches, tokenizer = sum(source.counts) // settings.batch_size, _tokenizer()

    def epoch() -> Iterator[Any]:
        # scheduled one by one: run() would continue with what comes after the epoch
        pipeline.schedule_run()
        for number in range(batches):
            if number + 1 < batches:
                pipeline.schedule_run()
            shown, text = pipeline.share_outputs()
            views = torch.empty(
                shown.as_tensor().shape(), dtype=torch.uint8, device=settings.device
            )
            feed_ndarray(shown.as_tensor(), views)
            texts = [bytes(text.at(i)).decode() for i in range(len(text))]
            pipeline.release_outputs()
            yield tokenizer(texts), [views]
        # the indexes are read as long as the pipeline lives
        assert folder.name

    return epoch


class _ComposedViews(Dataset[tuple[list[Tensor], Tensor]]):
    """Two strong views by torchvision's transforms on Pillow's images, as training scripts do."""

    def __init__(self, source: ShardSource, size: int) -> None:
        from PIL import ImageFilter
        from torchvision.transforms import InterpolationMode, v2

        def blur(image: Any) -> Any:
            sigma = float(torch.empty(1).uniform_(0.1, 2.0))
            return image.filter(ImageFilter.GaussianBlur(sigma))

        self.source, self.order = source, Order(source.counts, seed=0)
        self.tokenizer = _tokenizer()
        bicubic = InterpolationMode.BICUBIC
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=bicubic),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.Lambda(blur)], p=0.5),
                v2.RandomHorizontalFlip(0.5),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[list[Tensor], Tensor]:
        sample = self.source.read(*self.order.locate(0, position))
        views = [self.transform(sample.image) for _ in range(2)]
        return views, self.tokenizer([sample.texts[0]])[0]


def _composed(settings: DataSettings, source: ShardSource) -> Epoch:
    loader = DataLoader(
        _ComposedViews(source, settings.size),
        settings.batch_size,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        pin_memory=settings.device != "cpu",
        drop_last=True,
    )

    def epoch() -> Iterator[Any]:
        for views, texts in loader:
            yield texts, views

    return epoch


def _open_clip(settings: DataSettings, source: ShardSource) -> Epoch:
    """The open_clip webdataset loader with its own preprocessing."""
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    arguments = Namespace(
        train_data="::".join(source.names),
        train_num_samples=sum(source.counts),
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=settings.batch_size,
        # it wants a shard for each process at least
        workers=min(settings.workers, len(source.names)),
        world_size=1,
        seed=0,
    )
    preprocess = image_transform(settings.size, is_train=True)
    data = get_wds_dataset(arguments, preprocess, True, floor=True, tokenizer=_tokenizer())

    def epoch() -> Iterator[Any]:
        for images, texts in data.dataloader:
            yield texts, [images]

    return epoch


LOADERS: dict[tuple[str, str], Callable[[DataSettings, ShardSource], Epoch]] = {
    ("strong", OWN): _host("strong"),
    ("strong", "fastclip, DALI"): _dali("strong"),
    ("strong", "torchvision's transforms"): _composed,
    ("plain", OWN): _host("plain"),
    ("plain", "fastclip, DALI"): _dali("plain"),
    ("plain", "DALI's webdataset reader"): _dali_reader,
    ("plain", "open_clip's loader"): _open_clip,
}


def write_photographs(folder: Path, count: int, shards: int = 2) -> str:
    """Shards of generated pictures of 640 x 480, as large as photographs; returns their pattern."""
    samples = map(_picture, range(count))
    counts = write_shards(samples, folder, "pictures", math.ceil(count / shards))
    return str(folder / f"pictures-{{00000..{len(counts) - 1:05d}}}.tar")


def _picture(number: int) -> Sample:
    import io

    import numpy as np
    from PIL import Image

    stream = np.random.default_rng(number)
    coarse = Image.fromarray(stream.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC))
    grain = stream.integers(-12, 13, picture.shape, dtype=np.int16)
    image = Image.fromarray(np.clip(picture + grain, 0, 255).astype(np.uint8))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=80)
    text = f"a generated picture, number {number}"
    return Sample(f"{number:06d}", image, (text,), encoded=encoded.getvalue())
