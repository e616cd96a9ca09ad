"""SigLIP's loss as a module, in place of `open_clip.SigLipLoss`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastclip.functional import siglip_loss
from fastclip.losses.base import Loss
from fastclip.ops.backend import check_backend
from fastclip.ops.checks import GroupRole, check_group_role, check_groups, checked_sizes
from fastclip.ops.collectives import ranks_of
from fastclip.ops.sigmoid import sigmoid_loss

_EXCHANGES = {"bidir": "ring", "shift": "ring", "reduce": "gather", "gather": "gather"}


class SigLipLoss(Loss):
    """Drop-in for `open_clip.SigLipLoss`: same arguments, call and value, memory linear in N.

    Args:
        cache_labels: accepted as in open_clip; nothing is cached.
        rank, world_size: this process's number in `group`, and how many there are; each compares
            its images with all texts. With several, multiply the loss by the same number on all
            processes: gradients of the texts are formed and exchanged in the forward.
        dist_impl: open_clip's four exchanges of texts, of one value and one gradient: with
            "gather" and "reduce" all texts come at once, with "bidir" and "shift" one rank's
            after the other. None: "gather".
        chunk_size: accepted as in open_clip; no matrix of all pairs is stored in any case, and
            `chunk_bytes` sizes the chunks here.
        group: the process group; None: the default one.
        sizes: rows of every process, where they differ; None: equally many. The value is then the
            own rows' sum times world_size / all rows, so that its average over the processes is
            the full batch's.
        group_role: of the ids that a call is given: "excluded": pairs of one id are no negatives of
            each other; "positive": they are positives.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.

    Raises:
        ValueError: dist_impl is unknown to open_clip, chunk_size is negative, or sizes that do
            not fit world_size.

    Examples:
        >>> import torch
        >>> from fastclip import SigLipLoss
        >>> loss = SigLipLoss()  # in place of open_clip.SigLipLoss()
        >>> scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
        >>> round(loss(torch.eye(3), torch.eye(3), scale, bias).item(), 4)
        0.6932
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        group: ProcessGroup | None = None,
        sizes: Sequence[int] | None = None,
        group_role: GroupRole = "excluded",
        backend: str = "auto",
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_group_role(group_role)
        check_backend(backend)
        if dist_impl is not None and dist_impl not in _EXCHANGES:
            raise ValueError(f"dist_impl is {dist_impl!r}; use one of {', '.join(_EXCHANGES)}")
        if chunk_size < 0:
            raise ValueError(f"chunk_size is {chunk_size}; give rows, or 0 for the default")
        self.sizes = checked_sizes(sizes, world_size)
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "gather"
        self.chunk_size = chunk_size
        self.group = group
        self.group_role: GroupRole = group_role
        self.backend = backend
        self.chunk_bytes = chunk_bytes

    def get_ground_truth(
        self,
        device: torch.device,
        dtype: torch.dtype,
        num_logits: int,
        negative_only: bool = False,
    ) -> Tensor:
        """(num_logits, num_logits) of -1, with 1 on the diagonal unless `negative_only`.

        Args:
            device, dtype: of the result.
            num_logits: rows of this process.
            negative_only: whether the columns are another process's.
        """
        labels = torch.full((num_logits, num_logits), -1.0, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1.0)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> Tensor:
        """Logits (N, N) of this rank's features, in full: for inspection, not for training.

        Args:
            image_features, text_features: (N, D), normalized.
            logit_scale: 0-d or (1,), exponentiated.
            logit_bias: 0-d, (1,) or None, added to every logit.
        """
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        output_dict: bool = False,
        *,
        row_group: Tensor | None = None,
        column_group: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-d, or {"contrastive_loss": loss} with output_dict.

        Args:
            image_features, text_features: (N, D), normalized.
            logit_scale: 0-d or (1,), exponentiated.
            logit_bias: 0-d, (1,) or None.
            output_dict: whether to return a dictionary.
            row_group, column_group: (N,) integer ids of the images and texts, both or neither;
                `group_role` says what one id in both means.
        """
        options: dict[str, Any] = {
            "row_group": row_group,
            "column_group": column_group,
            "backend": self.backend,
            "chunk_bytes": self.chunk_bytes,
        }
        if self.world_size == 1:
            options["group_role"] = self.group_role
            loss = siglip_loss(image_features, text_features, logit_scale, logit_bias, **options)
        else:
            n = image_features.shape[0]
            ids = {"row_group": (row_group, n), "column_group": (column_group, n)}
            options["positive_groups"] = check_groups(self.group_role, ids, image_features)
            ranks = ranks_of(_EXCHANGES[self.dist_impl], self.group, self.sizes, n)
            # the value is the own rows', as in open_clip; its gradient reaches all texts
            total = sigmoid_loss(
                image_features, text_features, logit_scale, logit_bias, ranks=ranks, **options
            )
            mean_rows = n if self.sizes is None else sum(self.sizes) / self.world_size
            loss = total / mean_rows
        return {"contrastive_loss": loss} if output_dict else loss
