"""The one-direction softmax loss as a module, with an optional memory bank."""

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from fastclip.functional import Exchange, info_nce_loss
from fastclip.losses.base import Loss
from fastclip.losses.memory_bank import memory_bank
from fastclip.ops.backend import check_backend
from fastclip.ops.checks import GroupRole, check_group_role, check_positive
from fastclip.ops.collectives import check_exchange


class InfoNCELoss(Loss):
    """Each query's cross-entropy among keys: retrieval training, MoCo, CPC.

    Args:
        temperature: > 0; similarities are divided by it.
        memory_bank_size: 0, or (rows, width) of a bank whose rows are further negatives without
            gradient. In training mode the keys go into it after each call.
        in_batch: whether other queries' keys are negatives; False only with a bank.
        dist: None, or, without a bank, "gather" or "ring": processes share the loss. Features are
            then one process's rows, the loss is that of all, and gradients averaged over the
            processes (DDP) are the full batch's.
        group: the process group; None: the default one.
        group_role: of the ids that a call is given: "excluded": pairs of one id are no negatives of
            each other; "positive": they are positives.
        backend: "auto" (the fastest there is), "triton", "cuda", "cpp", "torch" or "reference".
        chunk_bytes: size of a chunk of the similarity matrix, in bytes; None: a fixed default.
        keep_bytes: bytes for exponentials the backward reuses; None: 64 MiB on CPUs, 1 GiB on GPUs.

    Raises:
        ValueError: an unknown `dist`, a temperature that is not positive, a bank without width,
            or no negatives.

    Examples:
        >>> import torch
        >>> from fastclip import InfoNCELoss
        >>> loss = InfoNCELoss(temperature=0.5, memory_bank_size=(8, 3))
        >>> loss(torch.eye(3), torch.eye(3)).shape  # 3 keys and the bank's 8 rows
        torch.Size([])
        >>> loss.memory_bank.bank[:3].equal(torch.eye(3))  # the keys are in it now
        True
    """

    def __init__(
        self,
        temperature: float = 0.07,
        memory_bank_size: int | tuple[int, int] = 0,
        *,
        in_batch: bool = True,
        dist: Exchange | None = None,
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
        self.temperature = temperature
        self.memory_bank = memory_bank(memory_bank_size)
        if self.memory_bank is None and not in_batch:
            raise ValueError("in_batch=False leaves no negatives; give memory_bank_size")
        if self.memory_bank is not None and dist is not None:
            raise ValueError("a memory bank is a process's own; leave out dist or the bank")
        self.in_batch = in_batch
        self.options: dict[str, Any] = {
            "dist": dist,
            "group": group,
            "group_role": group_role,
            "backend": backend,
            "chunk_bytes": chunk_bytes,
            "keep_bytes": keep_bytes,
        }

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        positive_index: Tensor | None = None,
        *,
        row_group: Tensor | None = None,
        column_group: Tensor | None = None,
    ) -> Tensor:
        """The loss, 0-d.

        Args:
            query: (N, D), normalized.
            keys: (M, D), normalized.
            positive_index: (N,) integers, the queries' positives; None: query i's is key i.
            row_group, column_group: (N,) and (M,) integer ids of queries and keys, with a bank of K
                rows (M + K,); both or neither, without positive_index. `group_role` says what one
                id in both means.
        """
        bank = None if self.memory_bank is None else self.memory_bank.bank
        loss = info_nce_loss(
            query,
            keys,
            1 / self.temperature,
            positive_index,
            bank=bank,
            in_batch=self.in_batch,
            row_group=row_group,
            column_group=column_group,
            **self.options,
        )
        if self.memory_bank is not None and self.training:
            self.memory_bank.enqueue(keys)
        return loss
