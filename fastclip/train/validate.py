"""Evaluation during training."""

from torch import Tensor

from fastclip.models.clip import Model
from fastclip.train.average import WeightAverage
from fastclip.train.config import TrainConfig
from fastclip.train.held_out import HeldOut, Retrieval, Validator, ZeroShot


class Evaluation:
    """The evaluation of a run: of its weights, and of their average where one is kept.

    Args:
        config: names the data.
        model: what is evaluated; the trained one itself, or one that takes over the weights that
            `Engine.weights` gives. None on other ranks than the first.

    Raises:
        ValueError, FileNotFoundError: data cannot be read.
    """

    def __init__(self, config: TrainConfig, model: Model | None) -> None:
        self._config, self._model = config, model
        self._best = config.checkpoint.best_metric
        self._of_weights = [] if model is None else held_out(config, model)
        self._of_average: list[HeldOut] = []

    def include(self, average: WeightAverage | None) -> None:
        """Evaluate the average as well, under names that end in "_ema"."""
        if self._model is not None and average is not None:
            averaged = self._model._replace(model=average.model)
            self._of_average = held_out(self._config, averaged)

    @property
    def captions(self) -> list[str]:
        """Of the first samples of --val-data, on the first rank and once they were measured."""
        validators = [each for each in self._of_weights if isinstance(each, Validator)]
        return validators[0].captions if validators else []

    def is_due(self, epoch: int) -> bool:
        """Whether anything is evaluated after so many epochs; the same on all ranks."""
        data, log = self._config.data, self._config.log
        further = data.zeroshot_sources or data.retrieval_sources
        return bool(
            (data.val_data and epoch % log.val_frequency == 0)
            or (further and epoch % log.zeroshot_frequency == 0)
        )

    def __call__(
        self,
        weights: dict[str, Tensor] | None,
        averaged: dict[str, Tensor] | None,
        epoch: int | None,
    ) -> dict[str, float]:
        """Metrics by name; on the first rank.

        Args:
            weights, averaged: see `Engine.weights` and `Engine.averaged_weights`.
            epoch: measure what is due after so many; None for all.

        Raises:
            ValueError: data cannot be evaluated, or --best-metric is not among the metrics of its.
        """
        assert self._model is not None
        # a model of its own takes over one after the other
        of_average = self._of_weights if averaged else self._of_average
        due = [each.prefix for each in self._of_weights if epoch is None or each.is_due(epoch)]
        metrics: dict[str, float] = {}
        tests: list[HeldOut]
        for tests, ending, taken in (
            (self._of_weights, "", weights),
            (of_average, "_ema", averaged),
        ):
            if taken:
                self._model.model.load_state_dict(taken)
            for each in tests:
                if each.prefix in due:
                    metrics |= {f"{name}{ending}": value for name, value in each().items()}
        if self._best and self._best.startswith(tuple(due)) and self._best not in metrics:
            raise ValueError(
                f"--best-metric {self._best} was not measured, but {', '.join(metrics)}; name one "
                "of these and resume the run, whose epoch is saved"
            )
        return metrics


def held_out(config: TrainConfig, model: Model) -> list[HeldOut]:
    """Everything that a run is evaluated on, of a model."""
    data = config.data
    return [
        *([Validator(config, model)] if data.val_data else []),
        *(ZeroShot(name, source, config, model) for name, source in data.zeroshot_sources.items()),
        *(
            Retrieval(name, source, config, model)
            for name, source in data.retrieval_sources.items()
        ),
    ]
