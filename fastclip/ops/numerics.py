"""Scalar functions that every implementation shares, and where their values end."""

import torch
from torch import Tensor


def softplus(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """log(1 + exp(x)); torch's own is the identity above 20, an error of 2e-9 in float64."""
    if x.dtype == torch.float64:
        return torch.logaddexp(x, x.new_zeros(()), out=out)
    if out is None:
        return torch.nn.functional.softplus(x)
    found: Tensor = torch.ops.aten.softplus.out(x, out=out)
    return found


def finite(anchor: Tensor) -> Tensor:
    """-inf replaced by 0, so that -inf - anchor is -inf and not NaN; NaN stays."""
    return anchor.masked_fill(anchor == -torch.inf, 0)


def largest_logit(dtype: torch.dtype) -> float:
    """The bound of |S| that is held in `dtype`."""
    return 2 / torch.finfo(dtype).eps


def away_from_zero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in the accumulator's dtype, with a magnitude that sums of G * S can be divided by.

    S of the least scale lies far below a rounding of any sum it enters, so statistics are those of
    a scale of 0, and the division still finds sums of G * cos: the scale's gradient.
    """
    scale = scale.to(dtype)
    least = torch.finfo(dtype).tiny ** 0.25
    return torch.where(scale.abs() < least, least, scale)
