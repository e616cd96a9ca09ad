"""Heads: what projects towers' features, with batch statistics of all processes.

    linear_head   one product without bias (CLIP's projection)
    MLPHead       Linear - norm - ReLU, ..., Linear, as the improved baselines use it

A head belongs outside a gradient cache: its batch statistics need the whole batch.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_world_size, is_available, is_initialized

from fastclip.ops.checks import without_autocast
from fastclip.ops.collectives import all_reduce_sum_with_grad
from fastclip.ops.gemm import accumulator_dtype


class GlobalBatchNorm(nn.Module):
    """Batch normalization of rows by the statistics of all processes' rows, on any device.

    With one process it is `nn.BatchNorm1d`; with several it equals `nn.BatchNorm1d` on their rows
    together, gradients included, also where they have different numbers of rows.
    (`nn.SyncBatchNorm` refuses the CPU.) Statistics are computed in float32 or better.

    Args:
        width: D.
        eps: added to the variance.
        momentum: share of a batch in the running statistics, which serve in evaluation.
        affine: whether there are a learned scale and shift.
        group: the processes; None for all.

    Raises:
        ValueError: input that is not (N, D), or, of one process in training, a single row.

    Examples:
        >>> import torch
        >>> from fastclip.nn.heads import GlobalBatchNorm
        >>> norm = GlobalBatchNorm(3)
        >>> rows = norm(torch.arange(12.0).view(4, 3))
        >>> rows.mean(0).abs().max().item() < 1e-6, round(rows.var(0, correction=0)[0].item(), 4)
        (True, 1.0)
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        affine: bool = True,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.width, self.eps, self.momentum, self.group = width, eps, momentum, group
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, rows: Tensor) -> Tensor:
        """The normalized rows, (N, D), in their dtype.

        Args:
            rows: (N, D), this process's.

        Raises:
            ValueError: they are not (N, D), or in training one row in all.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"rows are {tuple(rows.shape)}; give (N, {self.width})")
        if not self.training:
            return F.batch_norm(
                rows, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        shared = is_available() and is_initialized() and get_world_size(self.group) > 1
        if len(rows) < 2 and not shared:
            raise ValueError("a batch of a single row has no variance; give at least 2")
        with without_autocast(rows.device):
            wide = rows.to(accumulator_dtype(rows.dtype))
            count = wide.new_full((1,), len(wide))
            sums = self._total(torch.cat([wide.sum(0), count]), shared)
            total = sums[-1]
            mean = sums[:-1] / total
            centered = wide - mean
            # from the centered rows: a difference of large sums would lose the variance
            variance = self._total(centered.square().sum(0), shared) / total
            self._track(mean.detach(), variance.detach(), total.detach())
            normalized = centered * (variance + self.eps).rsqrt()
            if self.weight is not None and self.bias is not None:
                normalized = normalized * self.weight + self.bias
            return normalized.to(rows.dtype)

    def _total(self, local: Tensor, shared: bool) -> Tensor:
        return all_reduce_sum_with_grad(local, self.group) if shared else local

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, total: Tensor) -> None:
        # a single row in all, which is not known here, has no unbiased variance
        unbiased = variance * total / (total - 1).clamp_min(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked += 1

    def extra_repr(self) -> str:
        # what is shown in the brackets of the module's text
        affine = self.weight is not None
        return f"{self.width}, eps={self.eps}, momentum={self.momentum}, affine={affine}"


class MLPHead(nn.Sequential):
    """Linear layers with batch normalization and ReLU between them.

    Args:
        widths: of the input, the hidden layers and the output; two or more.
        last_norm: of the output: None, "affine", or "plain" (without learned scale and shift).
        last_bias: whether the last layer has a bias; those before a normalization have none.
        group: the processes whose rows are normalized together; None for all.

    Raises:
        ValueError: fewer than two widths, one below 1, or another `last_norm`.

    Examples:
        >>> import torch
        >>> from fastclip.nn.heads import MLPHead
        >>> head = MLPHead((512, 4096, 256), last_norm="plain")
        >>> head(torch.randn(8, 512)).shape
        torch.Size([8, 256])
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        last_norm: str | None = None,
        last_bias: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths are {tuple(widths)}; give two or more, each at least 1")
        if last_norm not in (None, "affine", "plain"):
            raise ValueError(f"last_norm is {last_norm!r}; give None, 'affine' or 'plain'")
        layers: list[nn.Module] = []
        for before, after in pairwise(widths[:-1]):
            layers += [nn.Linear(before, after, bias=False), GlobalBatchNorm(after, group=group)]
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
        if last_norm is not None:
            layers.append(GlobalBatchNorm(widths[-1], affine=last_norm == "affine", group=group))
        super().__init__(*layers)


def linear_head(width: int, output: int) -> nn.Linear:
    """CLIP's projection: no bias, weights drawn with standard deviation width^-1/2.

    Args:
        width: of the features, (N, width).
        output: of their projections, (N, output).

    Returns:
        A layer whose `weight` is (output, width).

    Examples:
        >>> import torch
        >>> from fastclip.nn.heads import linear_head
        >>> linear_head(768, 512)(torch.zeros(8, 768)).shape
        torch.Size([8, 512])
    """
    head = nn.Linear(width, output, bias=False)
    nn.init.normal_(head.weight, std=width**-0.5)
    return head
