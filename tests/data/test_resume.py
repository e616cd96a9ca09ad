"""kill -9 of everyone who loads, then resume from three integers: the next samples bit for bit."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from fastclip.data.augment import Augmentation

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install '.[dali]'")

from tests.conftest import write_tar
from tests.data.pipelines import build_loader, encode, smooth_image

GLOBAL_BATCH = 12
STEPS_BEFORE = 4
NEXT = 64
VIEWS = (Augmentation.weak(24), Augmentation.strong(32))

# what is compared of a sample: key, captions, and digests of its parameters and views
Record = list


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def load(
    backend: str, pattern: str, place: tuple[int, int], workers: int, first: int, last: int,
    path: str,
) -> None:  # fmt: skip
    """Write a line a sample of the steps from `first` to before `last`, then wait to be killed."""
    torch.set_num_threads(1)
    rank, world = place
    loader = build_loader(
        backend,
        pattern,
        VIEWS,
        GLOBAL_BATCH // world,
        seed=3,
        workers=workers,
        rank=rank,
        world_size=world,
    )
    batches = loader.batches(0, first)
    with open(path, "w") as file:
        for _ in range(first, last):
            batch = next(batches)
            for row, position in enumerate(batch["position"]):
                views = [digest(images[row]) for images in batch["images"]]
                record = [batch["key"][row], batch["captions"][row], digest(batch["params"][row])]
                file.write(json.dumps([position, [*record, *views]]) + "\n")
            file.flush()
        time.sleep(300)


def records(path: Path) -> dict[int, Record]:
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(json.loads(line) for line in lines)


def load_and_kill(
    backend: str, pattern: str, world: int, workers: int, first: int, last: int, folder: Path
) -> dict[int, Record]:
    """What all ranks had delivered when they were killed with kill -9, by position."""
    folder.mkdir()
    # DALI's threads do not survive a fork
    context = multiprocessing.get_context("spawn" if backend == "dali" else "fork")
    paths = [folder / f"{rank}.jsonl" for rank in range(world)]
    processes = []
    for rank, path in enumerate(paths):
        arguments = (backend, pattern, (rank, world), workers, first, last, str(path))
        processes.append(context.Process(target=load, args=arguments))
        processes[-1].start()
    expected = (last - first) * GLOBAL_BATCH // world
    deadline = time.monotonic() + 120
    while any(len(records(path)) < expected for path in paths):
        assert all(process.is_alive() for process in processes), "a rank ended by itself"
        assert time.monotonic() < deadline, "the samples never came"
        time.sleep(0.02)
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return {position: record for path in paths for position, record in records(path).items()}


@pytest.mark.dist
@pytest.mark.parametrize(
    "backend, before, after, workers",
    [
        ("cpu", 1, 1, (0, 0)),
        ("cpu", 1, 1, (2, 0)),
        ("cpu", 3, 3, (0, 2)),
        ("cpu", 2, 3, (2, 0)),
        ("dali", 1, 1, (0, 0)),
        ("dali", 2, 3, (0, 0)),
    ],
    ids=lambda value: str(value),
)
def test_the_next_samples_after_a_kill(
    backend: str, before: int, after: int, workers: tuple[int, int], tmp_path: Path
) -> None:
    members = []
    for i in range(150):
        # some that cannot be read, whose replacements must be the same as well
        content = encode(smooth_image(i)) if i % 7 else b"broken"
        members += [(f"{i:03d}.jpg", content), (f"{i:03d}.txt", f"caption {i}".encode())]
    pattern = str(write_tar(tmp_path / "s.tar", members))
    last = STEPS_BEFORE + -(-NEXT // GLOBAL_BATCH)
    whole = {}
    loader = build_loader("cpu", pattern, VIEWS, GLOBAL_BATCH, seed=3)
    for _, batch in zip(range(last), loader.batches(0), strict=False):
        for row, position in enumerate(batch["position"]):
            views = [digest(images[row]) for images in batch["images"]]
            whole[position] = [
                batch["key"][row],
                list(batch["captions"][row]),
                digest(batch["params"][row]),
                *views,
            ]
    first = load_and_kill(backend, pattern, before, workers[0], 0, STEPS_BEFORE, tmp_path / "a")
    assert len(first) == STEPS_BEFORE * GLOBAL_BATCH
    # what the trainer keeps: the step, and with the batch's size the position, of this epoch
    again = load_and_kill(backend, pattern, after, workers[1], STEPS_BEFORE, last, tmp_path / "b")
    assert sorted(again) == list(range(STEPS_BEFORE * GLOBAL_BATCH, last * GLOBAL_BATCH))
    assert len(again) >= NEXT
    found = first | again
    if backend == "dali":
        straight = load_and_kill(backend, pattern, 1, 0, 0, last, tmp_path / "c")
        assert found == straight
        # across pipelines all but the pixels
        found = {position: record[:3] for position, record in found.items()}
        whole = {position: record[:3] for position, record in whole.items()}
    assert found == whole
