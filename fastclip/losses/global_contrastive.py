"""Global contrastive losses as a module that remembers an estimate of every sample."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastclip.functional import Exchange, global_contrastive_loss
from fastclip.functional.global_contrastive import GAMMAS, RHO, check_options, check_variant
from fastclip.losses.base import Loss
from fastclip.ops.backend import check_backend
from fastclip.ops.collectives import check_exchange


class GlobalContrastiveLoss(Loss):
    """Contrastive loss over the whole data: SogCLR's, FastCLIP's v1 or v3.

    A published answer to small batches: a moving average for each sample stands for the negatives
    that are not in the batch. `log_u`, a buffer of 2 x num_samples, holds the logs of these
    averages for images and texts: 8 bytes a sample in float32, on every process, and part of
    `state_dict()`. In training mode a forward moves those of the batch; in evaluation mode none.

    Sources: Yuan et al. 2022 (SogCLR), arXiv:2202.12387; Wei et al. 2024 (FastCLIP),
    arXiv:2407.01445.

    Args:
        num_samples: how many samples the data have; an index is below it.
        variant: "sogclr": constant gamma and temperature. "v1": gamma falls over `gamma_epochs`.
            "v3": as v1, with a learned temperature, by which the loss is multiplied, and `rho`.
        gamma: in (0, 1]: how much of an average is replaced by the batch's value; the value it
            falls to in v1 and v3. None: 0.8 for sogclr, 0.2 for v1 and v3.
        gamma_epochs: epochs over which gamma falls from 1, by half a cosine; with v1 and v3. None:
            it is constant.
        full_first_epoch: whether gamma is 1 in epoch 0 where it is constant, too, as FastCLIP's
            code has it.
        rho: of v3, at least 0; how strongly a low temperature is resisted.
        eps: positive; bounds the weight of a pair.
        dtype: of the averages, float32 or float64.
        dist: None, or "gather" or "ring" where processes share the loss, as in
            `fastclip.functional.global_contrastive_loss`.
        group: the process group; None: the default one.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.

    Attributes:
        gamma: as given, or the variant's default.
        current_gamma: of the epoch that `set_epoch` named; at first of epoch 0.

    Raises:
        ValueError: an option is unknown or out of range.

    Examples:
        >>> import torch
        >>> from fastclip import GlobalContrastiveLoss
        >>> loss = GlobalContrastiveLoss(num_samples=100, gamma_epochs=4)
        >>> loss.set_epoch(2)
        >>> round(loss.current_gamma, 4)  # halfway from 1 to 0.2
        0.6
        >>> images, texts, index = torch.eye(3), torch.eye(3), torch.tensor([4, 99, 7])
        >>> loss(images, texts, torch.tensor(2.0), index)
        tensor(2.2500)
    """

    log_u: Tensor

    def __init__(
        self,
        num_samples: int,
        variant: str = "v3",
        *,
        gamma: float | None = None,
        gamma_epochs: int | None = None,
        full_first_epoch: bool = False,
        rho: float = RHO,
        eps: float = 1e-14,
        dtype: torch.dtype = torch.float32,
        dist: Exchange | None = None,
        group: ProcessGroup | None = None,
        backend: str = "auto",
        chunk_bytes: int | None = None,
        keep_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_exchange(dist)
        check_backend(backend)
        check_variant(variant)
        if num_samples < 1:
            raise ValueError(
                f"num_samples is {num_samples}; give the number of samples in the data"
            )
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype}; give torch.float32 or torch.float64")
        if gamma_epochs is not None and (variant == "sogclr" or gamma_epochs < 1):
            raise ValueError(
                f"gamma_epochs is {gamma_epochs} with variant {variant!r}; give at least 1, with "
                "'v1' or 'v3'"
            )
        self.num_samples = num_samples
        self.variant = variant
        self.gamma = GAMMAS[variant] if gamma is None else gamma
        self.gamma_epochs = gamma_epochs
        self.full_first_epoch = full_first_epoch
        self.rho = rho if variant == "v3" else None
        self.eps = eps
        check_options(self.gamma, rho, eps)
        self.options: dict[str, Any] = {
            "dist": dist,
            "group": group,
            "backend": backend,
            "chunk_bytes": chunk_bytes,
            "keep_bytes": keep_bytes,
        }
        self.register_buffer("log_u", torch.full((2, num_samples), -math.inf, dtype=dtype))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set `current_gamma` to that of an epoch; call it before each, on all processes.

        Args:
            epoch: from 0 on.
        """
        last, over = self.gamma, self.gamma_epochs
        self.current_gamma = last
        if epoch == 0 and self.full_first_epoch:
            self.current_gamma = 1.0
        elif over is not None and epoch < over:
            self.current_gamma = last + (1 - last) * (1 + math.cos(math.pi * epoch / over)) / 2

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        index: Tensor,
        output_dict: bool = False,
        *,
        sizes: Sequence[int] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-d, or {"contrastive_loss": loss} with output_dict.

        Args:
            image_features, text_features: (N, D), normalized; text i belongs to image i.
            logit_scale: 0-d or (1,), exponentiated. Only v3 gives it a gradient.
            index: (N,) integers below num_samples, the pairs' places in the data.
            output_dict: whether to return a dictionary.
            sizes: with `dist`, rows of every process; None: equally many.
        """
        if isinstance(logit_scale, Tensor) and self.rho is None:
            logit_scale = logit_scale.detach()
        loss = global_contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            index,
            self.log_u,
            self.current_gamma,
            rho=self.rho,
            eps=self.eps,
            update=self.training,
            sizes=sizes,
            **self.options,
        )
        return {"contrastive_loss": loss} if output_dict else loss
