"""Losses are the same whatever torch's default dtype and device are, and read no other memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.functional import (
    attention,
    clip_loss,
    distillation_loss,
    global_contrastive_loss,
    info_nce_loss,
    mil_nce_loss,
    mp_nce_loss,
    nt_xent_loss,
    ranking_loss,
    siglip_loss,
    similarity_statistics,
    sup_con_loss,
)

N, D = 12, 8
BACKENDS = ("auto", "cpp", "torch", "reference")
# of operators with other implementations
FEWER = {"distillation": ("auto", "torch", "reference"), "attention": ("auto", "reference")}
Loss = Callable[..., Tensor]


def metered(loss: Loss, *inputs: object, **options: object) -> Tensor:
    metrics: dict[str, Tensor] = {}
    value = loss(*inputs, metrics=metrics, **options)
    return torch.stack([value, *(m.to(value) for m in metrics.values())])


WEIGHT = ((1.0, 0.5), (0.5, 0.25))
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, str], Tensor]] = {
    "clip": lambda a, b, s, k: metered(clip_loss, a, b, s, label_smoothing=0.1, backend=k),
    "clip, a number": lambda a, b, s, k: clip_loss(a, b, 9.0, backend=k, reduction="none"),
    "siglip": lambda a, b, s, k: siglip_loss(a, b, s, s.detach() - 12, backend=k),
    "mp-nce": lambda a, b, s, k: mp_nce_loss([a, b], [0, 1], s, 0.5, pair_weight=WEIGHT, backend=k),
    "mil-nce": lambda a, b, s, k: mil_nce_loss([a, b], [0, 1], s, backend=k),
    "nt-xent": lambda a, b, s, k: metered(nt_xent_loss, a, b, 1 / s, backend=k),
    "sup-con": lambda a, b, s, k: sup_con_loss(
        torch.cat([a, b]), torch.arange(2 * N, device="cpu") % 3, 1 / s, backend=k
    ),
    "info-nce": lambda a, b, s, k: metered(info_nce_loss, a, b, s, backend=k),
    "info-nce, bank": lambda a, b, s, k: info_nce_loss(
        a, b, s, torch.arange(N, device="cpu").flip(0), bank=-b.detach(), backend=k
    ),
    "ranking": lambda a, b, s, k: ranking_loss(a, [b], s, backend=k),
    "distillation": lambda a, b, s, k: distillation_loss(
        a, b, s, b.detach(), a.detach(), 7.0, backend=k
    ),
    "global": lambda a, b, s, k: global_contrastive_loss(
        *(a, b, s, torch.arange(N, device="cpu")),
        *(torch.full((2, N), -1.0, dtype=torch.float32, device="cpu"), 0.8),
        backend=k,
    ),
    "statistics": lambda a, b, s, k: similarity_statistics(a, b, s, backend=k).row_lse.sum(),
    "attention": lambda a, b, s, k: attention(
        *(one.reshape(2, 2, 3, D) for one in (a, b, a)), backend=k
    ),
}


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(N, D, generator=generator), dim=1) for _ in range(2))
    return a.requires_grad_(), b.requires_grad_(), torch.tensor(9.0, requires_grad=True)


def value_and_gradients(name: str, backend: str, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    found = LOSSES[name](*leaves, backend)
    found.backward(torch.ones_like(found))
    return [found.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(
    "name, backend", [(name, one) for name in LOSSES for one in FEWER.get(name, BACKENDS)]
)
def test_defaults_of_torch_change_nothing(name: str, backend: str) -> None:
    known = value_and_gradients(name, backend, inputs())
    for dtype, device in (
        (torch.float64, "cpu"),
        (torch.bfloat16, "cpu"),
        # as a user's default "cuda" would be: not where the features are
        (torch.float32, "meta"),
    ):
        leaves = inputs()
        with defaults(dtype, device):
            found = value_and_gradients(name, backend, leaves)
        assert len(found) == len(known)
        for one, other in zip(found, known, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), (dtype, device)


@pytest.mark.parametrize("name", ["clip", "siglip", "mp-nce", "info-nce, bank", "attention"])
def test_a_negated_view_is_read_with_its_sign(name: str) -> None:
    known = value_and_gradients(name, "auto", inputs())
    a, b, scale = inputs()
    view = torch._neg_view(-a.detach()).requires_grad_()
    found = value_and_gradients(name, "auto", (view, b, scale))
    for one, other in zip(found, known, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value, keys", [(-1, N), (-100, N), (N, N), (2 * N, 2 * N)])
def test_an_index_out_of_range_is_refused(backend: str, value: int, keys: int) -> None:
    a, b, scale = inputs()
    index = torch.arange(N)
    index[3] = value
    y = torch.cat([b] * (keys // N))
    with pytest.raises(
        ValueError, match=f"positive_index has {value}; give one of 0 to {keys - 1}"
    ):
        info_nce_loss(a, y, scale, index, backend=backend)
    with pytest.raises(ValueError, match=f"positive_index has {value}; give one of 0"):
        similarity_statistics(
            a, y, scale, positive_index=index, column_statistics=False, backend=backend
        )
