"""Systems on one process and on several, their losses and gradients by name."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastclip.models.clip import create
from fastclip.models.system import Features, Outputs, System
from tests import processes
from tests.train.conftest import TINY_MODEL

WIDTH = TINY_MODEL["embed_dim"]
Batch = dict[str, Any]
Build = Callable[[Path], tuple[System, System | None]]

# made once, which takes long, and copied
_towers: list[nn.Module] = []


def tiny_towers(folder: Path) -> nn.Module:
    """The same float64 towers every time: 16 pixels, 12 tokens, features of WIDTH."""
    config = folder / "tiny.json"
    if not config.is_file():
        config.write_text(json.dumps(TINY_MODEL))
    if not _towers:
        torch.manual_seed(0)
        _towers.append(create(str(config)).model.double())
    # heads that are drawn next are the same every time, too
    torch.manual_seed(0)
    return copy.deepcopy(_towers[0])


def draw_batch(rows: int, images: int, texts: int) -> Batch:
    """Views of noise, float64, and texts that end like CLIP's tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 40_000, (texts, rows, 12), generator=generator)
    tokens[:, :, -1] = 49_407
    shape = (images, rows, 3, 16, 16)
    pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {"images": list(pixels), "texts": list(tokens)}


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """A part of the samples."""
    return {
        name: [v[start:stop] for v in value] if isinstance(value, list) else value[start:stop]
        for name, value in batch.items()
    }


def views_of(batch: Batch, system: System) -> Batch:
    """The first views, as many as the system takes."""
    counts = {"images": system.image_views, "texts": system.text_views}
    return batch | {name: batch[name][:count] for name, count in counts.items()}


def loss_and_gradients(
    system: System, batch: Batch, teacher: System | None = None, **exchange: Any
) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter that has one, by name."""
    output = system(batch)
    if teacher is not None:
        with torch.no_grad():
            output |= Outputs(Features(), {}, teacher.features(batch)).flat()
    loss = system.loss(output, teacher, **exchange)
    loss.backward()
    grads = {n: p.grad for n, p in system.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def _work(
    rank: int, sizes: tuple[int, ...], folder: str, builds: Mapping[str, Build], batch: Batch
) -> None:
    store = dist.FileStore(f"{folder}/store", len(sizes))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(sizes))
    torch.set_num_threads(1)
    start = sum(sizes[:rank])
    own = rows_of(batch, start, start + sizes[rank])
    found = {}
    for name, build in builds.items():
        system, teacher = build(Path(folder))
        taken = views_of(own, system)
        found[name] = loss_and_gradients(system, taken, teacher, dist="gather", sizes=sizes)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def all_on_ranks(
    folder: Path, sizes: tuple[int, ...], builds: Mapping[str, Build], batch: Batch
) -> dict[str, Mapping[str, Tensor]]:
    """As `on_ranks`, of several systems by name on the same ranks."""
    # so that the ranks find it and need not write it together
    tiny_towers(folder)
    processes.on_ranks(_work, (sizes, str(folder), builds, batch), ranks=len(sizes))
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(len(sizes))]
    means = {}
    for name, first in ranks[0].items():
        for found in ranks:
            torch.testing.assert_close(found[name]["loss"], first["loss"], rtol=1e-12, atol=0)
        means[name] = {n: sum(found[name][n] for found in ranks) / len(ranks) for n in first}
    return means


def on_ranks(
    folder: Path, sizes: tuple[int, ...], build: Build, batch: Batch
) -> Mapping[str, Tensor]:
    """As `loss_and_gradients` of all rows, from so many gloo ranks with `sizes` rows each.

    Losses must be equal on all ranks; gradients are averaged, as data-parallel training does.

    Args:
        build: a function of a module (it is pickled) that makes system and teacher, or None.
    """
    return all_on_ranks(folder, sizes, {"": build}, batch)[""]
