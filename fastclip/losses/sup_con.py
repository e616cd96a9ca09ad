"""The supervised contrastive loss as a module."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastclip.functional import Exchange, sup_con_loss
from fastclip.ops.checks import check_positive
from fastclip.ops.collectives import check_exchange


class SupConLoss(nn.Module):
    """Supervised contrastive loss, L_out (Khosla et al. 2020), memory linear in the batch.

    Not a drop-in for other classes of this name: features are normalized by the caller, labels are
    integers, and the value has no factor temperature / base_temperature as SupContrast's.

    Args:
        temperature: > 0; similarities are divided by it.
        dist: None, or "gather" or "ring": processes share the loss. Features are then one
            process's rows, the loss is that of all, and gradients averaged over the processes
            (DDP) are the full batch's.
        group: the process group; None: the default one.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.

    Raises:
        ValueError: an unknown `dist`, a temperature that is not positive.

    Examples:
        >>> import torch
        >>> from fastclip import SupConLoss
        >>> loss = SupConLoss(temperature=0.5)
        >>> round(loss(torch.eye(3), torch.tensor([7, 7, 2])).item(), 4)
        0.6931
        >>> views = torch.eye(3)[:, None].expand(3, 2, 3)  # two views of each of three samples
        >>> round(loss(views).item(), 4)
        0.4327
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        dist: Exchange | None = None,
        group: ProcessGroup | None = None,
        backend: str = "auto",
        chunk_bytes: int | None = None,
        keep_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_exchange(dist)
        check_positive("temperature", temperature)
        self.temperature = temperature
        self.options: dict[str, Any] = {
            "dist": dist,
            "group": group,
            "backend": backend,
            "chunk_bytes": chunk_bytes,
            "keep_bytes": keep_bytes,
        }

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean over all anchors that have a positive, 0-d.

        Args:
            features: (N, D), or (N, V, D) with V views of each sample, normalized.
            labels: (N,) integers. None, only with views: every sample is a class of its own.

        Raises:
            ValueError: neither labels nor views, or shapes that do not fit.
        """
        if features.ndim == 3:
            samples, views, width = features.shape
            if labels is None:
                labels = torch.arange(samples, device=features.device)
            features = features.reshape(samples * views, width)
            labels = labels.repeat_interleave(views)
        if labels is None:
            raise ValueError("without labels features must be (N, V, D), with V views a sample")
        return sup_con_loss(
            features,
            labels,
            self.temperature,
            **self.options,
        )
