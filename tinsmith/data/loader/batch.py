"""What a model is trained on: rows of tokens, side by side."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinsmith.data.loader.pack import Row, pad_row


class Batch(NamedTuple):
    """Rows side by side. Everything is (B, T) int64 but `mask`, which is bool, and `source`, which
    is (B,)."""

    ids: Tensor
    targets: Tensor
    """The id that follows, within the same document; 0 where there is none."""
    mask: Tensor
    """Which targets count."""
    positions: Tensor
    """Restart at 0 with every document and every row."""
    segments: Tensor
    """Number the documents of a row from 0; -1 is padding."""
    source: Tensor
    """Which data source each row came from, (B,)."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`, without waiting for the copy."""
        return Batch._make(part.to(device, non_blocking=True) for part in self)

    def rows(self, start: int, stop: int) -> "Batch":
        """The rows [start, stop)."""
        return Batch._make(part[start:stop] for part in self)

    def split(self, size: int) -> list["Batch"]:
        """Batches of `size` rows, the last perhaps smaller."""
        return [self.rows(start, start + size) for start in range(0, len(self.ids), size)]


def collate(rows: Sequence[Row], source: Sequence[int] | NDArray[Any]) -> Batch:
    """Rows and the number of the source of each, as one batch: shorter rows get padding behind."""
    width = max(len(row.ids) for row in rows)
    even = [row if len(row.ids) == width else pad_row(row, width) for row in rows]
    parts = [torch.from_numpy(np.stack(arrays)) for arrays in zip(*even, strict=True)]
    return Batch._make([*parts, torch.from_numpy(np.array(source, dtype=np.int64))])
