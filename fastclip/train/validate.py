"""Evaluation during training."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from fastclip.data.sources import guess_type, open_source
from fastclip.evaluate.features import embed_images, embed_texts
from fastclip.evaluate.retrieval import evaluate_retrieval
from fastclip.evaluate.zeroshot import classes_of, evaluate_zeroshot
from fastclip.functional import clip_loss, siglip_loss
from fastclip.messages import logger
from fastclip.models.classifier import Classifier
from fastclip.models.clip import Model
from fastclip.train.average import WeightAverage
from fastclip.train.config import TrainConfig
from fastclip.train.engine import Engine
from fastclip.train.objective import objective_of


class Evaluation:
    """The evaluation of a run: of its weights, and of their average where one is kept.

    Args:
        config: names the data.
        model: what is evaluated; the trained one itself, or one that takes over the weights that
            `Engine.weights` gives. None on other ranks than the first.
    """

    def __init__(self, config: TrainConfig, model: Model | None) -> None:
        self._config, self._model = config, model
        self._validator = None if model is None else Validator(config, model)
        self._of_average: Validator | None = None

    def include(self, average: WeightAverage | None) -> None:
        """Evaluate the average as well, under names that end in "_ema"."""
        if self._model is not None and average is not None:
            averaged = self._model._replace(model=average.model)
            self._of_average = Validator(self._config, averaged)

    def __call__(self, engine: Engine) -> dict[str, float] | None:
        """Metrics by name on the first rank, None on others; called on all ranks."""
        weights = engine.weights()
        if self._model is None or self._validator is None:
            return None
        if weights:
            self._model.model.load_state_dict(weights)
        metrics = self._validator()
        if self._of_average is not None:
            metrics |= {f"{name}_ema": value for name, value in self._of_average().items()}
        return metrics


class Validator:
    """Loss over batches of the training's size, retrieval, and zero-shot where there are classes.

    Raises:
        ValueError, FileNotFoundError: --val-data cannot be read.
    """

    def __init__(self, config: TrainConfig, model: Model) -> None:
        assert config.data.val_data is not None
        self.config = config
        self.model = model
        kind = guess_type(config.data.val_data) or config.data.dataset_type
        # --captions names what to train on; here each sample has its own
        options = replace(
            config.data,
            dataset_type=kind,
            image_root=config.data.val_image_root,
            captions=None,
        )
        required = ("cls",) if config.model.objective == "classify" else ("txt",)
        self.source = open_source(config.data.val_data, options, split="val", required=required)
        self.classes = classes_of(config.data.val_data, kind)
        self._reported = False

    def __call__(self) -> dict[str, float]:
        """Metrics by name, each beginning with "val/"."""
        precision = self.config.model.precision
        images = embed_images(
            self.model, self.source, workers=self.config.data.loader_processes, precision=precision
        )
        for place in () if self._reported else images.faults.places():
            logger.warning(f"skipped in validation: {place}")
        self._reported = True
        if isinstance(self.model.model, Classifier):
            metrics = evaluate_zeroshot(self.model, images, [], [])
        else:
            metrics = self._loss(images.features, images.texts)
            retrieval = evaluate_retrieval(self.model, images, k=(1, 5), precision=precision)
            metrics |= {name: value for name, value in retrieval.items() if "recall" in name}
            if self.classes and any(label is not None for label in images.labels):
                metrics |= evaluate_zeroshot(self.model, images, *self.classes, precision=precision)
        return {f"val/{name}": value for name, value in metrics.items()}

    @torch.no_grad()
    def _loss(self, images: torch.Tensor, texts: list[tuple[str, ...]]) -> dict[str, float]:
        """The loss over batches of --batch-size with first captions, and CLIP's chance of these.

        A step of the training may have more samples, and with them a larger loss.
        """
        first = [own[0] for own in texts]
        features = embed_texts(self.model, first, precision=self.config.model.precision)
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
