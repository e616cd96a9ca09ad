"""The non-contrastive losses against slow oracles in float64, on one rank and on several."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastclip.losses import non_contrastive
from fastclip.losses.non_contrastive import (
    assignments,
    cross_correlation_loss,
    prediction_loss,
    prototype_assignment_loss,
    swapped_assignment_loss,
)
from tests.processes import on_ranks

ROWS = {1: (7,), 2: (5, 3), 3: (2, 4, 1)}
WIDTH = 6
SCALE = 9.0


def inputs(rows: int) -> list[Tensor]:
    """Two image views and two text views, normalized rows."""
    generator = torch.Generator().manual_seed(3)
    shape = (4, rows, WIDTH)
    return list(F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1))


def slow_prediction(views: list[Tensor], scale: Tensor) -> Tensor:
    terms = []
    for p, v in zip(views[0], views[2].detach(), strict=True):
        terms.append(2 - 2 * (p @ v) / (p.norm() * v.norm()))
    return sum(terms) / len(terms)


def slow_correlation(views: list[Tensor], scale: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i in range(WIDTH):
        for j in range(WIDTH):
            c = sum(views[0][n, i] * views[2][n, j] for n in range(len(views[0]))) / len(views[0])
            total = total + ((c - 1) ** 2 if i == j else 0.005 * c**2)
    return 0.025 * total


def slow_sinkhorn(logits: Tensor) -> Tensor:
    """Rows are samples; the published form: prototypes by samples, marginals 1/K and 1/B."""
    shares = torch.exp(logits.detach()).T
    shares = shares / shares.sum()
    prototypes, samples = shares.shape
    for _ in range(3):
        shares = shares / shares.sum(1, keepdim=True) / prototypes
        shares = shares / shares.sum(0, keepdim=True) / samples
    return (shares * samples).T


def slow_swapped(views: list[Tensor], scale: Tensor) -> Tensor:
    images, texts = views[:2], views[2:]
    terms = []
    for a in range(2):
        for b in range(2):
            for x, y, s, t in (
                (images[a], texts[b], images[1 - a], texts[1 - b]),
                (texts[b], images[a], texts[1 - b], images[1 - a]),
            ):
                target = slow_sinkhorn(s @ t.T / 0.05)
                for n in range(len(x)):
                    logits = scale * (y @ x[n])
                    probabilities = torch.exp(logits) / torch.exp(logits).sum()
                    terms.append(-(target[n] * torch.log(probabilities)).sum())
    return sum(terms) / len(terms)


# unit rows that bfloat16 holds exactly
PROTOTYPES = torch.tensor(
    [
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 0.0, 0.0, 0.0, 0.0],
        [0.5, 0.5, -0.5, 0.5, 0.0, 0.0],
        [0.0, 0.0, 0.5, -0.5, 0.5, 0.5],
    ]
)


def slow_prototypes(views: list[Tensor], scale: Tensor) -> Tensor:
    images, texts, points = views[0], views[2], PROTOTYPES.double()
    terms = []
    for x, other in ((images, texts), (texts, images)):
        target = slow_sinkhorn(other @ points.T / 0.05)
        for n in range(len(x)):
            weights = torch.exp(scale * (points @ x[n]))
            terms.append(-(target[n] * torch.log(weights / weights.sum())).sum())
    return sum(terms) / len(terms)


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "prediction": (slow_prediction, lambda v, s, **o: prediction_loss(v[0], v[2], **o)),
    "correlation": (slow_correlation, lambda v, s, **o: cross_correlation_loss(v[0], v[2], **o)),
    "swapped": (slow_swapped, lambda v, s, **o: swapped_assignment_loss(v[:2], v[2:], s, **o)),
    "prototypes": (
        slow_prototypes,
        lambda v, s, **o: prototype_assignment_loss(v[0], v[2], PROTOTYPES.to(v[0]), s, **o),
    ),
}


def value_and_gradients(
    loss: Callable[..., Tensor], views: list[Tensor], **options
) -> list[Tensor]:
    leaves = [view.clone().requires_grad_() for view in views]
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    value = loss(leaves, scale, **options)
    (3 * value).backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (*leaves, scale)]
    return [value.detach(), *grads]


@pytest.mark.parametrize("name", LOSSES)
def test_one_process_equals_the_oracle(name: str) -> None:
    slow, fast = LOSSES[name]
    views = inputs(7)
    for expected, found in zip(
        value_and_gradients(slow, views), value_and_gradients(fast, views), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def work(rank: int, world: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.set_num_threads(1)
    sizes = ROWS[world]
    own = [view.split(sizes)[rank] for view in inputs(sum(sizes))]
    results = {
        (name, exchange): value_and_gradients(fast, own, dist=exchange, sizes=sizes)
        for name, (_, fast) in LOSSES.items()
        for exchange in ("gather", "ring")
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_several_ranks_equal_the_oracle_of_all_rows(world: int, tmp_path: Path) -> None:
    on_ranks(work, (world, str(tmp_path)), ranks=world)
    sizes = ROWS[world]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for name, (slow, _) in LOSSES.items():
        value, *gradients, scale = value_and_gradients(slow, inputs(sum(sizes)))
        for exchange in ("gather", "ring"):
            for rank, results in enumerate(ranks):
                found_value, *found, _ = results[name, exchange]
                torch.testing.assert_close(found_value, value, rtol=1e-10, atol=1e-12)
                for whole, part in zip(gradients, found, strict=True):
                    # W times the full batch's, for data-parallel averaging
                    expected = world * whole.split(sizes)[rank]
                    torch.testing.assert_close(part, expected, rtol=1e-10, atol=1e-12)
            averaged = sum(results[name, exchange][-1] for results in ranks) / world
            torch.testing.assert_close(averaged, scale, rtol=1e-10, atol=1e-12)


def test_strips_change_nothing_and_the_matrix_is_never_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    views = inputs(7)
    fast = LOSSES["correlation"][1]
    whole = value_and_gradients(fast, views)
    # two columns at a time
    monkeypatch.setattr(non_contrastive, "CHUNK_BYTES", 2 * WIDTH * 8)
    for a, b in zip(value_and_gradients(fast, views), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    saved: list[int] = []
    wide = torch.randn(4, 4096, requires_grad=True)
    pack = lambda tensor: saved.append(tensor.numel()) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cross_correlation_loss(wide, wide)
    assert sum(saved) <= 2 * wide.numel()


def test_frozen_sides_have_no_gradient() -> None:
    a, b = inputs(5)[:2]
    a.requires_grad_()
    cross_correlation_loss(a, b).backward()
    assert a.grad is not None and b.grad is None
    target = inputs(5)[2].requires_grad_()
    prediction_loss(a, target).backward()
    assert target.grad is None


def test_assignments_are_shares_of_all_columns() -> None:
    logits = 20 * torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    shares = assignments(logits.double(), iterations=50)
    torch.testing.assert_close(shares.sum(1), torch.ones(40, dtype=torch.float64))
    assert (shares.sum(0) - 1).abs().max() < 0.3
    # what a constant adds to all logits is taken out again
    torch.testing.assert_close(assignments(logits + 5), assignments(logits))
    assert torch.isfinite(assignments(1000 * logits)).all()


def test_low_precision_is_widened_and_returned() -> None:
    views = [view.float() for view in inputs(7)]
    rounded = [view.bfloat16() for view in views]
    for name, (_, fast) in LOSSES.items():
        leaves = [view.clone().requires_grad_() for view in rounded]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = fast(leaves, SCALE)
        assert loss.dtype == torch.float32
        exact = fast([view.double() for view in rounded], SCALE)
        # float32 through a few hundred terms of size one
        assert math.isclose(loss.item(), exact.item(), rel_tol=1e-5), name
        loss.backward()
        assert leaves[0].grad is not None and leaves[0].grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v: prediction_loss(v[0], v[1][:2]), r"prediction is \(7, 6\) and target \(2, 6\)"),
        (lambda v: prediction_loss(v[0][:0], v[1][:0]), "N at least 1"),
        (lambda v: cross_correlation_loss(v[0], v[1], scale=0.0), "scale"),
        (lambda v: swapped_assignment_loss(v[:1], v[2:], 1.0), "got 1 image and 2 text views"),
        (lambda v: swapped_assignment_loss(v[:2], v[2:], 1.0, iterations=0), "iterations is 0"),
        (lambda v: swapped_assignment_loss(v[:2], v[2:], 1.0, epsilon=-1.0), "epsilon"),
        (lambda v: prototype_assignment_loss(v[0], v[1], v[2][:, :3], 1.0), r"give \(K, 6\)"),
        (lambda v: prototype_assignment_loss(v[0], v[1][:2], v[2], 1.0), r"texts \(2, 6\)"),
        (lambda v: prototype_assignment_loss(v[0], v[1], v[2], 1.0, iterations=0), "iterations is"),
        (lambda v: prediction_loss(v[0], v[1], dist="gather"), "init_process_group"),
    ],
)
def test_mistakes(call: Callable[[list[Tensor]], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(inputs(7))


def test_prototypes_learn_from_their_predictions_alone() -> None:
    """Their gradient; the assignments, which they decide too, have none."""
    views = inputs(7)
    slow, fast = (PROTOTYPES.double().requires_grad_() for _ in range(2))
    prototype_assignment_loss(views[0], views[2], fast, SCALE).backward()
    terms = []
    for x, other in ((views[0], views[2]), (views[2], views[0])):
        target = slow_sinkhorn(other @ slow.T / 0.05)
        terms.append(-(target * (SCALE * x @ slow.T).log_softmax(1)).sum(1).mean())
    (sum(terms) / 2).backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-10, atol=1e-12)
