"""SupContrast's SupConLoss: the names, arguments, calls and values of the paper's own code."""

from typing import Any

import torch
from torch import Tensor

from fastclip.functional import sup_con_loss
from fastclip.losses.base import Loss
from fastclip.ops.checks import check_positive, without_autocast
from fastclip.ops.labels import label_statistics

_MODES = ("all", "one")


class SupContrastLoss(Loss):
    """Drop-in for SupContrast's `SupConLoss` (Khosla et al. 2020, eq. 2), memory linear in N.

    The mean over all anchors, those without a positive counting 0, of the paper's L_out times
    temperature / base_temperature. Features are normalized by the caller, as there. Also made by
    `SupConLoss.supcontrast(...)`.

    Args:
        temperature: > 0; similarities are divided by it.
        contrast_mode: "all": every view is an anchor; "one": each sample's first view is.
        base_temperature: > 0.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.

    Raises:
        ValueError: an unknown `contrast_mode`, a temperature that is not positive.

    Examples:
        >>> import torch
        >>> from fastclip.losses.sup_contrast import SupContrastLoss
        >>> loss = SupContrastLoss(temperature=0.5)
        >>> views = torch.eye(3)[:, None].expand(3, 2, 3)  # two views of each of three samples
        >>> round(loss(views).item(), 4)  # without labels, each sample a class: SimCLR
        3.0904
        >>> round(loss(views, torch.tensor([7, 7, 2])).item(), 4)
        9.4396
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        backend: str = "auto",
        chunk_bytes: int | None = None,
        keep_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        check_positive("base_temperature", base_temperature)
        if contrast_mode not in _MODES:
            raise ValueError(f"contrast_mode is {contrast_mode!r}; use one of {', '.join(_MODES)}")
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.options: dict[str, Any] = {
            "backend": backend,
            "chunk_bytes": chunk_bytes,
            "keep_bytes": keep_bytes,
        }

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss, 0-d.

        Args:
            features: (N, V, ...) with V views of each sample; what is behind V is one vector.
            labels: (N,) or (N, 1), of any real dtype. None: every sample is a class of its own.
            mask: (N, N), instead of labels: entry (i, j) is the weight of sample j among the
                positives of sample i, of 0 and 1 or any numbers; need not be symmetric, gets no
                gradient. Entries of a row should not add up to a negative number.

        Raises:
            ValueError: labels and a mask, fewer dimensions than three, or shapes that do not fit.
        """
        if features.ndim < 3:
            raise ValueError(
                f"features are {tuple(features.shape)}; give (N, V, ...), V views a sample"
            )
        if labels is not None and mask is not None:
            raise ValueError("labels and mask both say what is positive; give one of them")
        samples, views = features.shape[:2]
        # view after view: the first view's rows come first
        rows = features.reshape(samples, views, -1).transpose(0, 1).reshape(samples * views, -1)
        if mask is None:
            ids = _ids(labels, samples, features.device).repeat(views)
            each = sup_con_loss(rows, ids, self.temperature, reduction="none", **self.options)
        else:
            each = self._of_mask(rows, mask, samples, views)
        anchors = each if self.contrast_mode == "all" else each[:samples]
        return anchors.mean() * (self.temperature / self.base_temperature)

    def _of_mask(self, rows: Tensor, mask: Tensor, samples: int, views: int) -> Tensor:
        if mask.shape != (samples, samples):
            raise ValueError(
                f"mask is {tuple(mask.shape)} for {samples} samples; give ({samples}, {samples})"
            )
        scale = 1 / self.temperature
        one_class = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
        lse = label_statistics(rows, one_class, scale, **self.options).lse
        wide = rows.to(lse.dtype)
        weight = mask.detach().to(rows.device, lse.dtype)
        blocks = wide.reshape(views, samples, -1)
        own = weight.diagonal()
        # the weighted sum of a row's positives, of which it is none itself
        with without_autocast(rows.device):
            positives = weight @ blocks.sum(dim=0) - own[:, None] * blocks
        total = views * weight.sum(dim=1) - own
        # as in SupContrast: an anchor without a positive has loss 0
        divisor = torch.where(total < 1e-6, 1.0, total)
        share = total / divisor
        mean = scale * (blocks * positives).sum(dim=2) / divisor
        return (lse.reshape(views, samples) * share - mean).flatten()


def _ids(labels: Tensor | None, samples: int, device: torch.device) -> Tensor:
    """Integers that are equal where the labels are."""
    if labels is None:
        return torch.arange(samples, device=device)
    if labels.numel() != samples:
        raise ValueError(
            f"labels are {tuple(labels.shape)} for {samples} samples; give ({samples},)"
        )
    labels = labels.reshape(samples).to(device)
    if labels.is_floating_point():
        # equal numbers have equal bits, but for 0 and -0
        return (labels.double() + 0.0).view(torch.int64)
    return labels.long()
