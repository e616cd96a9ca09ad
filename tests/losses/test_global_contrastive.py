"""Global contrastive losses against their definition, dense and in float64, over 50 steps."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastclip import GlobalContrastiveLoss
from fastclip.functional import global_contrastive_loss
from fastclip.ops.gemm import count_products
from fastclip.train.accumulate import accumulate
from tests.ops.cases import unit
from tests.processes import on_ranks

SAMPLES, BATCH, STEPS, EPOCH = 20, 8, 50, 10
SIZES = {1: (8,), 2: (3, 5)}
EPS = 1e-14
VARIANTS: dict[str, dict[str, Any]] = {
    "sogclr": {"variant": "sogclr", "gamma": 0.7, "full_first_epoch": True},
    "v1": {"variant": "v1", "gamma_epochs": 3},
    "v3": {"variant": "v3", "gamma_epochs": 4, "rho": 6.5},
    "v3, constant gamma": {"variant": "v3", "gamma": 0.3, "rho": 2.0},
}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64) for _ in range(2)
    )


def batch_of(step: int) -> Tensor:
    """The samples of a step; in every third one comes three times, on both of two processes."""
    generator = torch.Generator().manual_seed(step)
    index = torch.randperm(SAMPLES, generator=generator)[:BATCH]
    if step % 3 == 0:
        index[[1, 6]] = int(index[4])
    return index


def begin() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(6, 4, generator=generator).double() for _ in range(2))
    return {"images": images, "texts": texts, "log_scale": torch.tensor(2.0).double()}


def features(weights: Mapping[str, Tensor], step: int, rows: slice = slice(None)) -> list[Tensor]:
    """Of a step's rows; each is another view of its sample, so that duplicates differ."""
    generator = torch.Generator().manual_seed(100 + step)
    found = []
    for raw, name in zip(data(), ("images", "texts"), strict=True):
        noise = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
        views = (raw[batch_of(step)] + noise / 3)[rows]
        found.append(nn.functional.normalize(views @ weights[name], dim=-1))
    return found


class Definition:
    """The algorithm as the papers have it: exponentials, averages that are not logs, all pairs."""

    def __init__(self, name: str) -> None:
        self.name, self.rho = name, VARIANTS[name].get("rho")
        self.u: list[dict[int, float]] = [{}, {}]
        self.weights = begin()

    def gamma(self, epoch: int) -> float:
        if self.name == "sogclr":
            return 1.0 if epoch == 0 else 0.7
        if self.name == "v3, constant gamma":
            return 0.3
        over = {"v1": 3, "v3": 4}[self.name]
        if epoch >= over:
            return 0.2
        return 0.5 * (1 + math.cos(math.pi * epoch / over)) * (1 - 0.2) + 0.2

    def step(self, step: int) -> dict[str, Tensor]:
        """The gradients of the step, which is made."""
        index = batch_of(step)
        leaves = {name: value.clone().requires_grad_() for name, value in self.weights.items()}
        x, y = features(leaves, step)
        tau = 1 / leaves["log_scale"].exp()
        gamma, mean_g, mean_log_u = self.gamma(step // EPOCH), [], []
        for side, (own, other) in enumerate(((x, y), (y, x))):
            cos = own @ other.T
            terms = ((cos - cos.diagonal()[:, None]) / tau).exp() * (1 - torch.eye(BATCH).double())
            g = terms.sum(1) / (BATCH - 1)
            for sample in set(index.tolist()):
                value = g.detach()[index == sample].mean().item()
                old = self.u[side].get(sample)
                new = value if old is None else (1 - gamma) * old + gamma * value
                self.u[side][sample] = new
            u = torch.tensor([self.u[side][i] for i in index.tolist()], dtype=torch.float64)
            mean_g.append((g / (EPS + u)).mean())
            mean_log_u.append(u.log().mean())
        inner, outer = sum(mean_g) / 2, sum(mean_log_u) / 2
        if self.rho is not None:
            # the first term's value is the wrong one and its gradient the right one
            value = tau * (outer + self.rho)
            (tau.detach() * inner + value).backward()
        else:
            value = outer
            inner.backward()
            leaves["log_scale"].grad = torch.zeros(()).double()
        found = {name: leaf.grad for name, leaf in leaves.items()}
        self.weights = {name: self.weights[name] - 0.1 * grad for name, grad in found.items()}
        return {**found, "loss": value.detach()}

    def log_u(self) -> Tensor:
        seen = [[self.u[side].get(i, 0.0) for i in range(SAMPLES)] for side in range(2)]
        return torch.tensor(seen, dtype=torch.float64).log()


def ours(name: str, world: int) -> GlobalContrastiveLoss:
    shared = {"dist": "ring" if name == "v1" else "gather"} if world > 1 else {}
    return GlobalContrastiveLoss(SAMPLES, dtype=torch.float64, **VARIANTS[name], **shared)


def train(
    name: str, steps: range, start: Mapping[str, Any] | None = None, rank: int = 0, world: int = 1
) -> dict[str, Any]:
    """Steps on this process's rows, gradients averaged; what a checkpoint holds, and gradients."""
    loss = ours(name, world)
    weights = begin()
    if start is not None:
        loss.load_state_dict(start["loss"])
        weights = dict(start["weights"])
    first, sizes = sum(SIZES[world][:rank]), SIZES[world]
    own = slice(first, first + sizes[rank])
    gradients = []
    for step in steps:
        loss.set_epoch(step // EPOCH)
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        options = {"sizes": sizes} if world > 1 else {}
        index, scale = batch_of(step)[own], leaves["log_scale"].exp()
        value = loss(*features(leaves, step, own), scale, index, **options)
        value.backward()
        found = {}
        for key, leaf in leaves.items():
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            if world > 1:
                torch.distributed.all_reduce(gradient)
            found[key] = gradient / world
        weights = {key: weights[key] - 0.1 * gradient for key, gradient in found.items()}
        gradients.append({**found, "loss": value.detach()})
    return {"loss": loss.state_dict(), "weights": weights, "gradients": gradients}


@functools.cache
def defined(name: str) -> tuple[list[dict[str, Tensor]], Definition]:
    dense = Definition(name)
    return [dense.step(step) for step in range(STEPS)], dense


def assert_as_defined(name: str, parts: list[dict[str, Any]], first: int = 0) -> None:
    """Gradients, losses, weights (the temperature among them) and estimates."""
    steps, dense = defined(name)
    found = [step for part in parts for step in part["gradients"]]
    assert len(found) == STEPS - first
    for got, want in zip(found, steps[first:], strict=True):
        for key, value in want.items():
            assert (got[key] - value).abs().max() <= 1e-10 * max(1.0, value.abs().max()), key
    for key, value in dense.weights.items():
        assert (parts[-1]["weights"][key] - value).abs().max() <= 1e-10
    log_u, wanted = parts[-1]["loss"]["log_u"], dense.log_u()
    seen = wanted.isfinite()
    assert torch.equal(log_u.isfinite(), seen)
    assert (log_u - wanted)[seen].abs().max() <= 1e-10


@pytest.mark.parametrize("name", VARIANTS)
def test_fifty_steps_and_a_resume_between_are_as_defined(name: str) -> None:
    half = train(name, range(25))
    assert_as_defined(name, [half, train(name, range(25, STEPS), half)])
    moved = half["weights"]["log_scale"] != begin()["log_scale"]
    assert bool(moved) == ("v3" in name)


def share(rank: int, folder: Path) -> None:
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for name in VARIANTS:
        half = train(name, range(25), rank=rank, world=2)
        results[name] = [half, train(name, range(25, STEPS), half, rank, 2)]
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.dist
def test_two_processes_are_as_defined_and_one_resumes_from_them(tmp_path: Path) -> None:
    """With uneven batches, and samples that come on both."""
    on_ranks(share, (tmp_path,), ranks=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in VARIANTS:
        for results in ranks:
            assert_as_defined(name, results[name])
        states = [results[name][-1]["loss"]["log_u"] for results in ranks]
        assert torch.equal(*states)
        half = ranks[1][name][0]
        assert_as_defined(name, [train(name, range(25, STEPS), half)], first=25)


def case(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor]:
    """Features and scale as leaves, index, and estimates of which half have been visited."""
    leaves = [unit(9, 5, seed).to(dtype) for seed in (0, 1)]
    leaves.append(torch.tensor(7.0, dtype=dtype))
    log_u = torch.linspace(-3, 2, 40).view(2, 20).clone()
    log_u[:, ::2] = -torch.inf
    index = torch.tensor([3, 0, 19, 4, 3, 11, 2, 7, 5])
    return [leaf.requires_grad_() for leaf in leaves], index, log_u


@pytest.mark.parametrize("rho", [None, 6.5])
def test_each_pairs_loss_and_every_implementation_agree(rho: float | None) -> None:
    results = []
    for options in ({"reduction": "none"}, {}, {"backend": "reference"}, {"keep_bytes": 0}):
        leaves, index, log_u = case()
        found = global_contrastive_loss(*leaves, index, log_u.double(), 0.3, rho=rho, **options)
        assert found.shape == ((9,) if "reduction" in options else ())
        loss = found.mean()
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 24])
def test_it_costs_what_clip_costs(keep_bytes: int) -> None:
    """In products and in what is saved for the backward."""
    rows, width = 512, 8
    leaves = [unit(rows, width, seed).float().requires_grad_() for seed in (0, 1)]
    log_u, saved = torch.full((2, rows), -torch.inf), []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with count_products() as counted, hooks:
        loss = global_contrastive_loss(
            *leaves, 9.0, torch.arange(rows), log_u, 0.3, rho=6.5, keep_bytes=keep_bytes
        )
        loss.backward()
    assert counted.products_of(rows, rows, width) == (3 if keep_bytes else 4)
    square = [numel for numel in saved if numel > rows * width]
    assert sum(square) == (rows * rows if keep_bytes else 0)


def test_low_precision_keeps_the_error_rule() -> None:
    """Eager code in the same dtype is the yardstick."""

    def eager(x: Tensor, y: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        S = scale * (x @ y.T)
        others = S.masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf)
        log_g = torch.stack([others.logsumexp(dim) for dim in (1, 0)]) - S.diagonal()
        return (weight.to(S.dtype) * log_g).mean()

    for dtype in (torch.float32, torch.bfloat16):
        leaves, index, log_u = case(dtype)
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        loss = global_contrastive_loss(*leaves, index, log_u, 0.3)
        assert loss.dtype == torch.float32 and log_u.dtype == torch.float32
        found = torch.autograd.grad(loss, leaves)
        _, index, before = case()
        before = before.double()
        wanted = torch.autograd.grad(global_contrastive_loss(*exact, index, before, 0.3), exact)
        # the weights g / u, whose errors are the logs' own
        S = (exact[2] * (exact[0] @ exact[1].T)).detach()
        others = S.masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf)
        log_g = torch.stack([others.logsumexp(dim) for dim in (1, 0)]) - S.diagonal() - math.log(8)
        weight = (log_g - before[:, index]).exp()
        theirs = torch.autograd.grad(eager(*leaves, weight), leaves)
        for ours, eagers, want in zip(found, theirs, wanted, strict=True):
            assert ours.dtype == dtype
            error, limit = ((g.double() - want).abs().max() for g in (ours, eagers))
            assert error <= 2 * limit + 16 * torch.finfo(dtype).eps * want.abs().max()


def test_it_is_traced_whole() -> None:
    """What it remembers is changed in a compiled graph as without one."""
    leaves, index, log_u = case(torch.float32)
    plain, compiled = log_u.clone(), log_u.clone()
    wanted = global_contrastive_loss(*leaves, index, plain, 0.3, rho=6.5)
    function = torch.compile(global_contrastive_loss, fullgraph=True, backend="eager")
    found = function(*leaves, index, compiled, 0.3, rho=6.5)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(compiled, plain)
    gradients = (torch.autograd.grad(loss, leaves) for loss in (found, wanted))
    torch.testing.assert_close(*gradients)


def test_in_evaluation_nothing_is_remembered() -> None:
    leaves, index, _ = case()
    loss = GlobalContrastiveLoss(20, dtype=torch.float64)
    loss(*leaves, index)
    kept = loss.log_u.clone()
    half = [leaf.detach().roll(1, 0) if leaf.ndim else leaf for leaf in leaves]
    value = loss.eval()(*half, index)
    assert torch.equal(loss.log_u, kept)
    torch.testing.assert_close(loss.train()(*half, index), value)
    assert not torch.equal(loss.log_u, kept)


def test_what_is_not_finite_is_not_stored() -> None:
    leaves, index, _ = case()
    loss = GlobalContrastiveLoss(20, dtype=torch.float64)
    loss(*leaves, index)
    kept = loss.log_u.clone()
    broken = leaves[0].detach().clone()
    broken[2, 1] = torch.nan
    assert loss(broken, *leaves[1:], index).isnan()
    assert torch.equal(loss.log_u.isfinite(), kept.isfinite())


def test_micro_batches_move_the_estimates_once() -> None:
    index = case()[1]
    results = []
    for batches in ([slice(0, 9)], [slice(0, 4), slice(4, 9)]):
        loss = GlobalContrastiveLoss(20, "v1", dtype=torch.float64)
        images, texts, scale = leaves = case()[0]

        def forward(
            rows: slice, images: Tensor = images, texts: Tensor = texts, scale: Tensor = scale
        ) -> dict[str, Tensor]:
            x, y = images[rows], texts[rows]
            return {"x": x, "y": y, "logit_scale": scale, "index": index[rows]}

        def of_all(out: dict[str, Tensor], loss: GlobalContrastiveLoss = loss) -> Tensor:
            return loss(out["x"], out["y"], out["logit_scale"], out["index"])

        # the second time there is something to move
        for _ in range(2):
            accumulate(forward, batches, of_all)
            loss.current_gamma = 0.3
        results.append([leaves[0].grad, leaves[1].grad, loss.log_u])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-13)


def test_gamma_falls_over_epochs() -> None:
    loss = GlobalContrastiveLoss(4, "v1", gamma=0.4, gamma_epochs=2)
    found = []
    for epoch in range(4):
        loss.set_epoch(epoch)
        found.append(loss.current_gamma)
    assert found == pytest.approx([1.0, 0.7, 0.4, 0.4])
    constant = GlobalContrastiveLoss(4, "sogclr", full_first_epoch=True)
    assert constant.current_gamma == 1.0
    constant.set_epoch(1)
    assert constant.current_gamma == 0.8


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "index beyond": ({"index": torch.tensor([0, 1, 20])}, "index 20 is outside .* 20 samples"),
    "index below 0": ({"index": torch.tensor([0, -2, 1])}, "index -2 is outside .* count from 0"),
    "index of another length": ({"index": torch.tensor([0, 1])}, r"index is \(2,\) .* give \(3,\)"),
    "index not integer": ({"index": torch.zeros(3)}, r"in torch.float32; give \(3,\) integers"),
    "estimates of one side": ({"log_u": torch.zeros(1, 20)}, r"\(1, 20\) .* give \(2, K\)"),
    "estimates in 16 bits": ({"log_u": torch.zeros(2, 20).half()}, "in float32 or float64"),
    "estimates elsewhere": ({"log_u": torch.zeros(2, 20, device="meta")}, "on meta.* device, cpu"),
    "gamma 0": ({"gamma": 0.0}, r"gamma is 0.0; give a number in \(0, 1\]"),
    "rho below 0": ({"rho": -1.0}, "rho is -1.0; give a number of at least 0"),
    "eps 0": ({"eps": 0.0}, "eps is 0.0; give a positive number"),
    "more texts": ({"text_features": torch.eye(4, 3)}, "3 images and 4 texts"),
    "one pair": (
        {"image_features": torch.eye(1), "text_features": torch.eye(1), "index": torch.tensor([0])},
        "a batch of 1 pair has no negatives",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_refused_and_nothing_remembered(name: str) -> None:
    changed, message = WRONG[name]
    log_u = torch.full((2, 20), -torch.inf)
    given = {
        "image_features": torch.eye(3),
        "text_features": torch.eye(3),
        "logit_scale": 2.0,
        "index": torch.tensor([0, 1, 19]),
        "log_u": log_u,
        "gamma": 0.2,
    }
    with pytest.raises(ValueError, match=message):
        global_contrastive_loss(**{**given, **changed})
    assert log_u.isinf().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "v2"}, "'v2', a temperature for each sample, is not supported; use 'v3'"),
        ({"variant": "v4"}, "variant is 'v4'; use one of sogclr, v1, v3"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"gamma_epochs": 0}, "gamma_epochs is 0 .* at least 1"),
        ({"variant": "sogclr", "gamma_epochs": 3}, "gamma_epochs is 3 with variant 'sogclr'"),
        ({"dtype": torch.float16}, "dtype is torch.float16; give torch.float32 or torch.float64"),
        ({"dist": "star"}, "dist is 'star'"),
    ],
)
def test_a_module_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlobalContrastiveLoss(**{"num_samples": 4, **options})
