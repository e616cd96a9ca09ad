"""Data that a run does not train on, and what is measured on them while it trains."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fastclip.data.samples import Source
from fastclip.data.sources import FirstSamples, guess_type, open_source
from fastclip.data.templates import read_lines
from fastclip.evaluate.features import ImageFeatures, embed_images, embed_texts
from fastclip.evaluate.retrieval import evaluate_retrieval
from fastclip.evaluate.zeroshot import classes_of, evaluate_zeroshot, require_same_classes
from fastclip.functional import clip_loss, siglip_loss
from fastclip.messages import logger
from fastclip.models.classifier import Classifier
from fastclip.models.clip import Model
from fastclip.train.classifier import class_names
from fastclip.train.config import TrainConfig
from fastclip.train.objective import objective_of

# captions that are kept of the data, as examples
EXAMPLES = 64


class HeldOut(ABC):
    """One source of data, and what is measured on it.

    Args:
        data: what it is.
        config: says how it is read.
        model: what is evaluated.
        prefix: the names of all its metrics begin so.
        every: epochs between two evaluations.
        required: extensions that samples of shards must have besides an image.
        image_root: folder of a table's images; None: beside the table.

    Raises:
        ValueError, FileNotFoundError: the data cannot be read.
    """

    def __init__(
        self,
        data: str,
        config: TrainConfig,
        model: Model,
        *,
        prefix: str,
        every: int,
        required: tuple[str, ...],
        image_root: str | None = None,
    ) -> None:
        self.config, self.model = config, model
        self.prefix, self.every = prefix, every
        self.kind = guess_type(data) or config.data.dataset_type
        # --captions names what to train on; here each sample has its own
        options = replace(config.data, dataset_type=self.kind, image_root=image_root, captions=None)
        self.source: Source = open_source(data, options, split="val", required=required)
        self._reported = False

    def is_due(self, epoch: int) -> bool:
        """Whether it is evaluated after so many epochs."""
        return epoch % self.every == 0

    def __call__(self) -> dict[str, float]:
        """Metrics by name."""
        images = embed_images(
            self.model,
            self.source,
            workers=self.config.data.loader_processes,
            precision=self.precision,
        )
        for place in () if self._reported else images.faults.places():
            logger.warning(f"skipped in validation: {place}")
        self._reported = True
        return {f"{self.prefix}{name}": value for name, value in self.measure(images).items()}

    @property
    def precision(self) -> str:
        """Of the towers, as in training."""
        return self.config.model.precision

    @abstractmethod
    def measure(self, images: ImageFeatures) -> dict[str, float]:
        """The metrics of the embedded images, by name without the prefix."""

    def recalls(self, images: ImageFeatures, k: tuple[int, ...]) -> dict[str, float]:
        """Retrieval among all of the images and their captions."""
        found = evaluate_retrieval(self.model, images, k=k, precision=self.precision)
        return {name: value for name, value in found.items() if "recall" in name}


class Validator(HeldOut):
    """Loss over batches of the training's size, retrieval, and zero-shot where there are classes.

    Attributes:
        captions: of the first samples that were measured.

    Raises:
        ValueError, FileNotFoundError: --val-data cannot be read.
    """

    def __init__(self, config: TrainConfig, model: Model) -> None:
        data = config.data
        assert data.val_data is not None
        super().__init__(
            data.val_data,
            config,
            model,
            prefix="val/",
            every=config.log.val_frequency,
            required=("cls",) if config.model.objective == "classify" else ("txt",),
            image_root=data.val_image_root,
        )
        if data.val_num_samples is not None:
            self.source = FirstSamples(self.source, data.val_num_samples)
        self.captions: list[str] = []
        self.classes = classes_of(data.val_data, self.kind)
        _require_classes(f"--val-data {data.val_data}", self.classes, config)

    def measure(self, images: ImageFeatures) -> dict[str, float]:
        """Of a classifier accuracies alone."""
        if isinstance(self.model.model, Classifier):
            return evaluate_zeroshot(self.model, images, [], [])
        self.captions = [own[0] for own in images.texts[:EXAMPLES]]
        metrics = self._loss(images.features, images.texts)
        metrics |= self.recalls(images, k=(1, 5))
        if self.classes and any(label is not None for label in images.labels):
            metrics |= evaluate_zeroshot(
                self.model, images, *self.classes, precision=self.precision
            )
        return metrics

    @torch.no_grad()
    def _loss(self, images: torch.Tensor, texts: list[tuple[str, ...]]) -> dict[str, float]:
        """The loss over batches of --batch-size with first captions, and CLIP's chance of these.

        A step of the training may have more samples, and with them a larger loss.
        """
        first = [own[0] for own in texts]
        features = embed_texts(self.model, first, precision=self.precision)
        model = self.model.model
        objective = objective_of(model, self.config)
        scalars = [torch.tensor(objective.logit_scale(model.get_parameter))]
        function: Callable[..., torch.Tensor] = clip_loss
        if self.config.loss.siglip:
            function = siglip_loss
            scalars.append(model.get_parameter("logit_bias").cpu())
        size = min(self.config.optim.batch_size, len(texts))
        starts = range(0, len(texts) - size + 1, size)
        losses = [function(images[i : i + size], features[i : i + size], *scalars) for i in starts]
        found = {"loss": torch.stack(losses).mean().item()}
        return found if self.config.loss.siglip else {**found, "chance_loss": math.log(size)}


class ZeroShot(HeldOut):
    """Zero-shot accuracy on one source of --zeroshot-data; of a classifier its own accuracy.

    Raises:
        ValueError, FileNotFoundError: the source cannot be read, or has no class names.
    """

    def __init__(self, name: str, data: str, config: TrainConfig, model: Model) -> None:
        super().__init__(
            data,
            config,
            model,
            prefix=f"zeroshot/{name}/",
            every=config.log.zeroshot_frequency,
            required=("cls",),
        )
        found = classes_of(data, self.kind)
        if found is None and not isinstance(model.model, Classifier):
            raise ValueError(
                f"--zeroshot-data {data}: there are no class names; put classes.txt beside it, one "
                "a line in the order of the labels"
            )
        _require_classes(f"--zeroshot-data {data}", found, config)
        self.classes, self.templates = found or ([], [])
        if config.data.templates is not None:
            self.templates = read_lines(Path(config.data.templates))

    def measure(self, images: ImageFeatures) -> dict[str, float]:
        """acc1, acc5 and mean_per_class_recall."""
        return evaluate_zeroshot(
            self.model, images, self.classes, self.templates, precision=self.precision
        )


class Retrieval(HeldOut):
    """Retrieval on one source of --retrieval-data.

    Raises:
        ValueError, FileNotFoundError: the source cannot be read.
    """

    def __init__(self, name: str, data: str, config: TrainConfig, model: Model) -> None:
        every = config.log.zeroshot_frequency
        prefix = f"retrieval/{name}/"
        super().__init__(data, config, model, prefix=prefix, every=every, required=("txt",))

    def measure(self, images: ImageFeatures) -> dict[str, float]:
        """Recall at 1, 5 and 10 in both directions."""
        return self.recalls(images, k=(1, 5, 10))


def _require_classes(
    flag: str, found: tuple[list[str], list[str]] | None, config: TrainConfig
) -> None:
    """Refuse data whose labels mean other classes than a classifier's.

    Args:
        flag: with the data, for the message.
        found: class names and templates of the data, if it has some.
        config: of the run.
    """
    require_same_classes(flag, found and found[0], "the classifier", class_names(config))
