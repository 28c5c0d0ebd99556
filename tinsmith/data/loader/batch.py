"""Batches of token rows for training and evaluation, and their collation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinsmith.data.loader.pack import Row, pad_row


class Batch(NamedTuple):
    """A batch of B rows of T positions. All tensors are (B, T) int64, except for `mask` (B, T)
    bool and `source` (B,) int64.
    """

    ids: Tensor
    targets: Tensor
    """The next id within the same document; 0 if there is none."""
    mask: Tensor
    """Loss mask: True for the targets that are trained."""
    positions: Tensor
    """Position within the document; restarts at 0 in every row."""
    segments: Tensor
    """Index of the document within the row, from 0; -1 is padding."""
    source: Tensor
    """Index of the data source of each row, (B,)."""

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the batch to `device`, without waiting for the copy."""
        return Batch._make(tensor.to(device, non_blocking=True) for tensor in self)

    def rows(self, start: int, stop: int) -> "Batch":
        """Return the rows [start, stop)."""
        return Batch._make(tensor[start:stop] for tensor in self)

    def split(self, size: int) -> list["Batch"]:
        """Split into batches of `size` rows; the last one may be smaller."""
        return [self.rows(start, start + size) for start in range(0, len(self.ids), size)]


def collate(rows: Sequence[Row], source: Sequence[int] | NDArray[Any]) -> Batch:
    """Collate rows, and the data source index of each, into a batch. Shorter rows are padded on
    the right.
    """
    width = max(len(row.ids) for row in rows)
    padded = [row if len(row.ids) == width else pad_row(row, width) for row in rows]
    tensors = [torch.from_numpy(np.stack(arrays)) for arrays in zip(*padded, strict=True)]
    return Batch._make([*tensors, torch.from_numpy(np.array(source, dtype=np.int64))])
