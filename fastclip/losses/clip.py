"""CLIP's loss as a module, in place of `open_clip.ClipLoss`."""

import torch
from torch import Tensor, nn

from fastclip.functional import clip_loss


class ClipLoss(nn.Module):
    """Drop-in for `open_clip.ClipLoss`: same arguments, call and value, memory linear in N.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: open_clip's.
            This version computes the loss of one process: world_size must be 1.
        label_smoothing: see `fastclip.functional.clip_loss`.
        backend, chunk_bytes: see `fastclip.functional.clip_loss`.

    Raises:
        ValueError: world_size is not 1, or Horovod is asked for.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        label_smoothing: float = 0.0,
        backend: str = "auto",
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod=True: Horovod is not supported, use torch.distributed")
        if world_size != 1:
            raise ValueError(
                f"world_size is {world_size}: this version of fastclip computes the loss of one "
                "process only; keep open_clip.ClipLoss for several"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.label_smoothing = label_smoothing
        self.backend = backend
        self.chunk_bytes = chunk_bytes

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The index of each row's positive, (num_logits,) int64; open_clip's subclasses call it."""
        return torch.arange(num_logits, device=device, dtype=torch.long)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits per image (N, M) and per text (M, N), in full: for inspection, not for training.

        Args: as `forward`'s.
        """
        logits_per_image = logit_scale * image_features @ text_features.T
        if logit_bias is not None:
            logits_per_image = logits_per_image + logit_bias
        return logits_per_image, logits_per_image.T

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-d, or {"contrastive_loss": loss} with output_dict.

        Args:
            image_features: (N, D), normalised.
            text_features: (M, D), normalised, M >= N; those beyond the N-th are hard negatives.
            logit_scale: 0-d or (1,), exponentiated.
            logit_bias: 0-d, (1,) or None; cancels in this loss.
            output_dict: whether to return a dictionary.
        """
        loss = clip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            label_smoothing=self.label_smoothing,
            backend=self.backend,
            chunk_bytes=self.chunk_bytes,
        )
        return {"contrastive_loss": loss} if output_dict else loss
