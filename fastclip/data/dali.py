"""DALI's pipeline: the same samples, draws and steps as on the host, made by NVIDIA's operators.

On a GPU it decodes and augments there; without one it runs the same graph on the CPU. Images come
as bytes in the contract's order and parameters as numbers: nothing in the graph is random.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastclip.data.augment import (
    COLOR_STEPS,
    Augmentation,
    AugmentationParams,
    blur_radius,
)
from fastclip.data.index import Fault
from fastclip.data.loader import TrainingLoader, collate
from fastclip.data.training_samples import TrainingSamples
from fastclip.data.views import GRAY
from fastclip.device import own_cores

PREFETCH = 2
# How DALI's own errors begin, whatever their type.
_DALIS = "Critical error in pipeline"
_CONTRAST = COLOR_STEPS.index("contrast")


class DaliLoader(TrainingLoader):
    """A `TrainingLoader` whose views DALI makes.

    Args:
        samples: with `pixels=False`; their hue is YIQ.
        batch_size: samples of a micro-batch on this rank.
        micro_batches: how many of them make a step.
        epoch_samples: samples an epoch; None for all.
        workers: loader processes; 0 loads in this one.
        rank, world_size: which part of each step's samples is loaded here.
        device: where views are made and arrive; on a GPU those of a step of several micro-batches
            arrive on the host, since all of a step are held.
        threads: of the CPU that DALI decodes with; by default this process's share of the cores.

    Raises:
        ModuleNotFoundError: DALI is not installed.
        ValueError: the samples are of torchvision's pipeline, or an epoch does not fill a batch.

    Examples:
        >>> # needs NVIDIA DALI: pip install fastclip-kernels[dali]
        >>> from fastclip.data.augment import Augmentation
        >>> from fastclip.data.dali import DaliLoader
        >>> from fastclip.data.order import Order
        >>> from fastclip.data.sources import open_source
        >>> from fastclip.data.training_samples import TrainingSamples
        >>> source = open_source("scenes", split="train", count=1000)
        >>> order, view = Order(source.counts, seed=0), Augmentation(224)
        >>> samples = TrainingSamples(source, order, view, None, pixels=False)
        >>> loader = DaliLoader(samples, batch_size=256, device="cuda")  # doctest: +SKIP
        >>> next(loader.batches(epoch=0))["images"][0].shape  # doctest: +SKIP
        torch.Size([256, 3, 224, 224])
    """

    def __init__(
        self,
        samples: TrainingSamples,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        threads: int | None = None,
        micro_batches: int = 1,
        epoch_samples: int | None = None,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(
            samples,
            batch_size,
            micro_batches=micro_batches,
            epoch_samples=epoch_samples,
            workers=workers,
            rank=rank,
            world_size=world_size,
        )
        if samples.pixels or samples.hue != "yiq":
            raise ValueError(
                f"samples have pixels={samples.pixels}, hue={samples.hue!r}; DALI makes the "
                'pixels, with a hue in YIQ: give TrainingSamples(..., pixels=False, hue="yiq")'
            )
        self.device = torch.device(device)
        self.threads = threads or own_cores()
        # built now, so that what is missing is reported before training begins
        self._idle: ViewPipeline | None = self._built()

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[dict[str, Any]]:
        """The micro-batches of an epoch, those of a step in a row.

        Args:
            epoch: from 0 on.
            first_step: the step of the epoch to begin with.
        """
        # each iterator has a pipeline of its own; one that is left early takes it along
        pipeline, self._idle = self._idle or self._built(), None
        work = _Work(self, epoch, pipeline)
        for batch in super().batches(epoch, first_step):
            work.begin(batch)
            if len(work.waiting) > PREFETCH:
                yield work.finished()
        while work.waiting:
            yield work.finished()
        self._idle = work.pipeline

    def _built(self) -> "ViewPipeline":
        return ViewPipeline(self.samples.views, self.batch_size, self.device, self.threads)


class _Work:
    """The batches of an epoch that are on their way through a pipeline.

    A pipeline is of no use after an error, which may be of any batch under way. It is then built
    anew and gets them one after the other; one that fails by itself is decoded by Pillow, which
    replaces what it must, as torchvision's pipeline does.
    """

    def __init__(self, loader: DaliLoader, epoch: int, pipeline: "ViewPipeline") -> None:
        self.loader = loader
        self.epoch = epoch
        self.pipeline: ViewPipeline | None = pipeline
        self.waiting: deque[dict[str, Any]] = deque()

    def begin(self, batch: dict[str, Any]) -> None:
        self.waiting.append(batch)
        self._feed(batch)

    def finished(self) -> dict[str, Any]:
        images = self._images()
        if images is None:
            images = self._by_itself()
            for batch in itertools.islice(self.waiting, 1, None):
                self._feed(batch)
        batch = self.waiting.popleft()
        if self.loader.micro_batches > 1:
            images = [view.cpu() for view in images]
        for name in ("encoded", "lengths", "draws"):
            del batch[name]
        return {"images": images, **batch}

    def _by_itself(self) -> list[Tensor]:
        self.pipeline = self.loader._built()
        batch = self.waiting[0]
        self._feed(batch)
        images = self._images()
        if images is not None:
            return images
        samples, positions = self.loader.samples, batch["position"]
        decoded = collate([samples.decoded(self.epoch, position) for position in positions])
        place = f"epoch {self.epoch}, positions {positions[0]} to {positions[-1]}"
        reported = [*batch["faults"], Fault("batch that DALI cannot decode", place)]
        decoded["faults"] += [fault for fault in reported if fault not in decoded["faults"]]
        self.waiting[0] = decoded
        # what fails now is not an image's fault
        self.pipeline = self.loader._built()
        self.pipeline.feed(decoded)
        return self.pipeline.images()

    def _feed(self, batch: dict[str, Any]) -> None:
        self._try(lambda pipeline: pipeline.feed(batch))

    def _images(self) -> list[Tensor] | None:
        return self._try(lambda pipeline: pipeline.images())

    def _try(self, step: Callable[["ViewPipeline"], Any]) -> Any:
        """What a step returns; None where there is no pipeline, or, from then on, DALI fails."""
        try:
            return None if self.pipeline is None else step(self.pipeline)
        except Exception as error:
            # its types are those of C++: RuntimeError, ValueError, IndexError, ...
            if _DALIS not in str(error):
                raise
            # before another is built, which may need its memory
            self.pipeline = None
            return None


class ViewPipeline:
    """Views from encoded images and drawn parameters.

    Args:
        views: their sizes; what is drawn is said with each batch.
        batch_size: images of each batch.
        device: "cpu" or a CUDA device.
        threads: of the CPU.
    """

    def __init__(
        self,
        views: Sequence[Augmentation],
        batch_size: int,
        device: torch.device,
        threads: int,
    ) -> None:
        self.device = device
        index = None
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
        self._pipe, self._inputs = _graph(
            tuple(views),
            "cpu" if index is None else "gpu",
            batch_size=batch_size,
            num_threads=threads,
            device_id=index,
            prefetch_queue_depth=1,
        )
        self._pipe.build()

    def feed(self, batch: dict[str, Any]) -> None:
        """Begin with a batch of `TrainingLoader`'s: encoded images, their lengths, draws."""
        ends = np.cumsum(batch["lengths"])[:-1]
        self._pipe.feed_input("encoded", np.split(batch["encoded"].numpy(), ends))
        for view, draws in enumerate(zip(*batch["draws"], strict=True)):
            for name, values in _arguments(draws).items():
                # the graph takes those only that its steps need
                if f"{name}_{view}" in self._inputs:
                    self._pipe.feed_input(f"{name}_{view}", values)
        self._pipe.schedule_run()

    def images(self) -> list[Tensor]:
        """The views of the earliest batch under way: (B, 3, S, S) uint8, channels innermost.

        Raises:
            Exception: of DALI's choice, where an image of a batch under way cannot be decoded; the
                pipeline is then of no more use.
        """
        from nvidia.dali.plugin.pytorch import feed_ndarray

        images = []
        for output in self._pipe.share_outputs():
            dense = output.as_tensor()
            view = torch.empty(dense.shape(), dtype=torch.uint8, device=self.device)
            if self.device.type == "cuda":
                stream = torch.cuda.current_stream(self.device)
                feed_ndarray(dense, view, cuda_stream=stream)
                # the buffers go back to DALI below
                stream.synchronize()
            else:
                feed_ndarray(dense, view)
            images.append(view.permute(0, 3, 1, 2))
        self._pipe.release_outputs()
        return images


def _arguments(draws: Sequence[AugmentationParams]) -> dict[str, np.ndarray]:
    """One view's parameters as arrays of B rows; color steps in the order they are taken."""
    kinds = np.array([draw.order for draw in draws], dtype=np.int32)
    factors = np.array(
        [(draw.brightness, draw.contrast, draw.saturation, draw.hue) for draw in draws], np.float32
    )
    factors = np.take_along_axis(factors, kinds, axis=1)

    def column(values: Any, dtype: type) -> np.ndarray:
        return np.array(list(values), dtype=dtype)

    arguments = {
        "corner": column(((draw.top, draw.left) for draw in draws), np.int32),
        "extent": column(((draw.height, draw.width) for draw in draws), np.int32),
        "flip": column((draw.flip for draw in draws), np.int32),
        "jitter": column((draw.jitter for draw in draws), np.bool_),
        "gray": column((draw.gray for draw in draws), np.bool_),
        "blur": column((draw.sigma > 0 for draw in draws), np.bool_),
        # a sigma of 0 is an error even where nothing is blurred
        "sigma": column((draw.sigma or 1.0 for draw in draws), np.float32),
        "window": column((2 * blur_radius(draw.sigma or 1.0) + 1 for draw in draws), np.int32),
        "solarize": column((draw.solarize < 256 for draw in draws), np.bool_),
        "threshold": column((draw.solarize for draw in draws), np.int32),
    }
    for turn in range(len(COLOR_STEPS)):
        kind, factor = kinds[:, turn], np.ascontiguousarray(factors[:, turn])
        arguments[f"is_contrast{turn}"] = kind == _CONTRAST
        arguments[f"factor{turn}"] = factor
        # one operator serves the other three steps; those that it does not take are neutral
        for step, neutral, unit in (("brightness", 1, 1), ("saturation", 1, 1), ("hue", 0, 360)):
            own = kind == COLOR_STEPS.index(step)
            values = np.where(own, factor * unit, neutral)
            arguments[f"{step}{turn}"] = values.astype(np.float32)
    return arguments


def _graph(views: tuple[Augmentation, ...], device: str, **options: Any) -> tuple[Any, set[str]]:
    """The pipeline, which has the steps only that each view may take, and its inputs' names."""
    from nvidia.dali import fn, pipeline_def, types

    inputs: set[str] = set()

    def given(name: str, view: int) -> Any:
        inputs.add(f"{name}_{view}")
        return fn.external_source(name=f"{name}_{view}")

    def shown(value: Any) -> Any:
        """A number where the arithmetic takes place."""
        return value.gpu() if device == "gpu" else value

    def contrast(pixels: Any, factor: Any) -> Any:
        means = fn.reductions.mean(pixels, axes=[0, 1], dtype=types.FLOAT)
        center = fn.reductions.sum(means * types.Constant(GRAY, device=device), axes=[0])
        return fn.cast(pixels * factor + (1.0 - factor) * center, dtype=types.UINT8)

    @pipeline_def(enable_conditionals=True, **options)
    def graph() -> tuple[Any, ...]:
        encoded = fn.external_source(name="encoded")
        decoding: dict[str, Any] = {
            "device": "mixed" if device == "gpu" else "cpu",
            "output_type": types.RGB,
            # an orientation in EXIF is not looked at, as in Pillow and open_clip
            "adjust_orientation": False,
            # else a GPU enlarges color differences otherwise than a CPU
            "jpeg_fancy_upsampling": True,
        }
        crop: dict[str, Any] = {"axis_names": "HW"}
        crop |= {"normalized_anchor": False, "normalized_shape": False}
        boxes = [(given("corner", v), given("extent", v)) for v in range(len(views))]
        if len(views) == 1:
            # what lies outside need not be decoded whole
            crops = [fn.decoders.image_slice(encoded, *boxes[0], **decoding, **crop)]
        else:
            images = fn.decoders.image(encoded, **decoding)
            crops = [fn.slice(images, *box, **crop) for box in boxes]
        return tuple(view(crops[v], v, able) for v, able in enumerate(views))

    def view(pixels: Any, number: int, able: Augmentation) -> Any:
        pixels = fn.resize(
            pixels, size=(able.size, able.size), interp_type=types.INTERP_CUBIC, antialias=True
        )
        if able.flip > 0:
            pixels = fn.flip(pixels, horizontal=given("flip", number))
        if able.jitter > 0:
            if given("jitter", number):
                for turn in range(len(COLOR_STEPS)):
                    if given(f"is_contrast{turn}", number):
                        pixels = contrast(pixels, shown(given(f"factor{turn}", number)))
                    else:
                        pixels = fn.hsv(
                            pixels,
                            value=given(f"brightness{turn}", number),
                            saturation=given(f"saturation{turn}", number),
                            hue=given(f"hue{turn}", number),
                        )
        if able.gray > 0:
            if given("gray", number):
                pixels = fn.hsv(pixels, saturation=0.0)
        if able.blur > 0:
            if given("blur", number):
                sigma, window = given("sigma", number), given("window", number)
                pixels = fn.gaussian_blur(pixels, sigma=sigma, window_size=window)
        if able.solarize > 0:
            if given("solarize", number):
                # 255 - level is the level with every bit turned over
                chosen = fn.cast(pixels >= shown(given("threshold", number)), dtype=types.UINT8)
                pixels = pixels ^ (chosen * np.uint8(255))
        return pixels

    pipeline = graph()
    return pipeline, inputs
