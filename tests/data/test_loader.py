"""Batches: order, replacement of unreadable samples, independence of the workers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from fastclip.data import remote, training_samples
from fastclip.data.augment import PARAMS, Augmentation
from fastclip.data.captions import CaptionSampling
from fastclip.data.faults import FaultLog
from fastclip.data.index import Fault
from fastclip.data.loader import EvaluationSamples, TrainingLoader, collate
from fastclip.data.order import Order
from fastclip.data.remote import ShardCache
from fastclip.data.shards import ShardSource
from fastclip.data.text_augment import TextAugmentation
from fastclip.data.training_samples import TrainingSamples
from fastclip.data.views import replay
from tests.conftest import jpeg
from tests.data.pipelines import tokenize

MakeShard = Callable[..., Path]


def loader(pattern: str, batch_size: int = 4, seed: int = 0, **options: Any) -> TrainingLoader:
    source = ShardSource(pattern)
    augmentation = Augmentation(16, scale=(0.5, 1.0), flip=0.5)
    samples = TrainingSamples(source, Order(source.counts, seed, window=8), augmentation, tokenize)
    return TrainingLoader(samples, batch_size, **options)


def collect(batches: Any) -> list[dict[str, Any]]:
    return list(batches)


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return len(a) == len(b) and all(
        x["key"] == y["key"]
        and torch.equal(x["params"], y["params"])
        and all(map(torch.equal, x["images"], y["images"]))
        and all(map(torch.equal, x["texts"], y["texts"]))
        for x, y in zip(a, b, strict=True)
    )


def test_batches_do_not_depend_on_workers_or_on_the_start(make_shard: MakeShard) -> None:
    pattern = "::".join(str(make_shard(f"{i}.tar", samples=9, first=9 * i)) for i in range(3))
    alone = loader(pattern)
    assert alone.steps_per_epoch == 6
    first, second = collect(alone.batches(0)), collect(alone.batches(1))
    assert not same(first, second)
    (images,) = first[0]["images"]
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8
    with_workers = loader(pattern, workers=2)
    assert same(collect(with_workers.batches(0)), first)
    assert same(collect(with_workers.batches(1, first_step=2)), second[2:])
    keys = [key for batch in first for key in batch["key"]]
    assert len(set(keys)) == 24


def test_views_texts_and_negatives(make_shard: MakeShard) -> None:
    source = ShardSource(str(make_shard(samples=8)))
    views = (Augmentation.weak(16), Augmentation.strong(24), Augmentation.strong(24))
    captions = CaptionSampling(views=(TextAugmentation(), TextAugmentation.strong()), negatives=2)
    samples = TrainingSamples(source, Order(source.counts, 0), views, tokenize, captions)
    batch = next(TrainingLoader(samples, 4).batches(0))
    assert [tuple(images.shape) for images in batch["images"]] == [
        (4, 3, 16, 16),
        (4, 3, 24, 24),
        (4, 3, 24, 24),
    ]
    assert batch["params"].shape == (4, 3, PARAMS) and batch["params"].dtype == torch.float32
    assert not torch.equal(batch["params"][:, 1], batch["params"][:, 2])
    assert [tuple(texts.shape) for texts in batch["texts"]] == [(4, 2), (4, 2)]
    assert batch["negatives"].shape == (4, 2, 2)
    assert batch["position"] == [0, 1, 2, 3]
    plain, strong = zip(*batch["captions"], strict=True)
    assert torch.equal(batch["texts"][0], tokenize(list(plain)))
    assert torch.equal(batch["texts"][1], tokenize(list(strong)))
    for key, images, params in zip(
        batch["key"], batch["images"][1], batch["params"][:, 1], strict=True
    ):
        original = source.read(0, int(key)).image
        assert torch.equal(replay(original, params, 24), images)


def test_an_iterator_stays_in_its_epoch(make_shard: MakeShard) -> None:
    several = loader(str(make_shard(samples=24)))
    whole = collect(several.batches(0))
    first = several.batches(0)
    found = [next(first)]
    next(several.batches(1))
    assert same(found + collect(first), whole)


def test_samples_serve_any_dataloader(make_shard: MakeShard) -> None:
    """Also one with more processes than the samples know of."""
    samples = loader(str(make_shard(samples=24))).samples
    sampler = [[(0, 2 * i), (0, 2 * i + 1)] for i in range(6)]
    plain = DataLoader(samples, batch_sampler=sampler, collate_fn=collate, num_workers=2)
    assert [batch["position"] for batch in plain] == [[2 * i, 2 * i + 1] for i in range(6)]


def test_an_index_is_of_a_sample_in_every_epoch(make_shard: MakeShard) -> None:
    """Whatever the shard, and also where another one stands in for it."""
    members = []
    for i in range(6):
        members += [(f"b{i}.jpg", jpeg() if i else b"broken"), (f"b{i}.txt", b"t")]
    pattern = f"{make_shard('0.tar', samples=5)}::{make_shard('1.tar', members)}"
    several = loader(pattern, batch_size=11)
    keys = [*(f"{i:05d}" for i in range(5)), *(f"b{i}" for i in range(6))]
    for epoch in range(2):
        (batch,) = several.batches(epoch)
        assert batch["index"].dtype == torch.int64
        assert [keys[index] for index in batch["index"].tolist()] == batch["key"]


def test_an_error_in_a_loader_process_keeps_its_cause(
    make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("the real cause")

    monkeypatch.setattr(training_samples, "render_view", failing)
    broken = loader(str(make_shard(samples=24)), workers=1)
    with pytest.raises(RuntimeError, match="the real cause"), broken.reporting_worker_failure():
        collect(broken.batches(0))


def test_loading_leaves_the_global_random_stream_alone(make_shard: MakeShard) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    collect(loader(str(make_shard()), workers=1).batches(0))
    assert torch.equal(before, torch.get_rng_state())


def test_unreadable_samples_are_replaced_and_reported(make_shard: MakeShard) -> None:
    members = []
    for i in range(12):
        members += [(f"{i}.jpg", jpeg() if i % 4 else b"broken"), (f"{i}.txt", b"t")]
    pattern = str(make_shard(members=members))
    batches = collect(loader(pattern).batches(0))
    assert [len(batch["key"]) for batch in batches] == [4, 4, 4]
    faults = {fault for batch in batches for fault in batch["faults"]}
    assert {fault.where.rsplit(":", 1)[1] for fault in faults} == {"0.jpg", "4.jpg", "8.jpg"}
    assert not {"0", "4", "8"} & {key for batch in batches for key in batch["key"]}
    assert same(collect(loader(pattern, workers=2).batches(0)), batches)


def test_hopeless_data_is_an_error(make_shard: MakeShard) -> None:
    members = [m for i in range(8) for m in ((f"{i}.jpg", b"broken"), (f"{i}.txt", b"t"))]
    with pytest.raises(ValueError, match=r"32 samples in a row could not be read.*corrupt image"):
        collect(loader(str(make_shard(members=members))).batches(0))


def test_a_server_that_is_lost_is_named_as_the_cause(
    make_shard: MakeShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0)
    (tmp_path / "sizes.json").write_text('{"0.tar": 8}')
    gone = ShardSource(f"file://{tmp_path}/0.tar", cache=ShardCache(tmp_path / "cache"))
    samples = TrainingSamples(gone, Order(gone.counts, 0), Augmentation(16), None)
    with pytest.raises(ValueError, match=r"32 samples .* resume the run when it can"):
        collect(TrainingLoader(samples, 4).batches(0))


def test_an_epoch_shorter_than_a_batch_is_an_error(make_shard: MakeShard) -> None:
    with pytest.raises(ValueError, match="an epoch of 8 samples does not fill one batch of 9"):
        loader(str(make_shard()), batch_size=9)


def test_epoch_samples_bound_the_epoch(make_shard: MakeShard) -> None:
    assert loader(str(make_shard()), batch_size=2, epoch_samples=5).steps_per_epoch == 2


def test_evaluation_reads_all_in_order_and_skips_faults(make_shard: MakeShard) -> None:
    members = [m for i in range(5) for m in ((f"{i}.jpg", jpeg()), (f"{i}.txt", b"t"))]
    members[4] = ("2.jpg", b"broken")
    source = ShardSource(str(make_shard(members=members)))
    dataset = EvaluationSamples(source, lambda image: torch.zeros(3, 2, 2))
    batch = collate([dataset[i] for i in range(len(dataset))])
    assert batch["key"] == ["0", "1", "3", "4"]
    assert [fault.kind for fault in batch["faults"]] == ["corrupt image"]
    assert collate([dataset[2]])["faults"] and "image" not in collate([dataset[2]])


def test_faults_are_counted_once_a_place_and_shown_three_times_a_kind() -> None:
    log = FaultLog()
    shown = log.add([Fault("corrupt image", str(i)) for i in range(5)] * 2)
    assert len(shown) == 3
    log.add([Fault("empty file", "x")])
    assert log.summary() == "5 corrupt image, 1 empty file"
