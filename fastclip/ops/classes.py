"""Sums over the rows of a class (of a label, a group), in a fixed order and linear in the rows.

Shape suffixes: M rows, N own rows, R rows of a part, D width.
"""

import torch
from torch import Tensor

from fastclip.ops.chunks import chunks
from fastclip.ops.passes import add_rows_

ROWS_OF_A_PART = 256
# of a slice of the width that classes are summed over, on the CPU and on a GPU
SLICE_ENTRIES = 1 << 19, 1 << 24


def slices(rows_RD: Tensor) -> list[slice]:
    """The width in parts: sums over classes of all of it would be the operator's peak."""
    length, width = rows_RD.shape
    columns = max(SLICE_ENTRIES[rows_RD.is_cuda] // max(length, 1), 16)
    return [slice(start, stop) for start, stop in chunks(0, width, columns)]


class Classes:
    """For each own row sums over all rows of its label, without reading a label on the host.

    Rows come in parts, each with the labels `labels[column:]`.

    Attributes:
        others: for each own row the number of others in its class.
    """

    def __init__(self, own: Tensor, labels: Tensor) -> None:
        self._own, self._labels = own, labels
        ordered = labels.sort().values
        first, last = (torch.searchsorted(ordered, own, right=right) for right in (False, True))
        self.others = last - first - 1
        self._indices: dict[tuple[int, int], _Index] = {}

    def sum(self, rows_RD: Tensor, column: int) -> Tensor:
        """For each own row the sum of the rows of its label, whose labels begin at `column`."""
        if self._labels is self._own:
            return self._index(column, len(rows_RD)).sum(rows_RD)
        # own rows stand in front, to find the class of each; they add nothing
        n = len(self._own)
        nothing = rows_RD.new_zeros(n, rows_RD.shape[1])
        return self._index(column, len(rows_RD)).sum(torch.cat((nothing, rows_RD)))[:n]

    def _index(self, column: int, count: int) -> "_Index":
        place = column, count
        if place not in self._indices:
            labels = self._labels[column : column + count]
            whole = self._labels is self._own
            self._indices[place] = _Index(labels if whole else torch.cat((self._own, labels)))
        return self._indices[place]


class _Index:
    """Classes of equal labels, and in which order their rows are added up.

    Classes are numbered by the place of their first row in label order, so that any integers
    serve and their number need not be known.
    """

    def __init__(self, labels: Tensor) -> None:
        ordered, order = torch.sort(labels, stable=True)
        place = torch.arange(len(labels), device=labels.device)
        begins = torch.ones_like(ordered, dtype=torch.bool)
        begins[1:] = ordered[1:] != ordered[:-1]
        # a class is summed in parts: adding its rows one after the other would take long for few
        # large classes
        part = (begins | (place % ROWS_OF_A_PART == 0)).cumsum(0) - 1
        class_of_row = begins.cumsum(0) - 1
        self.part = torch.empty_like(order)
        self.part[order] = part
        self.index = torch.empty_like(order)
        self.index[order] = class_of_row
        # parts that do not exist add their zeros each to a place of its own
        self.class_of_part = place.clone()
        self.class_of_part[part] = class_of_row

    def sum(self, rows_MD: Tensor) -> Tensor:
        """For each row the sum over its class, (M, D)."""
        parts = add_rows_(torch.zeros_like(rows_MD), self.part, rows_MD)
        sums = add_rows_(torch.zeros_like(rows_MD), self.class_of_part, parts)
        return sums.index_select(0, self.index)
