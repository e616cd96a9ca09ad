"""A signal to all of a run's processes leaves those that load data for an evaluation alive."""

import os
import signal
from collections.abc import Callable

import pytest

from fastclip.data.faults import FaultLog
from fastclip.data.samples import Sample
from fastclip.data.scenes.source import SceneSource
from fastclip.evaluate.embed import image_batches
from fastclip.evaluate.features import embed_images
from fastclip.models.clip import Model, create


class Signaled(SceneSource):
    """Each read comes after the signals that schedulers and terminals send to a whole group."""

    def read(self, shard: int, index: int, *, pixels: bool = True) -> Sample:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        return super().read(shard, index, pixels=pixels)


def by_embedding(model: Model, source: SceneSource) -> int:
    return len(embed_images(model, source, batch_size=2, workers=1).keys)


def by_rows(model: Model, source: SceneSource) -> int:
    options = {"batch_size": 2, "workers": 1, "precision": "fp32"}
    batches = image_batches(model, source, 0, **options, faults=FaultLog())  # type: ignore[arg-type]
    return sum(len(rows) for _, rows in batches)


@pytest.mark.parametrize("count", [by_embedding, by_rows])
def test_evaluations_loaders_outlive_a_groups_signals(
    count: Callable[[Model, SceneSource], int],
) -> None:
    assert count(create("RN10t-64"), Signaled("val", 4)) == 4
