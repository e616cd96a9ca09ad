"""DALI's pipeline: the same samples, draws and views as torchvision's, and bad images."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastclip.data import dali
from fastclip.data.augment import Augmentation, AugmentationParams
from fastclip.data.jpeg import as_tensor, is_whole_jpeg
from fastclip.data.loader import TrainingLoader
from fastclip.data.order import Order
from fastclip.data.shards import ShardSource
from fastclip.data.sources import SceneSource
from fastclip.data.training_samples import TrainingSamples
from fastclip.data.views import replay

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install '.[dali]'")

from tests.conftest import write_tar
from tests.data.pipelines import (
    BACKENDS,
    build_loader,
    encode,
    photograph_shard,
    smooth_image,
    tokenize,
)
from tests.processes import Forked, main_without

STRONG = Augmentation(48, scale=(0.2, 1.0), flip=0.5, jitter=0.8, gray=0.2, blur=0.5, solarize=0.2)


def mean_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean difference in levels, an image each."""
    return (a.float() - b.float()).abs().mean(dim=(1, 2, 3))


def smooth_shard(path: Path, count: int) -> Path:
    members = []
    for i in range(count):
        members.append((f"{i:03d}.jpg", encode(smooth_image(i), quality=92)))
        members.append((f"{i:03d}.txt", f"number {i}".encode()))
    return write_tar(path, members)


def both(pattern: str, views: tuple[Augmentation, ...], batch: int) -> list[list[dict[str, Any]]]:
    return [list(build_loader(backend, pattern, views, batch).batches(0)) for backend in BACKENDS]


def test_the_pipelines_give_the_same_samples_and_all_but_the_same_pixels(tmp_path: Path) -> None:
    views = (Augmentation(32, flip=0.5), STRONG, Augmentation.strong(48))
    pattern = str(smooth_shard(tmp_path / "s.tar", 40))
    for ours, theirs in zip(*both(pattern, views, 8), strict=True):
        assert set(ours) == set(theirs)
        for name in ("key", "position", "captions", "faults"):
            assert ours[name] == theirs[name], name
        assert torch.equal(ours["params"], theirs["params"])
        assert all(map(torch.equal, ours["texts"], theirs["texts"]))
        for a, b in zip(ours["images"], theirs["images"], strict=True):
            assert a.shape == b.shape and b.dtype == torch.uint8
            assert mean_apart(a, b).max() <= 1.5


@pytest.mark.slow
@pytest.mark.parametrize("data", ["photographs", "cifar10"])
def test_views_of_real_images_can_be_replayed(data: str, real_data: Path, tmp_path: Path) -> None:
    """500 draws: torchvision's to the bit, DALI's within a mean of 1.5 levels, for each view."""
    size = 224 if data == "photographs" else 32
    strong = Augmentation(
        size, scale=(0.08, 1.0), flip=0.5, jitter=0.8, gray=0.2, blur=0.5, solarize=0.2
    )
    if data == "photographs":
        pattern, batch = str(photograph_shard(tmp_path / "p.tar", real_data)), 50
    else:
        pattern, batch = str(real_data / "cifar10" / "val-00000.tar"), 125
    loaders = {
        backend: build_loader(backend, pattern, (strong, strong), batch) for backend in BACKENDS
    }
    source, order = loaders["dali"].samples.source, loaders["dali"].samples.order
    draws = 0
    for epoch in itertools.count():
        for ours, theirs in zip(
            *(loader.batches(epoch) for loader in loaders.values()), strict=True
        ):
            for row, position in enumerate(ours["position"]):
                original = source.read(*order.locate(epoch, position)).image
                for view, params in enumerate(ours["params"][row]):
                    again = replay(original, params, strong.size)
                    assert torch.equal(again, ours["images"][view][row])
                    apart = mean_apart(again[None], theirs["images"][view][row][None])
                    assert apart <= 1.5, (theirs["key"][row], view)
                    draws += 1
        if draws >= 500:
            break


def test_resize_is_near_pillows_bicubic(real_data: Path, tmp_path: Path) -> None:
    """Mean within 0.5 levels on photographs, for each view, JPEG decoders' differences included."""
    crop = Augmentation(224, scale=(0.08, 1.0))
    pattern = str(photograph_shard(tmp_path / "p.tar", real_data))
    loader = build_loader("dali", pattern, (crop, crop), 40)
    source, order = loader.samples.source, loader.samples.order
    batch = next(loader.batches(0))
    for row, position in enumerate(batch["position"]):
        image = source.read(*order.locate(0, position)).image
        for view in range(2):
            p = AugmentationParams.decode(batch["params"][row, view], *image.size)
            box = (p.left, p.top, p.left + p.width, p.top + p.height)
            resized = image.crop(box).resize((224, 224), Image.Resampling.BICUBIC)
            apart = mean_apart(as_tensor(resized)[None], batch["images"][view][row][None])
            assert apart <= 0.5, batch["key"][row]


def test_the_same_bits_again_whatever_the_workers_and_the_start(tmp_path: Path) -> None:
    pattern = str(smooth_shard(tmp_path / "s.tar", 40))
    alone = build_loader("dali", pattern, (STRONG, STRONG), 8)
    whole = list(alone.batches(0))
    # left in the middle of an epoch, with batches under way
    next(alone.batches(1))
    for loader, first in (
        (alone, 0),
        (build_loader("dali", pattern, (STRONG,) * 2, 8, workers=2), 2),
    ):
        again = list(loader.batches(0, first))
        assert len(again) == len(whole) - first
        for a, b in zip(again, whole[first:], strict=True):
            assert a["key"] == b["key"] and torch.equal(a["params"], b["params"])
            assert all(map(torch.equal, a["images"], b["images"]))


def test_epochs_may_overlap_and_be_left(tmp_path: Path) -> None:
    """Each iterator has a pipeline of its own: nothing of one shows in another."""
    pattern = str(smooth_shard(tmp_path / "s.tar", 40))
    loader = build_loader("dali", pattern, (STRONG,), 8, micro_batches=1)
    whole = [list(loader.batches(epoch)) for epoch in range(2)]
    left = loader.batches(0)
    next(left)
    mixed = []
    for batch in loader.batches(1):
        mixed.append(batch)
        if len(mixed) == 2:
            left.close()
    for a, b in zip(mixed, whole[1], strict=True):
        assert a["key"] == b["key"] and torch.equal(a["images"][0], b["images"][0])


def test_only_dalis_own_errors_are_taken_for_bad_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = str(smooth_shard(tmp_path / "s.tar", 40))
    feed, calls = dali.ViewPipeline.feed, []

    def failing(self: dali.ViewPipeline, batch: dict[str, Any]) -> None:
        calls.append(batch)
        if len(calls) == 3:
            raise MemoryError("no memory")
        feed(self, batch)

    monkeypatch.setattr(dali.ViewPipeline, "feed", failing)
    with pytest.raises(MemoryError, match="no memory"):
        list(build_loader("dali", pattern, (STRONG,), 8).batches(0))


def test_scenes_keep_what_is_said_of_them_in_both() -> None:
    """The draws, which their captions restrict, are the same; so are the views."""
    source, views = SceneSource("train", 64), (Augmentation(64), Augmentation.strong(64))
    batches = []
    for pixels, kind in ((True, TrainingLoader), (False, dali.DaliLoader)):
        samples = TrainingSamples(source, Order(source.counts, 0), views, tokenize, pixels=pixels)
        batches.append(list(kind(samples, 32).batches(0)))
    for ours, theirs in zip(*batches, strict=True):
        assert torch.equal(ours["params"], theirs["params"])
        for a, b in zip(ours["images"], theirs["images"], strict=True):
            assert mean_apart(a, b).max() <= 1.5


def test_samples_of_the_other_pipeline_are_refused(tmp_path: Path) -> None:
    source = ShardSource(str(smooth_shard(tmp_path / "s.tar", 8)))
    for options in ({"pixels": True}, {"pixels": False, "hue": "hsv"}):
        samples = TrainingSamples(source, Order(source.counts, 0), STRONG, tokenize, **options)
        with pytest.raises(ValueError, match="pixels=False, hue="):
            dali.DaliLoader(samples, 4)


def odd_images() -> dict[str, bytes]:
    """Files that decoders disagree on; both pipelines must make the same of them."""
    image = smooth_image(1)
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "gray.jpg": encode(image.convert("L")),
        "cmyk.jpg": encode(image.convert("CMYK")),
        "rgb.jpg": encode(image, keep_rgb=True),
        "progressive.jpg": encode(image, progressive=True),
        "turned.jpg": encode(image, exif=turned.tobytes()),
        "alpha.png": encode(image.convert("RGBA"), "PNG"),
        "palette.png": encode(image.convert("P"), "PNG"),
        "deep.png": encode(Image.fromarray(deep), "PNG"),
        "lossless.webp": encode(image, "WEBP", lossless=True),
        "webp.jpg": encode(image, "WEBP"),
        "trailing.jpg": encode(image) + b"garbage" * 50,
        "strip.jpg": encode(smooth_image(2, width=90, height=1)),
    }


def test_odd_images_are_the_same_in_both(tmp_path: Path) -> None:
    members = []
    for number, (name, content) in enumerate(odd_images().items()):
        extension = name.rpartition(".")[2]
        members += [(f"{number:02d}.{extension}", content), (f"{number:02d}.txt", name.encode())]
    pattern = str(write_tar(tmp_path / "odd.tar", members))
    (ours,), (theirs,) = both(pattern, (Augmentation(24, flip=0.5),), len(odd_images()))
    assert ours["faults"] == theirs["faults"] == []
    assert ours["key"] == theirs["key"]
    apart = mean_apart(ours["images"][0], theirs["images"][0])
    assert apart.max() <= 1.5, dict(zip(ours["captions"], apart.tolist(), strict=True))


def test_bad_images_are_replaced_alike_and_the_run_goes_on(tmp_path: Path) -> None:
    good = encode(smooth_image(0))
    bad = [good[:40], good[: len(good) // 2], good[:-2], b"<html>", b"", b"\xff\xd8\xff\xd9"]
    bad += [encode(smooth_image(0), "PNG")[:-30], encode(smooth_image(0), "WEBP")[:-200]]
    members = []
    for i in range(48):
        content = bad[i // 4 % len(bad)] if i % 4 == 0 else encode(smooth_image(i))
        members += [(f"{i:02d}.jpg", content), (f"{i:02d}.txt", b"text")]
    pattern = str(write_tar(tmp_path / "bad.tar", members))
    ours, theirs = both(pattern, (Augmentation(24),), 8)
    assert len(ours) == len(theirs) == 6
    kinds = set()
    for a, b in zip(ours, theirs, strict=True):
        assert a["key"] == b["key"] and all(int(key) % 4 for key in a["key"])
        places = [{(fault.kind, fault.where) for fault in batch["faults"]} for batch in (a, b)]
        assert places[0] == places[1]
        kinds |= {kind for kind, _ in places[0]}
    assert kinds == {"corrupt image"}


def test_what_only_dali_refuses_is_decoded_by_pillow(tmp_path: Path) -> None:
    """Damage inside JPEGs whose structure is whole: no such file may end the run.

    A batch that DALI fails on is decoded by Pillow, which then replaces what it cannot read, as
    torchvision's pipeline does. What both decode may look different where it is damaged.
    """
    rng = random.Random(0)
    members, damaged = [], set()
    for i in range(64):
        content = bytearray(encode(smooth_image(i)))
        if i % 2:
            for _ in range(rng.randint(1, 12)):
                content[rng.randrange(20, len(content) - 2)] = rng.randrange(256)
            if is_whole_jpeg(bytes(content)):
                damaged.add(f"{i:02d}")
        members += [(f"{i:02d}.jpg", bytes(content)), (f"{i:02d}.txt", b"text")]
    assert len(damaged) >= 8
    pattern = str(write_tar(tmp_path / "hurt.tar", members))
    loader = build_loader("dali", pattern, (Augmentation(24), STRONG), 8)
    for _ in range(2):
        batches = list(loader.batches(0))
        assert [len(batch["key"]) for batch in batches] == [8] * 8
        assert all(batch["images"][1].shape == (8, 3, 48, 48) for batch in batches)
    again = list(build_loader("dali", pattern, (Augmentation(24), STRONG), 8).batches(0))
    for a, b in zip(batches, again, strict=True):
        assert a["key"] == b["key"] and all(map(torch.equal, a["images"], b["images"]))


def test_the_graph_for_a_gpu_can_be_made_without_one() -> None:
    """Every argument is of the kind and on the device that its operator takes."""
    views = (Augmentation.weak(32), STRONG)
    placed = {}
    for device in ("cpu", "gpu"):
        pipeline, inputs = dali._graph(
            views, device, batch_size=4, num_threads=1, device_id=None, prefetch_queue_depth=1
        )
        placed[device] = pipeline.serialize(), inputs
    (on_cpu, inputs), (on_gpu, same) = placed.values()
    assert inputs == same and len(inputs) > 20
    assert on_gpu.count(b"mixed") == 1 and on_cpu.count(b"mixed") == 0
    assert on_gpu.count(b"gpu") > 10 * on_cpu.count(b"gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_views_made_on_a_gpu(tmp_path: Path) -> None:
    pattern = str(smooth_shard(tmp_path / "s.tar", 40))
    host = list(build_loader("cpu", pattern, (STRONG,) * 2, 8).batches(0))
    for _ in range(2):
        loader = build_loader("dali", pattern, (STRONG,) * 2, 8, device="cuda")
        for ours, theirs in zip(host, loader.batches(0), strict=True):
            assert ours["key"] == theirs["key"]
            for a, b in zip(ours["images"], theirs["images"], strict=True):
                assert b.is_cuda and mean_apart(a, b.cpu()).max() <= 1.5


def test_a_missing_dali_is_reported(tmp_path: Path) -> None:
    """In a process of its own, whose imports can be spoiled."""
    flags = ["--data-backend", "dali", "--train-data", "synthetic", "--device", "cpu"]
    process = Forked(main_without, "nvidia.dali", ["train", *flags, "--logs", str(tmp_path)])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "needs the package 'nvidia.dali'" in errors
    assert "fastclip-kernels[dali]" in errors
