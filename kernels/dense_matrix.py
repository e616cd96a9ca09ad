"""S where it is held whole, as what sweeps over it is asked; free of Triton."""

from typing import NamedTuple

from torch import Tensor


class Matrix(NamedTuple):
    """S = scale * cos + offset, and what is left out of it.

    A scale, offset or weight is a number, a tensor of one element, or one of (P, P) by pair of
    domains, read with the lesser first.

    Attributes:
        cos: (R, S), products, columns contiguous.
        kind: "softmax", "sigmoid" or "labels".
        scale, offset: of S.
        weight: of a positive; 1 for what is not symmetric.
        ids: of rows and columns: labels, or groups that are left out; or None.
        positive: (R,), the columns of the rows' positives; None: row i's is column i of a block.
        pairs: rows of a block.
        beside: columns of a block.
        paired: the first so many columns have statistics too; 0 where they are the rows'.
        domains: of each block, one for what is not symmetric.
        symmetric: whether columns are the rows.
        first_negative: columns before it are positives only.
        smoothing: label smoothing.
    """

    cos: Tensor
    kind: str
    scale: Tensor | float
    offset: Tensor | float
    weight: Tensor | float
    ids: tuple[Tensor, Tensor] | None
    positive: Tensor | None
    pairs: int
    beside: int
    paired: int
    domains: tuple[int, ...]
    symmetric: bool
    first_negative: int
    smoothing: float

    @property
    def lines(self) -> int:
        """Rows, and columns that have statistics of their own."""
        return self.cos.shape[0] + self.paired

    @property
    def has_means(self) -> bool:
        """Whether a mean over some of a line is subtracted."""
        return self.smoothing > 0 or self.kind == "labels"

    def factor(self, reduction: str) -> float:
        """What a line's loss counts; of labels before it is divided by the number of anchors."""
        share = 0.5 if self.paired else 1.0
        mean = reduction == "mean" and self.kind != "labels"
        return share / self.cos.shape[0] if mean else share


class Upstream(NamedTuple):
    """The gradients of lines' losses: values (R,) or 0-d, times a factor, over a divisor."""

    values: Tensor
    factor: float
    divisor: Tensor | None

    @property
    def stride(self) -> int:
        """From one anchor to the next."""
        return self.values.stride(0) if self.values.ndim else 0

    def of_rows(self, rows: int) -> Tensor:
        """(R,)."""
        found = self.values * self.factor
        if self.divisor is not None:
            found = found / self.divisor
        return found.expand(rows)
