"""The loss of SimCLR, and with a memory bank of MoCo, with lightly's signature."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, is_initialized

from fastclip.functional import Exchange, info_nce_loss, nt_xent_loss
from fastclip.losses.base import Loss
from fastclip.losses.memory_bank import memory_bank
from fastclip.ops.backend import check_backend
from fastclip.ops.checks import GroupRole, check_group_role, check_positive
from fastclip.ops.collectives import check_exchange


class NTXentLoss(Loss):
    """Drop-in for `lightly.loss.NTXentLoss`: same arguments, call and value, memory linear in N.

    As there, features are normalized inside. The state of a bank is part of `state_dict`, which
    it is not in lightly: load a checkpoint of lightly's with `strict=False`.

    Args:
        temperature: > 0; similarities are divided by it.
        memory_bank_size: 0, or (rows, width) of a bank. With a bank its rows are the negatives of
            `out0`, and `out1` holds the positives and goes into the bank afterwards (where
            `out0` requires a gradient, so not in evaluation). It wraps around at its end.
        gather_distributed: whether other processes' samples are negatives too; a bank then takes
            the keys of all processes, which must have as many each. As in lightly the value is
            that of the process's own anchors, and data-parallel averaging gives the gradient of
            the full batch.
        dist: "gather" brings all processes' features at once, "ring" one's after the other.
        group: the process group; None: the default one.
        group_role: of the ids that a call is given: "excluded": samples of one id are no negatives
            of each other; "positive": they are positives.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.

    Raises:
        ValueError: an unknown `dist`, a temperature that is not positive, or a bank without width.

    Examples:
        >>> import torch
        >>> from fastclip import NTXentLoss
        >>> loss = NTXentLoss(temperature=0.5)  # in place of lightly.loss.NTXentLoss
        >>> view1, view2 = 2 * torch.eye(3), torch.eye(3)  # normalized inside
        >>> round(loss(view1, view2).item(), 4)
        0.4327
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | tuple[int, int] = 0,
        gather_distributed: bool = False,
        *,
        dist: Exchange = "gather",
        group: ProcessGroup | None = None,
        group_role: GroupRole = "excluded",
        backend: str = "auto",
        chunk_bytes: int | None = None,
        keep_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_exchange(dist)
        check_backend(backend)
        check_group_role(group_role)
        check_positive("temperature", temperature)
        if group_role == "positive" and memory_bank_size != 0:
            raise ValueError("group_role='positive' needs memory_bank_size=0")
        self.temperature = temperature
        self.memory_bank = memory_bank(memory_bank_size)
        self.options: dict[str, Any] = {
            "backend": backend,
            "chunk_bytes": chunk_bytes,
            "keep_bytes": keep_bytes,
        }
        self.gather_distributed = gather_distributed
        self.dist: Exchange = dist
        self.group = group
        self.group_role: GroupRole = group_role

    def forward(self, out0: Tensor, out1: Tensor, *, row_group: Tensor | None = None) -> Tensor:
        """The loss, 0-d.

        Args:
            out0, out1: (N, D), two views of the same samples.
            row_group: (N,) integer ids of the samples, without a bank; `group_role` says what
                samples of one id are.

        Raises:
            ValueError: ids beside a bank, whose rows have none.
        """
        out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        if self.memory_bank is None:
            shared: dict[str, Any] = {"row_group": row_group, "group_role": self.group_role}
            if self.gather_distributed and is_initialized():
                shared |= {"dist": self.dist, "group": self.group}
            loss = nt_xent_loss(
                out0, out1, self.temperature, reduction="none", **shared, **self.options
            ).mean()
        else:
            if row_group is not None:
                raise ValueError("row_group needs memory_bank_size=0: a bank's rows have no ids")
            bank = self.memory_bank.bank
            scale = 1 / self.temperature
            loss = info_nce_loss(out0, out1, scale, bank=bank, in_batch=False, **self.options)
            if out0.requires_grad:
                if self.gather_distributed and is_initialized():
                    self.memory_bank.enqueue_of_all(out1, self.group)
                else:
                    self.memory_bank.enqueue(out1)
        return loss
