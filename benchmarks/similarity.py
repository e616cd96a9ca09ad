"""The CLIP loss beside its rivals: forward and backward, every gradient."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.bench.runner import Rival
from fastclip.functional import clip_loss

Inputs = tuple[Tensor, Tensor, Tensor]


def make_inputs(n: int, width: int, dtype: torch.dtype, device: str, scale: float) -> Inputs:
    """Clustered unit features with a positive correlation of about 0.3, requiring gradients."""
    generator = torch.Generator().manual_seed(n + width)
    x, noise = (torch.randn(n, width, generator=generator) for _ in range(2))
    y = 0.3 * F.normalize(x, dim=-1) + 0.95 * F.normalize(noise, dim=-1)
    pair = [F.normalize(t, dim=-1).to(device, dtype).requires_grad_() for t in (x, y)]
    return *pair, torch.tensor(scale, device=device, requires_grad=True)


def rivals(inputs: Inputs, autocast: bool) -> list[Rival]:
    """fastclip, the bare products that any exact way needs, and open_clip last (the baseline)."""
    import open_clip

    device = inputs[0].device.type

    def full(loss_function: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            for tensor in inputs:
                tensor.grad = None
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss = loss_function(*inputs)
            loss.backward()

        return run

    x, y = (tensor.detach().float() for tensor in inputs[:2])

    def bare() -> None:
        # S twice and both gradients, in chunks like ours
        for _ in range(2):
            for rows in x.split(512):
                S = rows @ y.T
        for rows in x.split(512):
            S[: len(rows)] @ y
            S[: len(rows)].T @ rows

    return [
        Rival("fastclip", full(clip_loss)),
        Rival("four bare products", bare),
        Rival("open_clip", full(open_clip.ClipLoss())),
    ]


def error(n: int, width: int, device: str, autocast: bool) -> float:
    """Relative error of dX, as it will be timed, against the dense float64 reference."""
    inputs = make_inputs(n, width, torch.float32, device, 14.3)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = clip_loss(*inputs)
    (got,) = torch.autograd.grad(loss, inputs[0])
    (want,) = torch.autograd.grad(clip_loss(*exact, backend="reference"), exact[0])
    return ((got.double() - want).norm() / want.norm()).item()
