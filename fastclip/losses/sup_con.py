"""The supervised contrastive loss as a module."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastclip.functional import Exchange, sup_con_loss
from fastclip.losses.base import Loss
from fastclip.losses.metric_learning import MetricLearningSupConLoss
from fastclip.losses.sup_contrast import SupContrastLoss
from fastclip.ops.backend import check_backend
from fastclip.ops.checks import check_positive
from fastclip.ops.collectives import check_exchange


class SupConLoss(Loss):
    """Supervised contrastive loss, L_out (Khosla et al. 2020), memory linear in the batch.

    Features are normalized by the caller and labels are integers. Drop-ins for other libraries'
    classes of this name are `SupConLoss.supcontrast(...)` and `SupConLoss.metric_learning(...)`.

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
        check_backend(backend)
        check_positive("temperature", temperature)
        self.temperature = temperature
        self.options: dict[str, Any] = {
            "dist": dist,
            "group": group,
            "backend": backend,
            "chunk_bytes": chunk_bytes,
            "keep_bytes": keep_bytes,
        }

    @staticmethod
    def supcontrast(
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        **options: Any,
    ) -> SupContrastLoss:
        """SupContrast's loss: `loss(features, labels=None, mask=None)` with its values.

        Args:
            temperature: > 0; similarities are divided by it.
            contrast_mode: "all": every view is an anchor; "one": each sample's first view is.
            base_temperature: > 0; the loss is multiplied by temperature / base_temperature.
            options: backend, chunk_bytes and keep_bytes, of this class.

        Raises:
            ValueError: an unknown `contrast_mode`, a temperature that is not positive.
        """
        return SupContrastLoss(temperature, contrast_mode, base_temperature, **options)

    @staticmethod
    def metric_learning(temperature: float = 0.1, **options: Any) -> MetricLearningSupConLoss:
        """pytorch-metric-learning's loss: `loss(embeddings, labels)` with its values.

        Args:
            temperature: > 0; similarities are divided by it.
            options: distance (a cosine or dot-product similarity of that library) and reducer
                (its AvgNonZeroReducer); backend, chunk_bytes and keep_bytes, of this class.

        Raises:
            ValueError: a temperature that is not positive, a distance or reducer of another kind.
        """
        return MetricLearningSupConLoss(temperature, **options)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean over all anchors that have a positive, 0-d.

        Args:
            features: (N, D), or (N, V, D) with V views of each sample, normalized.
            labels: (N,) integers. None, only with views: every sample is a class of its own.

        Raises:
            ValueError: neither labels nor views, or shapes that do not fit.
        """
        if features.ndim not in (2, 3):
            raise ValueError(
                f"the features have shape {tuple(features.shape)}; give (N, D), or (N, V, D) with "
                "V views a sample"
            )
        if features.ndim == 3:
            samples, views, width = features.shape
            if labels is None:
                labels = torch.arange(samples, device=features.device)
                if self.options["dist"] is not None:
                    # each process has samples of its own
                    labels += samples * torch.distributed.get_rank(self.options["group"])
            if labels.shape != (samples,):
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)}; one a sample, ({samples},)"
                )
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
